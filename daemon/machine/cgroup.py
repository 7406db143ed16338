"""Limits of the cgroups (version 2) that hold this process."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from quantd.daemon.machine.files import ROOT, lines, number, text

Folders = list[Path]


def folders(root: Path = ROOT) -> Folders:
    """This process's cgroup and those above it, the own one first."""
    top = root / "sys/fs/cgroup"
    own = next(
        (line[3:] for line in lines(root / "proc/self/cgroup") if line.startswith("0::")), None
    )
    if own is None:
        return []
    folder = top / own.strip("/")
    return [folder, *(path for path in folder.parents if path.is_relative_to(top))]


def cpu_quota(cgroups: Iterable[Path]) -> float | None:
    """The processors' time that the tightest of them allows, in processors; None: no limit."""
    quotas = []
    for folder in cgroups:
        quota, _, period = (text(folder / "cpu.max") or "").partition(" ")
        if quota.isdigit() and period.isdigit() and int(period) > 0:
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def memory_limit(cgroups: Iterable[Path]) -> int | None:
    """In bytes; None: no limit."""
    limits = (number(folder / "memory.max") for folder in cgroups)
    return min((limit for limit in limits if limit is not None), default=None)


def available(cgroups: Iterable[Path], machine: int) -> int:
    """Bytes of `machine`, those that it has available, that the cgroups' limits leave."""
    for folder in cgroups:
        limit, used = number(folder / "memory.max"), number(folder / "memory.current")
        if limit is not None and used is not None:
            machine = min(machine, max(0, limit - used + _page_cache(folder)))
    return machine


def _page_cache(folder: Path) -> int:
    """Bytes that the kernel counts as the cgroup's and would give up when asked."""
    return sum(
        int(line.split()[1])
        for line in lines(folder / "memory.stat")
        if line.startswith("inactive_file ")
    )

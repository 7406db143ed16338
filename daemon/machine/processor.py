"""The processor: what it is, and how much of it this process may use."""

from __future__ import annotations

import os
import platform
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path

from quantd.daemon.machine import cgroup
from quantd.daemon.machine.files import ROOT, children, lines, number, text

_CPUS = "sys/devices/system/cpu"


@dataclass(frozen=True, slots=True)
class Processor:
    model: str
    architecture: str
    logical: int
    """Processors that the machine has running, siblings counted each."""
    allowed: int
    """Of these, those that the affinity of this process allows."""
    cores: int
    """Physical cores among the allowed ones."""
    quota: float | None
    """The cgroups' limit, in processors."""
    virtual: bool
    governors: tuple[str, ...]
    """How frequencies are chosen, each kind once; none where a host decides."""
    frequency_driver: str | None
    energy_preference: str | None
    load: float | None
    """Threads that ran or wanted to, on average over the last minute."""
    throttled: int | None
    """Times since the start that a core was slowed down because of heat; None: not told."""


def read_processor(
    root: Path = ROOT, allowed: Set[int] | None = None, architecture: str | None = None
) -> Processor:
    """`allowed`: the affinity (None: this process's)."""
    mine = os.sched_getaffinity(0) if allowed is None else allowed
    cpus = children(root / _CPUS, "cpu[0-9]*")
    shown = [lines(root / "proc/cpuinfo")]
    about = {name.strip(): value.strip() for name, _, value in map(_split, shown[0])}
    frequency = root / _CPUS / "cpu0/cpufreq"
    heat = [number(cpu / "thermal_throttle/core_throttle_count") for cpu in cpus]
    counts = [count for count in heat if count is not None]
    governors = {text(cpu / "cpufreq/scaling_governor") for cpu in cpus}
    return Processor(
        model=about.get("model name") or about.get("CPU part") or "unknown",
        architecture=architecture or platform.machine(),
        logical=_running(root) or len(mine),
        allowed=len(mine),
        cores=physical_cores(root, mine),
        quota=cgroup.cpu_quota(cgroup.folders(root)),
        virtual="hypervisor" in flags(root),
        governors=tuple(sorted(governor for governor in governors if governor)),
        frequency_driver=text(frequency / "scaling_driver"),
        energy_preference=text(frequency / "energy_performance_preference"),
        load=_load(root),
        throttled=max(counts, default=None),
    )


def flags(root: Path = ROOT) -> set[str]:
    """What the processor can do, by the kernel's names."""
    found: set[str] = set()
    for name, _, value in map(_split, lines(root / "proc/cpuinfo")):
        if name.strip() in ("flags", "Features"):
            found.update(value.split())
    return found


def physical_cores(root: Path = ROOT, allowed: Set[int] | None = None) -> int:
    """Physical cores among the allowed processors: two threads of a core share its arithmetic
    units."""
    mine = os.sched_getaffinity(0) if allowed is None else allowed
    topology = "topology/thread_siblings_list"
    return len({text(root / _CPUS / f"cpu{cpu}" / topology) or str(cpu) for cpu in mine})


def _split(line: str) -> tuple[str, str, str]:
    return line.partition(":")


def _load(root: Path) -> float | None:
    first = (text(root / "proc/loadavg") or "").partition(" ")[0]
    return float(first) if first else None


def _running(root: Path) -> int:
    """From a list of ranges: "0-3,8"."""
    count = 0
    for part in (text(root / _CPUS / "online") or "").split(","):
        first, _, last = part.partition("-")
        if first.isdigit():
            count += int(last or first) - int(first) + 1
    return count

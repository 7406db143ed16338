"""Memory, swap and disks."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from quantd.daemon.machine import cgroup
from quantd.daemon.machine.files import ROOT, children, lines, text


@dataclass(frozen=True, slots=True)
class Memory:
    """In bytes."""

    total: int
    available: int
    """What could be taken now without swapping, within the cgroups' limits."""
    limit: int | None
    """The cgroups'."""
    swap_total: int
    swap_used: int
    huge_pages: str | None
    """Transparent ones: always, madvise or never."""
    nodes: int
    """Of memory; more than one: some of it is nearer to some cores."""


@dataclass(frozen=True, slots=True)
class Disk:
    """In bytes."""

    path: str
    """The folder, which need not exist yet."""
    total: int
    free: int


def read_memory(root: Path = ROOT) -> Memory:
    """Raises OSError where /proc/meminfo cannot be read."""
    cgroups = cgroup.folders(root)
    chosen = re.search(r"\[(\w+)\]", text(root / _HUGE_PAGES) or "")
    return Memory(
        total=meminfo("MemTotal", root),
        available=cgroup.available(cgroups, meminfo("MemAvailable", root)),
        limit=cgroup.memory_limit(cgroups),
        swap_total=meminfo("SwapTotal", root),
        swap_used=meminfo("SwapTotal", root) - meminfo("SwapFree", root),
        huge_pages=chosen[1] if chosen else None,
        nodes=len(children(root / "sys/devices/system/node", "node[0-9]*")) or 1,
    )


_HUGE_PAGES = "sys/kernel/mm/transparent_hugepage/enabled"


def meminfo(key: str, root: Path = ROOT) -> int:
    """A line of /proc/meminfo, in bytes. Raises OSError where there is none."""
    path = root / "proc/meminfo"
    for line in lines(path):
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024
    raise OSError(f"{path} has no {key}")


def read_disk(path: Path) -> Disk | None:
    """Of the file system that holds the folder, or will hold it."""
    for folder in (path, *path.parents):
        try:
            usage = shutil.disk_usage(folder)
        except OSError:
            continue
        return Disk(str(path), usage.total, usage.free)
    return None

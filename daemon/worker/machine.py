"""What the process may use of its machine: memory and cores, inside whatever cgroup holds it."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

MAP_NORESERVE = 0x4000 if hasattr(mmap, "MAP_POPULATE") else 0
"""Linux: a private mapping of which little may ever be written does not count as committed."""

_CGROUP = Path("/sys/fs/cgroup")
_TOPOLOGY = Path("/sys/devices/system/cpu")
_CPUINFO = Path("/proc/cpuinfo")


def available_memory() -> int:
    """Bytes that could be taken now without swapping."""
    available = _meminfo("MemAvailable")
    for folder in _cgroups():
        limit, used = _number(folder / "memory.max"), _number(folder / "memory.current")
        if limit is not None and used is not None:
            available = min(available, max(0, limit - used + _page_cache(folder)))
    return available


def total_memory() -> int:
    """Bytes that the process could ever have: the machine's, or fewer where a cgroup limits it."""
    limits = [_number(folder / "memory.max") for folder in _cgroups()]
    return min([_meminfo("MemTotal"), *(limit for limit in limits if limit is not None)])


def physical_cores() -> int:
    """Cores that the process may run on, siblings counted once: two threads of a core share its
    arithmetic units, and a matrix product keeps them busy with one."""
    mine = os.sched_getaffinity(0)
    siblings = {_read(_TOPOLOGY / f"cpu{cpu}/topology/thread_siblings_list", cpu) for cpu in mine}
    return max(1, min([len(siblings), *_quotas()]))


def computes_bfloat16() -> bool:
    """Whether the processor has bfloat16 arithmetic; without it, float32 is faster."""
    flags: set[str] = set()
    for line in _CPUINFO.read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            flags.update(value.split())
    return not flags.isdisjoint({"avx512_bf16", "amx_bf16", "bf16"})


def _meminfo(key: str) -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024
    raise OSError(f"/proc/meminfo has no {key}")


def _read(path: Path, cpu: int) -> str:
    try:
        return path.read_text()
    except OSError:
        return str(cpu)


def _quotas() -> list[int]:
    """Whole cores by the cgroups' quotas, if any."""
    quotas = []
    for folder in _cgroups():
        try:
            quota, period = (folder / "cpu.max").read_text().split()
            quotas.append(max(1, int(quota) // int(period)))
        except (OSError, ValueError):  # absent, or "max"
            continue
    return quotas


def _cgroups() -> list[Path]:
    """This process's cgroup (version 2) and those above it."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    own = next((line[3:] for line in lines if line.startswith("0::")), None)
    if own is None:
        return []
    folder = _CGROUP / own.strip("/")
    return [folder, *(path for path in folder.parents if path.is_relative_to(_CGROUP))]


def _page_cache(folder: Path) -> int:
    """Bytes that the kernel counts as the cgroup's and would give up when asked."""
    try:
        lines = (folder / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None

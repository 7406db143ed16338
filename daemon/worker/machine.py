"""What the process may use of its machine: memory and cores, inside whatever cgroup holds it."""

from __future__ import annotations

import mmap
from pathlib import Path

from quantd.daemon.machine import cgroup, processor
from quantd.daemon.machine.memory import meminfo

MAP_NORESERVE = 0x4000 if hasattr(mmap, "MAP_POPULATE") else 0
"""Linux: a private mapping of which little may ever be written does not count as committed."""


def available_memory() -> int:
    """Bytes that could be taken now without swapping."""
    return cgroup.available(_cgroups(), meminfo("MemAvailable"))


def total_memory() -> int:
    """Bytes that the process could ever have: the machine's, or fewer where a cgroup limits it."""
    total, limit = meminfo("MemTotal"), cgroup.memory_limit(_cgroups())
    return total if limit is None else min(total, limit)


def physical_cores() -> int:
    """Cores that the process may run on, siblings counted once: two threads of a core share its
    arithmetic units, and a matrix product keeps them busy with one. A quota counts whole cores."""
    cores, quota = processor.physical_cores(), cgroup.cpu_quota(_cgroups())
    return max(1, cores if quota is None else min(cores, int(quota)))


def computes_bfloat16() -> bool:
    """Whether the processor has bfloat16 arithmetic; without it, float32 is faster."""
    return not processor.flags().isdisjoint({"avx512_bf16", "amx_bf16", "bf16"})


def _cgroups() -> list[Path]:
    return cgroup.folders()

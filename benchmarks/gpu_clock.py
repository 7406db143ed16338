"""Time on a device, and its own rates: what the kernels of `gpu.py` are held against."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

Run = Callable[[], object]

_FLUSH_BYTES = 256 << 20
"""More than the last cache of any GPU here: what a kernel reads comes from memory."""
_HEAD_START = 500_000
"""Cycles in which the device only waits, so that all of a call is in its queue when it begins."""
_BUDGET = 0.25
"""Seconds of repeats for one row."""

Rates = dict[str, float]
"""By name: "copy" in bytes per second, the others in operations per second."""


@dataclass(frozen=True, slots=True)
class Time:
    seconds: float
    """The median, on the device."""
    launch: float
    """Seconds in which the host puts one call into the queue; on a CPU the same as `seconds`."""


class Clock:
    """Medians of calls. On a GPU by events, with the last cache flushed before each call."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        self.device = device
        self._repeats = repeats
        self._is_gpu = device.type == "cuda"
        size = _FLUSH_BYTES if self._is_gpu else 0
        self._flushed = torch.empty(size, dtype=torch.int8, device=device)

    def release(self) -> None:
        """Gives back what is flushed with; no call can be timed after."""
        self._flushed = self._flushed.new_empty(0)

    def synchronize(self) -> None:
        if self._is_gpu:
            torch.cuda.synchronize(self.device)

    def time(self, run: Run) -> Time:
        """Runs it twice before: what is compiled or looked up at first is no part of it."""
        run()
        self.synchronize()
        start = time.perf_counter()
        run()
        self.synchronize()
        whole = time.perf_counter() - start
        repeats = max(3, min(self._repeats, int(_BUDGET / max(whole, 1e-6))))
        return self._by_events(run, repeats) if self._is_gpu else self._by_clock(run, repeats)

    def _by_events(self, run: Run, repeats: int) -> Time:
        events: Any = torch.cuda.Event
        pairs = [(events(enable_timing=True), events(enable_timing=True)) for _ in range(repeats)]
        launches = []
        for start, stop in pairs:
            torch.cuda._sleep(_HEAD_START)
            self._flushed.zero_()
            start.record()
            before = time.perf_counter()
            run()
            launches.append(time.perf_counter() - before)
            stop.record()
        self.synchronize()
        seconds = [start.elapsed_time(stop) / 1e3 for start, stop in pairs]
        return Time(statistics.median(seconds), statistics.median(launches))

    def _by_clock(self, run: Run, repeats: int) -> Time:
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        return Time(statistics.median(seconds), statistics.median(seconds))


def measure_rates(clock: Clock, tiny: bool) -> Rates:
    """What the device copies, and multiplies in large products of torch's own."""
    device, rates = clock.device, {}
    rates["copy"] = _copy_rate(clock, 1 << (20 if tiny else 31))
    n = 128 if tiny else 8192
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        rates[name] = 2 * n**3 / clock.time(lambda a=a, b=b: torch.mm(a, b)).seconds
    c, d = (torch.randint(-127, 128, (n, n), device=device, dtype=torch.int8) for _ in range(2))
    rates["int8"] = 2 * n**3 / clock.time(lambda: torch._int_mm(c, d.t())).seconds
    return rates


def _copy_rate(clock: Clock, size: int) -> float:
    source, target = torch.zeros(2, size, dtype=torch.int8, device=clock.device)
    return 2 * size / clock.time(lambda: target.copy_(source)).seconds


@dataclass(frozen=True, slots=True)
class Case:
    """One row of the table. `make` takes the memory and returns what is timed."""

    group: str
    name: str
    make: Callable[[], Made]
    needs: int = 0
    """Bytes, roughly; a row that has no room is left out and says so."""


@dataclass(frozen=True, slots=True)
class Made:
    run: Run
    num_bytes: float
    """That must move: each thing that is read, once, and each that is written."""
    operations: float = 0.0
    """Multiplications and additions that must be done."""
    unit: str = "bf16"
    """Whose rate they are held against."""
    peers: dict[str, Run] = field(default_factory=dict)
    aim: float | None = None
    """The fraction of the device's rate that is aimed at."""


def measure(case: Case, clock: Clock, rates: Rates) -> dict[str, Any]:
    """The row as it is printed and written. Whatever fails is in it, and nothing ends."""
    row: dict[str, Any] = {"group": case.group, "name": case.name}
    try:
        free = _free(clock.device)
        if case.needs > free:
            return row | {"skipped": f"needs {case.needs >> 20} MiB, {free >> 20} are free"}
        made = case.make()
        took = clock.time(made.run)
        by_memory = made.num_bytes / rates["copy"]
        by_units = made.operations / rates[made.unit]
        least = max(by_memory, by_units)
        row |= {
            "us": took.seconds * 1e6,
            "launch_us": took.launch * 1e6,
            "bytes": made.num_bytes,
            "operations": made.operations,
            "bound": "copy" if by_memory >= by_units else made.unit,
            "fraction": least / took.seconds,
            "aim": made.aim,
            "peers": {},
        }
    except Exception as error:
        return row | {"error": f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"}
    for name, peer in made.peers.items():
        try:
            row["peers"][name] = clock.time(peer).seconds * 1e6
        except Exception as error:
            row["peers"][name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return row


def _free(device: torch.device) -> int:
    if device.type != "cuda":
        return 1 << 62
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return int(free)

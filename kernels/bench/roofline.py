"""What the machine can do at most, and how long a call takes."""

import ctypes
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from quantd.kernels.cpu.library import Library, open_library

_READ_MEGABYTES = 256
_PEAK_TASKS = 128
_CALLS = 5
"""Of a route, at least."""


@dataclass(frozen=True, slots=True)
class Roofline:
    """Measured now, with all of the process's threads."""

    read: float
    """Bytes per second from memory."""
    floats: float
    """fp32 operations per second, two for each product."""
    integers: float | None
    """The same of eight-bit products as the kernels make them; None where there is no measure."""

    def seconds(self, num_bytes: float, operations: float, integers: bool) -> float:
        """The least that such a call can take."""
        peak = self.integers if integers and self.integers is not None else self.floats
        return max(num_bytes / self.read, operations / peak)


def measure_roofline() -> Roofline:
    threads = torch.get_num_threads()
    (read,) = read_rates((threads,))
    library = open_library()
    if not isinstance(library, Library):
        # Without the library: what torch itself reaches.
        a = torch.ones(1024, 1024)
        return Roofline(read, 2 * 1024**3 / seconds(lambda: F.linear(a, a), 0.3), None)
    peak = getattr(library.handle, f"quantd_peak_{library.best_level}")
    peak.argtypes, peak.restype = (ctypes.c_int, ctypes.c_int, ctypes.c_int64), ctypes.c_int64
    rates = []
    for integers in (0, 1):
        run = partial(peak, threads, integers, _PEAK_TASKS)
        rates.append(run() / seconds(run, 0.3))
    return Roofline(read, rates[0], rates[1] or None)


def read_rates(threads: Sequence[int]) -> list[float]:
    """Bytes per second from memory with each of these numbers of threads."""
    data = torch.zeros(_READ_MEGABYTES << 18)
    library = open_library()
    if not isinstance(library, Library):
        return [data.nbytes / _sum_seconds(data, n) for n in threads]
    read = getattr(library.handle, f"quantd_read_{library.best_level}")
    read.argtypes, read.restype = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int64), ctypes.c_int
    calls = (partial(read, n, data.data_ptr(), _READ_MEGABYTES) for n in threads)
    return [data.nbytes / seconds(call, 0.3) for call in calls]


def _sum_seconds(data: torch.Tensor, threads: int) -> float:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return seconds(data.sum, 0.3)
    finally:
        torch.set_num_threads(before)


def seconds(call: Callable[[], object], budget: float) -> float:
    """A call's time: the median of the best quarter, because on a shared machine the rest is the
    neighbours'. Takes about `budget` seconds, or what five calls take."""
    call()
    times: list[float] = []
    end = time.perf_counter() + budget
    while len(times) < _CALLS or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(sorted(times)[: max(1, len(times) // 4)])

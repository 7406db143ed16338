"""What the machine can do at most, and how long a call takes."""

import ctypes
import statistics
import time
from collections.abc import Callable
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
    library = open_library()
    if isinstance(library, Library):
        return _by_library(library)
    # Without the library: what torch itself reaches.
    data = torch.zeros(_READ_MEGABYTES << 18)
    a = torch.ones(1024, 1024)
    product = seconds(lambda: F.linear(a, a), 0.3)
    return Roofline(data.nbytes / seconds(data.sum, 0.3), 2 * 1024**3 / product, None)


def _by_library(library: Library) -> Roofline:
    peak = getattr(library.handle, f"quantd_peak_{library.best_level}")
    peak.argtypes, peak.restype = (ctypes.c_int, ctypes.c_int, ctypes.c_int64), ctypes.c_int64
    read = getattr(library.handle, f"quantd_read_{library.best_level}")
    read.argtypes, read.restype = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int64), ctypes.c_int
    threads = torch.get_num_threads()
    data = torch.zeros(_READ_MEGABYTES << 18)
    bandwidth = data.nbytes / seconds(lambda: read(threads, data.data_ptr(), _READ_MEGABYTES), 0.3)
    rates = []
    for integers in (0, 1):
        run = partial(peak, threads, integers, _PEAK_TASKS)
        rates.append(run() / seconds(run, 0.3))
    return Roofline(bandwidth, rates[0], rates[1] or None)


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

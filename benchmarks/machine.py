"""What this machine can do at most: read bandwidth and bf16 matrix products.

A figure of a shared machine means nothing without these beside it, taken in the same run: the same
virtual machine reads 20 GB/s in one minute and 60 in another.
"""

from __future__ import annotations

import ctypes
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

_READ = r"""
#include <stddef.h>
#include <stdint.h>
/* Sums `n` bytes in four streams; the sum is returned so that nothing is optimized away. */
uint64_t read_all(const uint64_t *p, size_t n) {
  uint64_t total = 0;
  size_t words = n / 8;
  #pragma omp parallel for reduction(+:total) schedule(static)
  for (size_t i = 0; i < words; i += 32) {
    uint64_t s = 0;
    for (int k = 0; k < 32; k++) s += p[i + k];
    total += s;
  }
  return total;
}
"""


def read_bandwidth(mebibytes: int = 512, rounds: int = 7) -> float | None:
    """GB/s of memory reads over all cores (median of `rounds`), or None without a C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "read.c"), Path(folder, "read.so")
        source.write_text(_READ)
        flags = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
        subprocess.run([compiler, *flags, str(source), "-o", str(library)], check=True)
        read_all = ctypes.CDLL(str(library)).read_all
    read_all.argtypes, read_all.restype = [ctypes.c_void_p, ctypes.c_size_t], ctypes.c_uint64
    size = mebibytes << 20
    buffer = (ctypes.c_char * size)()
    ctypes.memset(buffer, 1, size)
    rates = []
    for _ in range(rounds):
        start = time.perf_counter()
        read_all(buffer, size)
        rates.append(size / (time.perf_counter() - start) / 1e9)
    return statistics.median(rates)


def matmul_rate(rows: int = 1024, rounds: int = 5) -> float:
    """GFLOP/s of a bf16 product [rows, 2048] x [2048, 8192] in torch (median of `rounds`)."""
    import torch

    x = torch.randn(rows, 2048).to(torch.bfloat16)
    weight = torch.randn(8192, 2048).to(torch.bfloat16)
    torch.nn.functional.linear(x, weight)
    rates = []
    for _ in range(rounds):
        start = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        rates.append(2 * rows * 2048 * 8192 / (time.perf_counter() - start) / 1e9)
    return statistics.median(rates)


def describe() -> str:
    """The processor's name and the number of cores, in one line."""
    name = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            name = line.split(":", 1)[1].strip()
            break
    import os

    return f"{name}, {os.cpu_count()} cores, Python {platform.python_version()}"

"""Grouped weights: GB/s of weight bytes and GOP/s, beside torch's fp32 F.linear.

    python benchmarks/grouped.py --threads 1 --shapes 2048x2048 --rows 1,4,16,128

Weights are copied until together they are larger than any cache, and taken in turn. A figure is the
median of the best quarter, of the thread's own time on one thread and of wall time on more: on a
shared machine the rest is the neighbours'. Formats take turns, so that all meet the same ones.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from quantd.kernels import ops

FORMATS = {
    "2b g16 offset": (2, 16, True),
    "3b g16": (3, 16, False),
    "4b g32": (4, 32, False),
    "4b g32 offset": (4, 32, True),
    "4b g128 offset": (4, 128, True),
    "5b g32 offset": (5, 32, True),
    "6b g16": (6, 16, False),
    "8b g32": (8, 32, False),
    "8b row": (8, 1 << 20, False),
}


def make(n: int, k: int, bits: int, group: int, offset: bool) -> ops.GroupedWeight:
    shape = (n, -(-k // group))
    codes = torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8)
    shift = torch.rand(shape) if offset else None
    center = 0 if offset else 1 << (bits - 1)
    return ops.pack_grouped(
        [ops.GroupedCodes(codes, bits, group, torch.rand(shape), shift, center)], (n, k)
    )


def read_bandwidth(nbytes: int) -> float:
    """GB/s of a sum over memory, the best of three."""
    memory = torch.ones(nbytes // 4, dtype=torch.float32)
    return nbytes / min(seconds(lambda: memory.sum()) for _ in range(3)) / 1e9


def seconds(call: Callable[[], object]) -> float:
    clock = time.thread_time if ops.num_threads() == 1 else time.perf_counter
    start = clock()
    call()
    return clock() - start


def best(times: Sequence[float]) -> float:
    return statistics.median(sorted(times)[: max(1, len(times) // 4)])


def run(n: int, k: int, rows: Sequence[int], rotate: int, repeats: int) -> None:
    weights = {}
    for name, (bits, group, offset) in FORMATS.items():
        one = make(n, k, bits, group, offset)
        copies = max(1, rotate // len(FORMATS) // one.nbytes)
        weights[name] = [one, *(copy_of(one) for _ in range(copies - 1))]
    plain = [torch.randn(n, k) for _ in range(2)]
    print(f"[{n} x {k}]   {'':9s}" + "".join(f"{r:>16d}" for r in rows))
    times: dict[tuple[str, int], list[float]] = {}
    for count in rows:
        x = torch.randn(count, k)
        for turn in range(repeats):
            for name, copies_of in weights.items():
                w = copies_of[turn % len(copies_of)]
                spent = seconds(lambda w=w, x=x: ops.grouped_linear(x, w, None))
                times.setdefault((name, count), []).append(spent)
            p = plain[turn % len(plain)]
            spent = seconds(lambda p=p, x=x: F.linear(x, p))
            times.setdefault(("fp32 F.linear", count), []).append(spent)
    for name in (*weights, "fp32 F.linear"):
        nbytes = weights[name][0].nbytes if name in weights else 4 * n * k
        cells = []
        for count in rows:
            spent = best(times[name, count])
            cells.append(f"{nbytes / spent / 1e9:6.1f} {2 * n * k * count / spent / 1e9:5.0f}")
        print(f"{name:22s}" + "".join(f"{cell:>16s}" for cell in cells), flush=True)


def copy_of(w: ops.GroupedWeight) -> ops.GroupedWeight:
    """With its own memory."""
    parts = tuple(dataclasses.replace(part, data=part.data.clone()) for part in w.parts)
    return ops.join_grouped([dataclasses.replace(w, parts=parts)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=ops.num_threads())
    parser.add_argument("--shapes", default="8192x2048,2048x8192,2048x2048")
    parser.add_argument("--rows", default="1,2,4,8,16,64,128,512")
    parser.add_argument("--rotate", type=int, default=300_000_000, help="bytes of all formats")
    parser.add_argument("--repeats", type=int, default=12)
    options = parser.parse_args()
    ops.set_num_threads(options.threads)
    print(f"{options.threads} threads, memory read {read_bandwidth(400_000_000):.1f} GB/s")
    print("each cell: GB/s of weight bytes, GOP/s")
    for shape in options.shapes.split(","):
        n, k = map(int, shape.split("x"))
        run(n, k, [int(r) for r in options.rows.split(",")], options.rotate, options.repeats)


if __name__ == "__main__":
    main()

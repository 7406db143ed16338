"""Which tile multiplies grouped weights fastest on this GPU, by bits and number of rows.

    python benchmarks/tune_gpu.py            # prints
    python benchmarks/tune_gpu.py --write    # and puts it into kernels/triton/tuned.json

A candidate's time is the sum of its medians over the shapes. The default stays where no other one
is more than 3 percent faster: what differs by less is the day. A tile decides speed and no bits
(docs/decisions/0021). What does not fit into the GPU's shared memory is passed over.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence

import torch
from triton.runtime.errors import OutOfResources

from quantd.kernels.grouped import BITS, GroupedCodes
from quantd.kernels.triton import tuned
from quantd.kernels.triton.grouped import grouped_matmul
from quantd.kernels.triton.grouped_layout import PackedPart, pack_part

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))
ROWS = {16: (1, 16), 64: (32, 64), tuned.ROWS[-1]: (256, 2048)}
"""Measured for each bucket."""

GAIN = 0.97
REPEATS = 20

Clock = Callable[[Callable[[], None]], float]
"""Runs the call once and gives its seconds."""


def make_weight(shape: tuple[int, int], bits: int, device: torch.device) -> PackedPart:
    rows, columns = shape
    codes = torch.randint(0, 1 << bits, shape, dtype=torch.uint8, device=device)
    scale = torch.ones(rows, -(-columns // 128), device=device)
    chunk = GroupedCodes(codes, bits, 128, scale, center=1 << (bits - 1))
    return pack_part([chunk], rows, columns, order=None, per_row=False, device=device)


def fastest(
    weights: Sequence[PackedPart], most: int, rows: Sequence[int], clock: Clock
) -> tuned.Tile:
    """Of the bucket's candidates."""
    device, bits = weights[0].low.device, weights[0].bits
    key, before = (tuned.name_of(device), bits, most), dict(tuned.MEASURED)
    times = {}
    try:
        for candidate in tuned.CANDIDATES[most]:
            tuned.MEASURED[key] = candidate
            try:
                times[candidate] = sum(_seconds(w, count, clock) for w in weights for count in rows)
            except OutOfResources as error:
                print(f"{key}: {candidate} does not fit: {error}")
    finally:
        tuned.MEASURED.clear()
        tuned.MEASURED.update(before)
    best = min(times, key=lambda candidate: times[candidate])
    default = tuned.DEFAULT[most]
    return best if times[best] < GAIN * times.get(default, float("inf")) else default


def _seconds(weight: PackedPart, rows: int, clock: Clock) -> float:
    device = weight.low.device
    x = torch.randn(rows, weight.columns, device=device).half()
    out = torch.empty(rows, weight.rows, dtype=torch.float16, device=device)

    def call() -> None:
        grouped_matmul(x, weight, None, out)

    call()  # compiles
    return statistics.median(clock(call) for _ in range(REPEATS))


def tune(
    device: torch.device, bits: Sequence[int], shapes: Sequence[tuple[int, int]], clock: Clock
) -> tuned.Measured:
    found: tuned.Measured = {}
    for width in bits:
        weights = [make_weight(shape, width, device) for shape in shapes]
        for most, rows in ROWS.items():
            chosen = fastest(weights, most, rows, clock)
            found[tuned.name_of(device), width, most] = chosen
            print(f"{width} bits, up to {rows[-1]} rows: {chosen}", flush=True)
    return found


def gpu_clock(device: torch.device) -> Clock:
    """The GPU's own time, with caches that hold nothing of the weight."""
    flushed = torch.empty(256 << 20, dtype=torch.uint8, device=device)

    def clock(call: Callable[[], None]) -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flushed.zero_()
        start.record()
        call()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3

    return clock


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put it into tuned.json")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no GPU is here that torch can use")
    device = torch.device("cuda", torch.cuda.current_device())
    found = tune(device, BITS, SHAPES, gpu_clock(device))
    if arguments.write:
        tuned.write(tuned.FILE, tuned.read(tuned.FILE) | found)


if __name__ == "__main__":
    main()

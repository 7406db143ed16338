"""Sizes of tiles by device: data, read by the launchers.

What a tile has no say in is a result's bits: spans and chunks are fixed (`grouped.py`), and tiles
are those of CANDIDATES, of which `tests/triton/test_tuned.py` holds that all give the same. What
was measured on a device lies in `tuned.json`, which `benchmarks/tune_gpu.py --write` makes; every
other device takes `DEFAULT`, which was chosen by what compiles on all architectures with next to
no spilled registers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from functools import cache
from pathlib import Path

import torch


@dataclass(frozen=True, slots=True)
class Tile:
    n: int
    """Rows of the weight."""
    m: int
    """Rows of activations."""
    warps: int
    stages: int


ROWS = (16, 64, 1 << 62)
"""Buckets: up to so many rows of activations."""

DEFAULT: dict[int, Tile] = {
    16: Tile(64, 16, 4, 3),
    64: Tile(64, 64, 4, 3),
    1 << 62: Tile(128, 64, 8, 2),
}
CANDIDATES: dict[int, tuple[Tile, ...]] = {
    16: (
        *(Tile(64, 16, 4, stages) for stages in (2, 3, 4)),
        Tile(128, 16, 4, 3),
        Tile(128, 16, 8, 3),
    ),
    64: (
        *(Tile(64, 64, 4, stages) for stages in (2, 3, 4)),
        Tile(64, 32, 4, 3),
        Tile(128, 64, 8, 2),
    ),
    1 << 62: (
        *(Tile(128, 64, 8, stages) for stages in (2, 3)),
        Tile(64, 64, 4, 3),
        Tile(128, 128, 8, 2),
    ),
}
"""What may be measured, by bucket. 64 rows of the weight for each four warps, or more: fewer have
another instruction on compute capability 9.0, and so perhaps other bits."""

FLOAT32 = Tile(32, 16, 4, 2)
"""For fp32, which has no tensor cores: every product is in the registers of a thread."""

ENOUGH_PROGRAMS = 512
"""More than any GPU here runs at once: from here on a program adds up all spans itself."""

FILE = Path(__file__).with_name("tuned.json")

Measured = dict[tuple[str, int, int], Tile]
"""(name of the device, bits, bucket) → tile."""


def read(path: Path) -> Measured:
    """{name: {bits: {bucket: [n, m, warps, stages]}}}; "more" is the last bucket. Raises ValueError
    for a tile that is not among the candidates: what it does to bits is not known."""
    found: Measured = {}
    for name, by_bits in json.loads(path.read_text()).items():
        for bits, by_bucket in by_bits.items():
            for written, sizes in by_bucket.items():
                most = ROWS[-1] if written == "more" else int(written)
                chosen = Tile(*sizes)
                if chosen not in CANDIDATES.get(most, ()):
                    raise ValueError(f"{path}: {name}, {bits} bits, {written} rows: {sizes}")
                found[name, int(bits), most] = chosen
    return found


def write(path: Path, measured: Mapping[tuple[str, int, int], Tile]) -> None:
    """What `read` reads."""
    nested: dict[str, dict[str, dict[str, tuple[int, ...]]]] = {}
    for (name, bits, most), chosen in sorted(measured.items()):
        by_bucket = nested.setdefault(name, {}).setdefault(str(bits), {})
        by_bucket["more" if most == ROWS[-1] else str(most)] = astuple(chosen)
    path.write_text(json.dumps(nested, indent=1) + "\n")


MEASURED = read(FILE)
"""Mutated by who measures (`benchmarks/tune_gpu.py`) and by no other."""


def bucket(rows: int) -> int:
    return next(most for most in ROWS if rows <= most)


def tile(device: torch.device, dtype: torch.dtype, bits: int, rows: int) -> Tile:
    """The sizes for a weight of `bits` and so many rows of activations of `dtype`."""
    if dtype == torch.float32:
        return FLOAT32
    most = bucket(rows)
    return MEASURED.get((name_of(device), bits, most), DEFAULT[most])


def rows_of_tile(pairs: int, num_experts: int) -> int:
    """For rows that are dealt to experts: how many a tile has."""
    return ROWS[0] if pairs <= ROWS[0] * num_experts else ROWS[1]


@cache
def name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type

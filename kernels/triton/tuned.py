"""Sizes of tiles by device: data, read by the launchers.

What a tile has no say in is a result's bits: spans and chunks are fixed (`grouped.py`). `MEASURED`
holds what was measured on a device and is empty as long as nothing was; every other device takes
`DEFAULT`, which was chosen by what compiles on all architectures with next to no spilled registers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

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
FLOAT32 = Tile(32, 16, 4, 2)
"""For fp32, which has no tensor cores: every product is in the registers of a thread."""

MEASURED: dict[tuple[str, int, int], Tile] = {}
"""(name of the device, bits, bucket) → tile."""

ENOUGH_PROGRAMS = 512
"""More than any GPU here runs at once: from here on a program adds up all spans itself."""


def bucket(rows: int) -> int:
    return next(most for most in ROWS if rows <= most)


def tile(device: torch.device, dtype: torch.dtype, bits: int, rows: int) -> Tile:
    """The sizes for a weight of `bits` and so many rows of activations of `dtype`."""
    if dtype == torch.float32:
        return FLOAT32
    most = bucket(rows)
    return MEASURED.get((_name(device), bits, most), DEFAULT[most])


def rows_of_tile(pairs: int, num_experts: int) -> int:
    """For rows that are dealt to experts: how many a tile has."""
    return ROWS[0] if pairs <= ROWS[0] * num_experts else ROWS[1]


@cache
def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type

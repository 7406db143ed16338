"""Tiles of rows that go to one expert each: what all products of a mixture of experts share.

How many rows an expert has is known to the GPU only, so the grid is of as many tiles as there may
be at most, and those too many end at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quantd.kernels.triton import tuned
from quantd.kernels.triton.routing import ExpertRows
from quantd.kernels.triton.variant import Variant

_ORDER_BLOCK = 256


@triton.jit
def rows_of_tile(
    order,
    tile_expert,
    tile_start,
    tile_stop,
    experts,
    divisor,
    GATHER: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """The tile's expert (`experts` for none), its places, which of them are there, and the rows of
    x that are read."""
    tile = tl.program_id(1)
    expert = tl.minimum(tl.load(tile_expert + tile), experts)
    place = tl.load(tile_start + tile) + tl.arange(0, BLOCK_M)
    inside = (place < tl.load(tile_stop + tile)) & (expert < experts)
    row = place.to(tl.int64)
    if GATHER:
        row = tl.load(order + place, mask=inside, other=0) // divisor
    return expert, place.to(tl.int64), inside, row


@triton.jit
def _reorder_kernel(
    x,
    order,
    tile_expert,
    tile_start,
    tile_stop,
    column_order,  # int64 [experts, columns], -1 for a column of zeros
    out,  # [pairs, columns]
    experts,
    divisor,
    columns,
    x_stride,
    GATHER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    expert, place, inside, row = rows_of_tile(
        order, tile_expert, tile_start, tile_stop, experts, divisor, GATHER, BLOCK_M
    )
    if expert < experts:
        k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
        k_inside = k < columns
        orders = column_order + expert.to(tl.int64) * columns
        source = tl.load(orders + k, mask=k_inside, other=-1)
        read = tl.load(
            x + row[:, None] * x_stride + source[None, :],
            mask=inside[:, None] & (source >= 0)[None, :],
            other=0.0,
        )
        tl.store(
            out + place[:, None] * columns + k[None, :],
            read,
            mask=inside[:, None] & k_inside[None, :],
        )


def lists(rows: ExpertRows) -> tuple[torch.Tensor, ...]:
    return rows.order, rows.expert, rows.start, rows.stop


def reorder(
    x: torch.Tensor, column_order: torch.Tensor, rows: ExpertRows, gather: bool
) -> torch.Tensor:
    """The columns of each pair's row as its expert's codes lie -> [pairs, columns]."""
    experts, columns = column_order.shape
    out = x.new_empty(rows.order.numel(), columns)
    _reorder_kernel[(triton.cdiv(columns, _ORDER_BLOCK), len(rows.expert))](
        x,
        *lists(rows),
        column_order,
        out,
        experts,
        rows.top_k,
        columns,
        x.stride(0),
        GATHER=gather,
        BLOCK_M=rows.tile,
        BLOCK_K=_ORDER_BLOCK,
    )
    return out


TENSOR_CORES = {80: r"mma\.sync", 90: r"wgmma\.mma_async", 120: r"mma\.sync"}
LISTS = {"order": "*i64"} | dict.fromkeys(("tile_expert", "tile_start", "tile_stop"), "*i32")


_SIXTEENS = ("width", "columns", "x_stride", "stride", "expert_words", "expert_scales")
"""Integers that are multiples of 16, of models at least."""


def variant(
    name: str,
    kernel: object,
    sizes: tuned.Tile,
    types: dict[str, str],
    constants: dict[str, object],
    ints: tuple[str, ...],
) -> Variant:
    types = types | LISTS | dict.fromkeys(("experts", "divisor", *ints), "i32")
    pointers = tuple(argument for argument, type_ in types.items() if type_.startswith("*"))
    return Variant(
        f"experts {name} tile {sizes.m}",
        kernel,
        types,
        constants | {"GATHER": True, "BLOCK_M": sizes.m},
        num_warps=sizes.warps,
        num_stages=sizes.stages,
        aligned=(*pointers, *(argument for argument in _SIXTEENS if argument in types)),
        instructions=TENSOR_CORES,
        spill_limit=64,
    )


def sizes_of(tile: int) -> tuned.Tile:
    return tuned.tile(torch.device("cpu"), torch.float16, 16, tile)


VARIANTS = (
    Variant(
        "experts reorder",
        _reorder_kernel,
        {"x": "*bf16", "column_order": "*i64", "out": "*bf16"}
        | LISTS
        | dict.fromkeys(("experts", "divisor", "columns", "x_stride"), "i32"),
        {"GATHER": True, "BLOCK_M": 64, "BLOCK_K": _ORDER_BLOCK},
        aligned=("x", "column_order", "out", *LISTS, "columns", "x_stride"),
    ),
)

"""int8 by int8 for a mixture of experts on a GPU: exact sums, as in `w8a8.py` for one weight."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quantd.kernels.triton import tuned
from quantd.kernels.triton.expert_tiles import lists, rows_of_tile, sizes_of, variant
from quantd.kernels.triton.routing import ExpertRows
from quantd.kernels.triton.variant import Variant
from quantd.kernels.triton.w8a8 import BytePart

_BYTE_K = 128


@triton.jit
def _byte_kernel(
    x,  # int8 [*, columns], padded with zeros to a multiple of 16
    x_scale,  # fp32 [*]
    order,
    tile_expert,
    tile_start,
    tile_stop,
    weight,  # int8 [experts, width, columns]
    weight_scale,  # fp32 [experts, width]
    out,
    experts,
    divisor,
    width,
    columns,
    GATHER: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    expert, place, inside, row = rows_of_tile(
        order, tile_expert, tile_start, tile_stop, experts, divisor, GATHER, BLOCK_M
    )
    if expert < experts:
        n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
        n_inside = n < width
        n_of_all = expert.to(tl.int64) * width + n
        total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32)
        for start in range(0, columns, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            left = tl.load(
                weight + n_of_all[:, None] * columns + k[None, :],
                mask=n_inside[:, None] & (k < columns)[None, :],
                other=0,
            )
            right = tl.load(
                x + row[None, :] * columns + k[:, None],
                mask=inside[None, :] & (k < columns)[:, None],
                other=0,
            )
            total = tl.dot(left, right, total, out_dtype=tl.int32)
        sums = total.to(tl.float32)
        sums *= tl.load(x_scale + row, mask=inside, other=0.0)[None, :]
        sums *= tl.load(weight_scale + n_of_all, mask=n_inside, other=0.0)[:, None]
        tl.store(
            out + place[None, :] * width + n[:, None],
            sums.to(out.dtype.element_ty),
            mask=inside[None, :] & n_inside[:, None],
        )


def multiply_bytes(
    codes: torch.Tensor,
    scale: torch.Tensor,
    part: BytePart,
    rows: ExpertRows,
    out: torch.Tensor,
    gather: bool,
) -> None:
    experts, width, columns = part.data.shape
    sizes = tuned.tile(codes.device, torch.float16, 8, rows.tile)
    _byte_kernel[(triton.cdiv(width, sizes.n), len(rows.expert))](
        codes,
        scale,
        *lists(rows),
        part.data,
        part.scale,
        out,
        experts,
        rows.top_k,
        width,
        columns,
        GATHER=gather,
        BLOCK_N=sizes.n,
        BLOCK_M=rows.tile,
        BLOCK_K=_BYTE_K,
        num_warps=sizes.warps,
        num_stages=sizes.stages,
    )


def _byte_variant(tile: int) -> Variant:
    sizes = sizes_of(tile)
    types = {"x": "*i8", "weight": "*i8", "out": "*bf16"}
    types |= dict.fromkeys(("x_scale", "weight_scale"), "*fp32")
    constants: dict[str, object] = {"BLOCK_N": sizes.n, "BLOCK_K": _BYTE_K}
    return variant("w8a8", _byte_kernel, sizes, types, constants, ("width", "columns"))


VARIANTS = (_byte_variant(16), _byte_variant(64))

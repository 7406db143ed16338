"""Products of a mixture of experts on a GPU: a row times the dense or grouped weight of its expert.

A row's product with a grouped weight is that of `grouped_kernel` for a single weight: the same
spans in the same order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quantd.kernels.triton import tuned
from quantd.kernels.triton.expert_tiles import lists, rows_of_tile, sizes_of, variant
from quantd.kernels.triton.grouped import (
    DTYPES,
    SPAN,
    SPAN_BLOCKS,
    format_constants,
    format_types,
    span_product,
    value_arguments,
)
from quantd.kernels.triton.grouped_layout import PackedPart
from quantd.kernels.triton.routing import ExpertRows
from quantd.kernels.triton.variant import Variant

_DENSE_K = 64


@triton.jit
def _packed_kernel(
    x,
    x_scale,  # fp32 [rows of x] or None: what the codes in x are multiplied by
    order,
    tile_expert,
    tile_start,
    tile_stop,
    low,
    high,
    scale,
    offset,
    out,  # [pairs, width]
    experts,
    divisor,  # pairs to a row of x
    width,
    columns,
    groups,
    spans,
    x_stride,
    stride,
    expert_words,  # of a plane
    expert_scales,
    zero,
    table0,
    table1,
    table2,
    table3,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    DTYPE: tl.constexpr,
    GATHER: tl.constexpr,
    SPAN_BLOCKS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    expert, place, inside, row = rows_of_tile(
        order, tile_expert, tile_start, tile_stop, experts, divisor, GATHER, BLOCK_M
    )
    if expert < experts:
        n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
        n_inside = n < width
        blocks = tl.cdiv(columns, 128)
        number = expert.to(tl.int64)
        low += number * expert_words
        scale += number * expert_scales
        if HIGH:
            high += number * expert_words
        if HAS_OFFSET:
            offset += number * expert_scales
        total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
        for span in range(0, spans):
            total += span_product(
                x,
                row * x_stride,
                inside,
                low,
                high,
                scale,
                offset,
                n,
                n_inside,
                span * SPAN_BLOCKS,
                tl.minimum(span * SPAN_BLOCKS + SPAN_BLOCKS, blocks),
                columns,
                groups,
                stride,
                zero,
                table0,
                table1,
                table2,
                table3,
                LOW,
                HIGH,
                GROUP,
                HAS_TABLE,
                HAS_OFFSET,
                DTYPE,
                BLOCK_N,
                BLOCK_M,
            )
        if x_scale is not None:
            total *= tl.load(x_scale + row, mask=inside, other=0.0)[None, :]
        tl.store(
            out + place[None, :] * width + n[:, None],
            total.to(out.dtype.element_ty),
            mask=inside[None, :] & n_inside[:, None],
        )


@triton.jit
def _dense_kernel(
    x,
    order,
    tile_expert,
    tile_start,
    tile_stop,
    weight,  # [experts, width, columns]
    out,
    experts,
    divisor,
    width,
    columns,
    x_stride,
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
        weight += expert.to(tl.int64) * width * columns
        total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
        for start in range(0, columns, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            left = tl.load(
                weight + n[:, None] * columns + k[None, :],
                mask=n_inside[:, None] & (k < columns)[None, :],
                other=0.0,
            )
            right = tl.load(
                x + row[None, :] * x_stride + k[:, None],
                mask=inside[None, :] & (k < columns)[:, None],
                other=0.0,
            )
            total = tl.dot(left, right, total, input_precision="ieee", out_dtype=tl.float32)
        tl.store(
            out + place[None, :] * width + n[:, None],
            total.to(out.dtype.element_ty),
            mask=inside[None, :] & n_inside[:, None],
        )


def multiply_dense(
    x: torch.Tensor, weight: torch.Tensor, rows: ExpertRows, out: torch.Tensor, gather: bool
) -> None:
    experts, width, columns = weight.shape
    sizes = tuned.tile(x.device, x.dtype, 16, rows.tile)
    _dense_kernel[(triton.cdiv(width, sizes.n), len(rows.expert))](
        x,
        *lists(rows),
        weight,
        out,
        experts,
        rows.top_k,
        width,
        columns,
        x.stride(0),
        GATHER=gather,
        BLOCK_N=sizes.n,
        BLOCK_M=rows.tile,
        BLOCK_K=_DENSE_K,
        num_warps=sizes.warps,
        num_stages=sizes.stages,
    )


def multiply_packed(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    part: PackedPart,
    rows: ExpertRows,
    out: torch.Tensor,
    gather: bool,
) -> None:
    """x: as `grouped_matmul` takes it, int8 with x_scale or else a float."""
    dtype = x.dtype
    if dtype == torch.int8:
        dtype = torch.float32 if out.dtype == torch.float32 else torch.float16
    sizes = tuned.tile(x.device, dtype, part.bits, rows.tile)
    _packed_kernel[(triton.cdiv(part.rows, sizes.n), len(rows.expert))](
        x,
        x_scale,
        *lists(rows),
        part.low,
        part.high,
        part.scale,
        part.offset,
        out,
        len(part.low),
        rows.top_k,
        part.rows,
        part.columns,
        part.scale.shape[1],
        triton.cdiv(part.columns, SPAN),
        x.stride(0),
        part.low.shape[3],
        part.low[0].numel(),
        part.scale[0].numel(),
        **value_arguments(part),
        **format_constants(part, part.scale.shape[1]),
        DTYPE=DTYPES[dtype],
        GATHER=gather,
        SPAN_BLOCKS=SPAN_BLOCKS,
        BLOCK_N=sizes.n,
        BLOCK_M=rows.tile,
        num_warps=sizes.warps,
        num_stages=sizes.stages,
    )


def _dense_variant(dtype: str, tile: int) -> Variant:
    sizes = sizes_of(tile)
    return variant(
        f"{dtype} dense",
        _dense_kernel,
        sizes,
        {"x": f"*{dtype}", "weight": f"*{dtype}", "out": f"*{dtype}"},
        {"BLOCK_N": sizes.n, "BLOCK_K": _DENSE_K},
        ("width", "columns", "x_stride"),
    )


def _packed_variant(x: str, tile: int, bits: int, group: int, kind: str) -> Variant:
    sizes = sizes_of(tile)
    types, constants = format_types(bits, group, kind, "fp16")
    multiplied = "bf16" if x == "bf16" else "fp16"
    types |= {"x": f"*{x}", "out": f"*{multiplied}"}
    if x == "i8":
        types["x_scale"] = "*fp32"
    else:
        constants["x_scale"] = None
    constants |= {"DTYPE": tl.bfloat16 if x == "bf16" else tl.float16, "SPAN_BLOCKS": SPAN_BLOCKS}
    return variant(
        f"{x} {bits} bits {kind} of {group}",
        _packed_kernel,
        sizes,
        types,
        constants | {"BLOCK_N": sizes.n},
        ("width", "columns", "spans", "x_stride", "expert_words", "expert_scales"),
    )


VARIANTS = (
    _dense_variant("bf16", 16),
    _dense_variant("fp16", 64),
    _packed_variant("bf16", 16, 4, 32, "table"),
    _packed_variant("bf16", 64, 4, 128, "center"),
    _packed_variant("bf16", 16, 6, 16, "center"),
    _packed_variant("i8", 64, 4, 128, "center"),
)

"""A mixture of experts on a GPU: products for all experts at once, and their weighted sum.

How many rows an expert has is known to the GPU only, so the grid is of as many tiles as there may
be at most, and those too many end at once. A row's product is that of `grouped_kernel` for a single
weight: the same spans in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from quantd.kernels.cpu.grouped import GroupedWeight
from quantd.kernels.cpu.linear import LinearWeight
from quantd.kernels.triton import tuned
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
from quantd.kernels.triton.routing import ExpertRows, plan_rows
from quantd.kernels.triton.variant import Variant

_DENSE_K = 64
_COMBINE_BLOCK = 1024


@dataclass(frozen=True, slots=True)
class DenseExperts:
    """Weights [experts, N, K] of all experts, contiguous."""

    data: torch.Tensor

    @property
    def count(self) -> int:
        return self.data.shape[0]

    @property
    def rows(self) -> int:
        return self.data.shape[1]


@dataclass(frozen=True, slots=True)
class PackedExperts:
    """One grouped weight for each expert, of one format and without an order."""

    part: PackedPart
    """Its tensors have one more dimension, in front: the experts."""

    @property
    def count(self) -> int:
        return self.part.low.shape[0]

    @property
    def rows(self) -> int:
        return self.part.rows


ExpertWeights = DenseExperts | PackedExperts


@triton.jit
def _rows_of_tile(
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
def _packed_kernel(
    x,
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
    expert, place, inside, row = _rows_of_tile(
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
    expert, place, inside, row = _rows_of_tile(
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


@triton.jit
def _combine_kernel(
    parts,  # [pairs, width]
    places,  # int64 [rows, top_k]
    order,  # int64 [pairs]
    weights,  # fp32 [rows, top_k]
    out,  # [rows, width]
    width,
    top_k,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < width
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for i in range(top_k):
        place = tl.load(places + row * top_k + i)
        part = tl.load(parts + place * width + n, mask=inside, other=0.0).to(tl.float32)
        total += part * tl.load(weights + tl.load(order + place))
    tl.store(out + row * width + n, total.to(out.dtype.element_ty), mask=inside)


def feed_forward(
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    gate_up: ExpertWeights,
    down: ExpertWeights,
    act: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """x [T, hidden] through the experts that route_experts chose -> [T, hidden]: the sum over them
    of weight * down(act(gate_up(x))). act: [pairs, 2I] -> [pairs, I]. T > 0."""
    rows = plan_rows(ids, gate_up.count)
    inner = act(expert_matmul(x, gate_up, rows, gather=True))
    return combine(expert_matmul(inner, down, rows, gather=False), weights, rows)


def stack_experts(weights: Sequence[GroupedWeight | LinearWeight]) -> ExpertWeights:
    """The weights of all experts, in order of their ids, as they are multiplied at once. Copies
    them. Raises ValueError where they do not agree in format and shape."""
    dense = [w.data for w in weights if isinstance(w, LinearWeight) and w.route == "torch"]
    if len(dense) == len(weights):
        return DenseExperts(torch.stack(dense))
    alone = [
        w.gpu_parts[0] for w in weights if isinstance(w, GroupedWeight) and len(w.gpu_parts) == 1
    ]
    packed = [part for part in alone if isinstance(part, PackedPart)]
    if len(packed) != len(weights):
        raise ValueError("the weights of experts must be dense, or one grouped part each")
    return stack_packed(packed)


def stack_packed(parts: Sequence[PackedPart]) -> PackedExperts:
    """One part for each expert; all of one format and shape, without an order. Copies them."""
    first = parts[0]
    if any(not part.joins(first) or part.rows != first.rows for part in parts):
        raise ValueError("the weights of experts must agree in format and shape")
    if first.order is not None or first.per_row:
        raise ValueError("the weights of experts can have no order and no activations of 8 bits")
    high = [part.high for part in parts if part.high is not None]
    offset = [part.offset for part in parts if part.offset is not None]
    return PackedExperts(
        replace(
            first,
            low=torch.stack([part.low for part in parts]),
            high=torch.stack(high) if high else None,
            scale=_stack_widest([part.scale for part in parts]),
            offset=_stack_widest(offset) if offset else None,
        )
    )


def _stack_widest(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """In fp32 where one is."""
    wide = max((tensor.dtype for tensor in tensors), key=lambda dtype: dtype.itemsize)
    return torch.stack([tensor.to(wide) for tensor in tensors])


def expert_matmul(
    x: torch.Tensor, weights: ExpertWeights, rows: ExpertRows, *, gather: bool
) -> torch.Tensor:
    """Each pair's row of x times its expert's weight transposed -> [pairs, N] of x's dtype, in the
    plan's order. gather: x [T, K] holds the rows that were routed; else x [pairs, K] is in the
    plan's order already."""
    pairs, tile = rows.order.numel(), rows.tile
    out = x.new_empty(pairs, weights.rows)
    x = x if x.stride(1) == 1 else x.contiguous()
    lists = (rows.order, rows.expert, rows.start, rows.stop)
    if isinstance(weights, DenseExperts):
        experts, width, columns = weights.data.shape
        sizes = tuned.tile(x.device, x.dtype, 16, tile)
        _dense_kernel[(triton.cdiv(width, sizes.n), len(rows.expert))](
            x,
            *lists,
            weights.data,
            out,
            experts,
            rows.top_k,
            width,
            columns,
            x.stride(0),
            GATHER=gather,
            BLOCK_N=sizes.n,
            BLOCK_M=tile,
            BLOCK_K=_DENSE_K,
            num_warps=sizes.warps,
            num_stages=sizes.stages,
        )
        return out
    part = weights.part
    sizes = tuned.tile(x.device, x.dtype, part.bits, tile)
    _packed_kernel[(triton.cdiv(part.rows, sizes.n), len(rows.expert))](
        x,
        *lists,
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
        DTYPE=DTYPES[x.dtype],
        GATHER=gather,
        SPAN_BLOCKS=SPAN_BLOCKS,
        BLOCK_N=sizes.n,
        BLOCK_M=tile,
        num_warps=sizes.warps,
        num_stages=sizes.stages,
    )
    return out


def combine(parts: torch.Tensor, weights: torch.Tensor, rows: ExpertRows) -> torch.Tensor:
    """parts [pairs, H] in the plan's order, weights fp32 [T, top_k] as they were routed -> [T, H]:
    each row's weighted sum, in fp32 in order of its experts' ids, rounded once."""
    (count, top_k), width = weights.shape, parts.shape[1]
    out = parts.new_empty(count, width)
    _combine_kernel[(triton.cdiv(width, _COMBINE_BLOCK), count)](
        parts, rows.places, rows.order, weights, out, width, top_k, BLOCK_N=_COMBINE_BLOCK
    )
    return out


_TENSOR_CORES = {80: r"mma\.sync", 90: r"wgmma\.mma_async", 120: r"mma\.sync"}
_LISTS = {"order": "*i64"} | dict.fromkeys(("tile_expert", "tile_start", "tile_stop"), "*i32")


def _product_variant(dtype: str, tile: int, packed: tuple[int, int, str] | None) -> Variant:
    torch_dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    sizes = tuned.tile(torch.device("cpu"), torch_dtype, 16, tile)
    types = {"x": f"*{dtype}", "out": f"*{dtype}"} | _LISTS
    ints = ["experts", "divisor", "width", "columns", "x_stride"]
    constants: dict[str, object] = {"GATHER": True, "BLOCK_N": sizes.n, "BLOCK_M": tile}
    if packed is None:
        types["weight"] = f"*{dtype}"
        constants["BLOCK_K"] = _DENSE_K
    else:
        of_format, more = format_types(*packed, "fp16")
        types |= of_format
        constants |= more | {"DTYPE": DTYPES[torch_dtype], "SPAN_BLOCKS": SPAN_BLOCKS}
        ints += ["spans", "expert_words", "expert_scales"]
    types |= dict.fromkeys(ints, "i32")
    aligned = [name for name, type_ in types.items() if type_.startswith("*")]
    aligned += [name for name in ("width", "columns", "x_stride", "stride") if name in types]
    return Variant(
        f"experts {dtype} {packed or 'dense'} tile {tile}",
        _dense_kernel if packed is None else _packed_kernel,
        types,
        constants,
        num_warps=sizes.warps,
        num_stages=sizes.stages,
        aligned=(*aligned, *(name for name in ("expert_words", "expert_scales") if name in types)),
        instructions=_TENSOR_CORES,
        spill_limit=64,
    )


VARIANTS = (
    Variant(
        "combine experts",
        _combine_kernel,
        {"parts": "*bf16", "places": "*i64", "order": "*i64", "weights": "*fp32", "out": "*bf16"}
        | dict.fromkeys(("width", "top_k"), "i32"),
        {"BLOCK_N": _COMBINE_BLOCK},
        aligned=("parts", "places", "order", "weights", "out", "width"),
    ),
    _product_variant("bf16", 16, None),
    _product_variant("fp16", 64, None),
    _product_variant("bf16", 16, (4, 32, "table")),
    _product_variant("bf16", 64, (4, 128, "center")),
    _product_variant("bf16", 16, (6, 16, "center")),
)

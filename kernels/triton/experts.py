"""A mixture of experts on a GPU: all at once, and their weighted sum. Nothing is read back."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from quantd.kernels.cpu.linear import LinearWeight
from quantd.kernels.experts import StackedWeight
from quantd.kernels.triton.expert_bytes import multiply_bytes
from quantd.kernels.triton.expert_products import multiply_dense, multiply_packed
from quantd.kernels.triton.expert_tiles import reorder
from quantd.kernels.triton.routing import ExpertRows, plan_rows
from quantd.kernels.triton.variant import Variant
from quantd.kernels.triton.w8a8 import BytePart, quantize_rows

_COMBINE_BLOCK = 1024


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
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
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
    gate_up: StackedWeight,
    down: StackedWeight,
    act: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """x [T, hidden] through the experts that route_experts chose -> [T, hidden]: the sum over them
    of weight * down(act(gate_up(x))). act: [pairs, 2I] -> [pairs, I]. T > 0."""
    rows = plan_rows(ids, gate_up.count)
    inner = act(expert_matmul(x, gate_up, rows, gather=True))
    return combine(expert_matmul(inner, down, rows, gather=False), weights, rows)


def expert_matmul(
    x: torch.Tensor, weights: StackedWeight, rows: ExpertRows, *, gather: bool
) -> torch.Tensor:
    """Each pair's row of x times its expert's weight transposed -> [pairs, N] of x's dtype, in the
    plan's order. gather: x [T, K] holds the rows that were routed; else x [pairs, K] is in the
    plan's order already."""
    out = x.new_empty(rows.order.numel(), weights.rows)
    x = x if x.stride(1) == 1 else x.contiguous()
    part = weights.part
    if isinstance(part, LinearWeight):
        multiply_dense(x, part.data, rows, out, gather)
    elif isinstance(part, BytePart):
        multiply_bytes(*quantize_rows(x), part, rows, out, gather)
    else:
        if part.order is not None:
            x, gather = reorder(x, part.order, rows, gather), False
        read, scale = quantize_rows(x) if part.per_row else (x, None)
        multiply_packed(read, scale, part, rows, out, gather)
    return out


def combine(parts: torch.Tensor, weights: torch.Tensor, rows: ExpertRows) -> torch.Tensor:
    """parts [pairs, H] in the plan's order, weights fp32 [T, top_k] as they were routed -> [T, H]:
    each row's weighted sum, in fp32 in order of its experts' ids, rounded once."""
    (count, top_k), width = weights.shape, parts.shape[1]
    out = parts.new_empty(count, width)
    _combine_kernel[(count, triton.cdiv(width, _COMBINE_BLOCK))](
        parts, rows.places, rows.order, weights, out, width, top_k, BLOCK_N=_COMBINE_BLOCK
    )
    return out


VARIANTS = (
    Variant(
        "combine experts",
        _combine_kernel,
        {"parts": "*bf16", "places": "*i64", "order": "*i64", "weights": "*fp32", "out": "*bf16"}
        | dict.fromkeys(("width", "top_k"), "i32"),
        {"BLOCK_N": _COMBINE_BLOCK},
        aligned=("parts", "places", "order", "weights", "out", "width"),
    ),
)

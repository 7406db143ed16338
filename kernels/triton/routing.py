"""Routing on a GPU: the experts of each row, and who computes which row. Nothing is read back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from quantd.kernels.triton import tuned
from quantd.kernels.triton.variant import Variant


@dataclass(frozen=True, slots=True)
class ExpertRows:
    """The pairs of a row and an expert of it, in order of experts, in tiles of one expert each."""

    order: torch.Tensor
    """int64 [pairs]: which pair is at a place, counted as in ids [T, top_k]."""
    places: torch.Tensor
    """int64 [T, top_k]: where a row's pairs are, in order of experts."""
    expert: torch.Tensor
    """int32 [tiles]: whose a tile is; beyond all experts for a tile too many."""
    start: torch.Tensor
    """int32 [tiles]: the place of its first row."""
    stop: torch.Tensor
    """int32 [tiles]: the place after the last row of its expert."""
    tile: int
    """Rows of a tile, a power of two."""
    top_k: int


@triton.jit
def _route_kernel(
    logits,  # [rows, experts]
    weights,  # fp32 [rows, top_k]
    ids,  # int64 [rows, top_k]
    experts,
    top_k,
    stride,
    SOFTMAX_BEFORE: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    EXPERTS: tl.constexpr,  # powers of two, at least as many
    TOP_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    expert, slot = tl.arange(0, EXPERTS), tl.arange(0, TOP_K)
    inside = expert < experts
    logit = tl.load(logits + row * stride + expert, mask=inside, other=-float("inf")).to(tl.float32)
    # The order of floats as one of integers: a NaN above all, zeros alike; then the lower id first.
    plain = tl.where(logit == 0, 0.0, logit)
    bits = plain.to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    bits = tl.where(logit != logit, 0x7FFFFFFF, bits)
    rank = bits.to(tl.int64) * 65536 + (65535 - expert)
    taken = tl.full((EXPERTS,), -(2**62), dtype=tl.int64)
    rank = tl.where(inside, rank, taken)
    chosen = tl.full((TOP_K,), -float("inf"), dtype=tl.float32)
    chosen_id = tl.zeros((TOP_K,), dtype=tl.int64)
    for i in range(top_k):
        best = tl.max(rank, axis=0)
        found = 65535 - (best & 65535)
        value = tl.sum(tl.where(expert == found, logit, 0.0), axis=0)
        chosen = tl.where(slot == i, value, chosen)
        chosen_id = tl.where(slot == i, found, chosen_id)
        rank = tl.where(expert == found, taken, rank)
    there = slot < top_k
    spoilt = tl.sum((logit != logit).to(tl.int32), axis=0) > 0
    if SOFTMAX_BEFORE:
        most = tl.max(logit, axis=0)
        share = tl.where(there, tl.exp(chosen - most), 0.0)
        share /= tl.sum(tl.exp(logit - most), axis=0)
        if RENORMALIZE:
            share /= tl.sum(share, axis=0)
    else:
        share = tl.where(there, tl.exp(chosen - tl.max(chosen, axis=0)), 0.0)
        share /= tl.sum(share, axis=0)
        spoilt = tl.sum((chosen != chosen).to(tl.int32), axis=0) > 0
    share = tl.where(spoilt, float("nan"), share)
    tl.store(weights + row * top_k + slot, share, mask=there)
    tl.store(ids + row * top_k + slot, chosen_id, mask=there)


def route_experts(
    logits: torch.Tensor, top_k: int, *, softmax_before: bool, renormalize: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """As the reference: the same ids; weights may differ in their last bits. Of at most 65536
    experts."""
    rows, experts = logits.shape
    if not 1 <= top_k <= experts:
        raise ValueError(f"top_k is {top_k}, must be in [1, {experts}]")
    weights = torch.empty(rows, top_k, dtype=torch.float32, device=logits.device)
    ids = torch.empty(rows, top_k, dtype=torch.int64, device=logits.device)
    if rows:
        _route_kernel[(rows,)](
            logits,
            weights,
            ids,
            experts,
            top_k,
            logits.stride(0),
            SOFTMAX_BEFORE=softmax_before,
            RENORMALIZE=renormalize,
            EXPERTS=triton.next_power_of_2(experts),
            TOP_K=triton.next_power_of_2(top_k),
            num_warps=1,
        )
    return weights, ids


def plan_rows(ids: torch.Tensor, num_experts: int) -> ExpertRows:
    """Of ids int64 [T, top_k], T > 0, each below num_experts. Reads nothing back from the GPU."""
    (rows, top_k), device = ids.shape, ids.device
    pairs = rows * top_k
    tile = tuned.rows_of_tile(pairs, num_experts)
    flat = ids.flatten()
    order = flat.sort(stable=True).indices
    places = torch.empty_like(order).scatter_(0, order, torch.arange(pairs, device=device))
    counts = torch.zeros(num_experts, dtype=torch.int64, device=device)
    counts.scatter_add_(0, flat, torch.ones_like(flat))
    tiles = (counts + tile - 1) // tile
    last_tile, last_row = tiles.cumsum(0), counts.cumsum(0)
    most = pairs // tile + min(num_experts, pairs)
    number = torch.arange(most, device=device)
    expert = torch.searchsorted(last_tile, number, right=True)
    there = expert.clamp(max=num_experts - 1)
    start = last_row[there] - counts[there] + (number - last_tile[there] + tiles[there]) * tile
    return ExpertRows(
        order,
        places.view(rows, top_k).sort(dim=1).values,
        expert.int(),
        start.int(),
        last_row[there].int(),
        tile,
        top_k,
    )


VARIANTS = (
    Variant(
        "route experts",
        _route_kernel,
        {"logits": "*bf16", "weights": "*fp32", "ids": "*i64"}
        | dict.fromkeys(("experts", "top_k", "stride"), "i32"),
        {"SOFTMAX_BEFORE": True, "RENORMALIZE": True, "EXPERTS": 128, "TOP_K": 8},
        num_warps=1,
        aligned=("logits", "weights", "ids", "experts"),
    ),
)

"""Routing on a GPU: the experts of each row, and who computes which row. Nothing is read back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from quantd.kernels.triton import tuned
from quantd.kernels.triton.variant import Variant

_PLAN_CHUNK = 1024
"""Pairs that a program looks at at once."""
_LEAST_BINS = 32
_EVEN = 4
"""Numbers of 32 bits in 16 bytes: Triton compiles again for a pointer that is no multiple."""


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


@triton.jit(do_not_specialize=["pairs", "tiles"])
def _plan_kernel(
    ids,  # int64 [pairs]
    order,
    places,
    tile_expert,
    tile_start,
    tile_stop,
    pairs,
    tiles,
    experts,
    top_k,
    TILE: tl.constexpr,
    EXPERTS: tl.constexpr,  # a power of two, at least as many
    CHUNK: tl.constexpr,
):
    """Program e: the pairs of expert e, and its tiles; the one behind the last expert: the tiles
    too many. Each counts for itself how many pairs the experts before it have: programs share
    nothing that is written."""
    mine = tl.program_id(0)
    lane = tl.arange(0, CHUNK)
    counts = tl.zeros((EXPERTS,), dtype=tl.int32)
    for start in range(0, pairs, CHUNK):
        inside = start + lane < pairs
        chosen = tl.load(ids + start + lane, mask=inside, other=0).to(tl.int32)
        counts += tl.histogram(chosen, EXPERTS, mask=inside)
    expert = tl.arange(0, EXPERTS)
    full = (counts + (TILE - 1)) // TILE
    place = tl.sum(tl.where(expert < mine, counts, 0), 0)
    tile = tl.sum(tl.where(expert < mine, full, 0), 0)
    count = tl.sum(tl.where(expert == mine, counts, 0), 0)
    last_tile = tl.where(mine == experts, tiles, tile + tl.cdiv(count, TILE))
    for start in range(tile, last_tile, CHUNK):
        at = start + lane
        inside = at < last_tile
        tl.store(tile_expert + at, tl.zeros((CHUNK,), tl.int32) + mine, mask=inside)
        tl.store(tile_start + at, place + (at - tile) * TILE, mask=inside)
        tl.store(tile_stop + at, tl.zeros((CHUNK,), tl.int32) + place + count, mask=inside)
    if count > 0:
        for start in range(0, pairs, CHUNK):
            at = start + lane
            chosen = tl.load(ids + at, mask=at < pairs, other=-1).to(tl.int32)
            equal = chosen == mine
            here = place + tl.cumsum(equal.to(tl.int32), 0) - 1
            tl.store(order + here, at.to(tl.int64), mask=equal)
            # Among the pairs of its row, how many come before it.
            first = at - at % top_k
            column = tl.zeros((CHUNK,), dtype=tl.int32)
            for i in range(top_k):
                other = tl.load(ids + first + i, mask=equal, other=0).to(tl.int32)
                column += ((other < mine) | ((other == mine) & (first + i < at))).to(tl.int32)
            tl.store(places + first + column, here.to(tl.int64), mask=equal)
            place += tl.sum(equal.to(tl.int32), 0)


def plan_rows(ids: torch.Tensor, num_experts: int) -> ExpertRows:
    """Of ids int64 [T, top_k], T > 0, each below num_experts. Reads nothing back from the GPU."""
    (rows, top_k), device = ids.shape, ids.device
    pairs = rows * top_k
    tile = tuned.rows_of_tile(pairs, num_experts)
    most = pairs // tile + min(num_experts, pairs)
    order = torch.empty(pairs, dtype=torch.int64, device=device)
    places = torch.empty(rows, top_k, dtype=torch.int64, device=device)
    expert, start, stop = torch.empty(3, most + -most % _EVEN, dtype=torch.int32, device=device)
    tiles = (expert[:most], start[:most], stop[:most])
    _plan_kernel[(num_experts + 1,)](
        ids.contiguous(),
        order,
        places,
        *tiles,
        pairs,
        most,
        num_experts,
        top_k,
        TILE=tile,
        EXPERTS=max(_LEAST_BINS, triton.next_power_of_2(num_experts)),
        CHUNK=_PLAN_CHUNK,
        num_warps=4,
    )
    return ExpertRows(order, places, *tiles, tile, top_k)


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
    *(
        Variant(
            f"plan experts' rows, tiles of {tile}",
            _plan_kernel,
            dict.fromkeys(("ids", "order", "places"), "*i64")
            | dict.fromkeys(("tile_expert", "tile_start", "tile_stop"), "*i32")
            | dict.fromkeys(("pairs", "tiles", "experts", "top_k"), "i32"),
            {"TILE": tile, "EXPERTS": experts, "CHUNK": _PLAN_CHUNK},
            aligned=("ids", "order", "places", "tile_expert", "tile_start", "tile_stop"),
        )
        for tile, experts in ((16, 128), (64, _LEAST_BINS), (16, 1024))
    ),
)

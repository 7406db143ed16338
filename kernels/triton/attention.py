"""Paged attention over a ragged batch on a GPU, reading the pools in place.

The order of reduction of a row is fixed by its own position alone, as on a CPU
(`cpu/csrc/attention.h`): keys are cut into spans of SPAN at absolute positions, a span is
taken in tiles of keys at absolute positions, and spans are merged in ascending order. There is one
shape of tile for any number of rows, so that a row's products are those of the same instructions.
Which rows share a tile and whether the spans of a sequence ran side by side decide only where a
partial result lies. A key that a row does not see adds an exact 0 to it.

The grid follows from the shapes alone: nothing here waits for the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quantd.kernels.batch import BLOCK_SIZE, AttentionBatch
from quantd.kernels.triton.fp8 import WIDENED_BY, widen
from quantd.kernels.triton.variant import Variant

SPAN = 512
"""Keys between two merges."""

_ROWS = 64
"""Of a tile: tokens x query heads of a KV head. The tensor core of compute capability 9.0 takes
no fewer at once; decoding waits for memory with this many too."""

_SPLIT_TOKENS = 8
"""A sequence with so few rows may have its spans run side by side."""

_ENOUGH_PROGRAMS = 512
"""With so many of them the spans need not run side by side."""

_PARTIAL_BYTES = 256 << 20
"""That partial results may take; with more, spans run one after another."""

_MERGED_HEADS = 4
_STAGES = 2
_NO_WINDOW = 2**31 - 1
_LOG2E = tl.constexpr(1.4426950408889634)

_BLOCK = tl.constexpr(BLOCK_SIZE)

_OF_THE_BATCH = ["sequences", "tiles", "table_width", "spans", "split_tokens"]
"""Numbers that no kernel is compiled anew for, when one becomes 1 or a multiple of 16."""


@triton.jit
def _sequence_of(tile, query_start, sequences, TOKENS: tl.constexpr):
    """The last sequence whose first tile is at or before `tile`. Sequence s begins at the tile
    query_start[s] // TOKENS + s, which leaves each as many as it can need."""
    low = 0
    high = sequences
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(query_start + middle) // TOKENS + middle <= tile:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def _rows_of(pool, place, present, column, inside, dtype: tl.constexpr, FP8: tl.constexpr):
    """[KEYS, DIM] of a pool, zeros where there is no key."""
    mask = present[:, None] & inside[None, :]
    rows = tl.load(pool + place[:, None] + column[None, :], mask=mask, other=0)
    if FP8:
        rows = widen(rows).to(dtype)
    return rows


@triton.jit
def _merge(best, total, values, part_best, part_total, part_values):
    """The softmax over the keys of both; a part that saw no key changes nothing. Values are not
    yet divided by the total. Products and sums are fused by name: a compiler that chooses could
    choose differently in the two kernels."""
    new = tl.maximum(best, part_best)
    safe = tl.where(new == float("-inf"), 0.0, new)
    keep = tl.exp2(best - safe)
    add = tl.exp2(part_best - safe)
    total = tl.fma(total, keep, part_total * add)
    values = tl.fma(
        values, tl.broadcast_to(keep[:, None], values.shape), part_values * add[:, None]
    )
    return new, total, values


@triton.jit
def _finish(best, total, values, sinks, head, known, value_scale):
    """Takes the sinks into the total and divides."""
    keep = tl.full(best.shape, 1.0, tl.float32)
    if sinks is not None:
        sink = tl.load(sinks + head, mask=known, other=0.0)
        top = tl.maximum(best, sink * _LOG2E)
        keep = tl.exp2(best - top)
        unit = tl.full(sink.shape, _LOG2E, tl.float32)
        total = tl.fma(total, keep, tl.exp2(tl.fma(sink, unit, -top)))
    return values * (keep / tl.where(known, total, 1.0) * value_scale)[:, None]


@triton.jit(do_not_specialize=_OF_THE_BATCH)
def attention_kernel(
    q,  # [T, Hq, HEAD_DIM], strides q_row, q_head, 1
    k_pool,  # [blocks, KV_HEADS, 16, HEAD_DIM]
    v_pool,
    query_start,
    kv_len,
    block_table,  # [sequences, table_width]
    sinks,  # fp32 [Hq] or None
    out,  # [T, Hq, HEAD_DIM]
    part_values,  # fp32 [sequences * split_tokens, spans, Hq, HEAD_DIM]
    part_sums,  # fp32 [sequences * split_tokens, spans, Hq, 2]: highest score, total
    q_row,
    q_head,
    sequences,
    tiles,
    table_width,
    spans,  # of the longest sequence there could be
    split_tokens,  # 0: no spans run side by side
    window,
    scale,  # of a score; with a cap divided by it, else times log2(e)
    softcap,  # times log2(e)
    value_scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,  # query heads of a KV head
    HEADS: tl.constexpr,  # those of a tile
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,  # a power of two, at least HEAD_DIM
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SPAN: tl.constexpr,
    FP8: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """Program (i, j): tile i of the batch, or, from `tiles` on, one span of one sequence."""
    TOKENS: tl.constexpr = ROWS // HEADS
    CHUNKS: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    item = tl.program_id(0)
    kv_head = tl.program_id(1) // CHUNKS
    apart = item >= tiles
    if apart:
        sequence = (item - tiles) // spans
    else:
        sequence = _sequence_of(item, query_start, sequences, TOKENS)
    row = tl.load(query_start + sequence)
    q_len = tl.load(query_start + sequence + 1) - row
    first_token = 0
    if not apart:
        first_token = (item - row // TOKENS - sequence) * TOKENS
    if first_token >= q_len:
        return
    # The tile's tokens stand at [position, stop) and see keys from `start` on.
    position = tl.load(kv_len + sequence) - q_len + first_token
    stop = position + tl.minimum(TOKENS, q_len - first_token)
    start = tl.maximum(0, position - window + 1)
    first_span = start // SPAN
    last_span = (stop - 1) // SPAN
    if apart != ((q_len <= split_tokens) & (first_span < last_span)):
        return
    if apart:
        span = (item - tiles) % spans
        if (span < first_span) | (span > last_span):
            return
        first_span = span
        last_span = span

    r = tl.arange(0, ROWS)
    token = r // HEADS
    in_group = tl.program_id(1) % CHUNKS * HEADS + r % HEADS
    head = kv_head * GROUP + in_group
    used = (position + token < stop) & (in_group < GROUP) & (token < TOKENS)
    column = tl.arange(0, DIM)
    inside = column < HEAD_DIM
    mask = used[:, None] & inside[None, :]
    at = (row + first_token + token).to(tl.int64) * q_row + head.to(tl.int64) * q_head
    query = tl.load(q + at[:, None] + column[None, :], mask=mask, other=0.0)
    last_key = position + token
    first_key = last_key - window + 1
    table = block_table + sequence.to(tl.int64) * table_width

    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    values = tl.zeros([ROWS, DIM], tl.float32)
    for span in range(first_span, last_span + 1):
        part_best = tl.full([ROWS], float("-inf"), tl.float32)
        part_total = tl.zeros([ROWS], tl.float32)
        part = tl.zeros([ROWS, DIM], tl.float32)
        low = tl.maximum(span * SPAN, start // KEYS * KEYS)
        high = tl.minimum(span * SPAN + SPAN, stop)
        for tile_start in range(low, high, KEYS):
            key = tile_start + tl.arange(0, KEYS)
            present = (key >= start) & (key < stop)
            block = tl.load(table + key // _BLOCK, mask=present, other=0).to(tl.int64)
            place = (block * KV_HEADS + kv_head) * (_BLOCK * HEAD_DIM) + key % _BLOCK * HEAD_DIM
            keys = _rows_of(k_pool, place, present, column, inside, query.dtype, FP8)
            score = tl.dot(query, tl.trans(keys), input_precision="ieee") * scale
            if HAS_SOFTCAP:
                shrunk = tl.exp2(tl.abs(score) * (-2.0 * _LOG2E))
                bent = (1.0 - shrunk) / (1.0 + shrunk) * softcap
                score = tl.where(score < 0.0, -bent, bent)
            visible = (key[None, :] <= last_key[:, None]) & (key[None, :] >= first_key[:, None])
            score = tl.where(visible, score, float("-inf"))
            new = tl.maximum(part_best, tl.max(score, 1))
            safe = tl.where(new == float("-inf"), 0.0, new)
            keep = tl.exp2(part_best - safe)
            weight = tl.exp2(score - safe[:, None])
            part_total = tl.fma(part_total, keep, tl.sum(weight, 1))
            part_best = new
            rows = _rows_of(v_pool, place, present, column, inside, query.dtype, FP8)
            part = tl.dot(
                weight.to(query.dtype), rows, part * keep[:, None], input_precision="ieee"
            )
        best, total, values = _merge(best, total, values, part_best, part_total, part)

    if apart:
        line = (sequence.to(tl.int64) * split_tokens + token) * spans + first_span
        line = line * (KV_HEADS * GROUP) + head
        tl.store(part_sums + line * 2, best, mask=used)
        tl.store(part_sums + line * 2 + 1, total, mask=used)
        tl.store(part_values + line[:, None] * HEAD_DIM + column[None, :], values, mask=mask)
    else:
        done = _finish(best, total, values, sinks, head, used, value_scale)
        line = (row + first_token + token).to(tl.int64) * (KV_HEADS * GROUP) + head
        place = out + line[:, None] * HEAD_DIM + column[None, :]
        tl.store(place, done.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_OF_THE_BATCH)
def merge_kernel(
    query_start,
    kv_len,
    sinks,
    out,
    part_values,
    part_sums,
    spans,
    split_tokens,
    window,
    value_scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    SPAN: tl.constexpr,
):
    """Program (i, j): token i % split_tokens of a sequence, HEADS heads from j * HEADS on."""
    sequence = tl.program_id(0) // split_tokens
    token = tl.program_id(0) % split_tokens
    row = tl.load(query_start + sequence)
    q_len = tl.load(query_start + sequence + 1) - row
    keys = tl.load(kv_len + sequence)
    first_span = tl.maximum(0, keys - q_len - window + 1) // SPAN
    last_span = (keys - 1) // SPAN
    if (token >= q_len) | (q_len > split_tokens) | (first_span >= last_span):
        return
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    known = head < KV_HEADS * GROUP
    column = tl.arange(0, DIM)
    mask = known[:, None] & (column < HEAD_DIM)[None, :]
    best = tl.full([HEADS], float("-inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    values = tl.zeros([HEADS, DIM], tl.float32)
    for span in range(first_span, last_span + 1):
        line = tl.program_id(0).to(tl.int64) * spans + span
        line = line * (KV_HEADS * GROUP) + head
        part_best = tl.load(part_sums + line * 2, mask=known, other=0.0)
        part_total = tl.load(part_sums + line * 2 + 1, mask=known, other=0.0)
        place = part_values + line[:, None] * HEAD_DIM + column[None, :]
        part = tl.load(place, mask=mask, other=0.0)
        best, total, values = _merge(best, total, values, part_best, part_total, part)
    done = _finish(best, total, values, sinks, head, known, value_scale)
    line = (row + token).to(tl.int64) * (KV_HEADS * GROUP) + head
    place = out + line[:, None] * HEAD_DIM + column[None, :]
    tl.store(place, done.to(out.dtype.element_ty), mask=mask)


def paged_attention(
    q: torch.Tensor,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    batch: AttentionBatch,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    kv_scale: tuple[float, float] = (1.0, 1.0),
) -> torch.Tensor:
    """As the reference, for q of at most 256 dimensions, a view with a contiguous last one, and
    pools of q's dtype or e4m3."""
    rows, heads, head_dim = q.shape
    kv_heads = k_pool.shape[1]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    sequences, table_width = batch.block_table.shape
    if not rows:
        return out
    spans = -(-table_width * BLOCK_SIZE // SPAN)
    group = heads // kv_heads
    in_tile = min(group, _ROWS)
    chunks = -(-group // in_tile)
    tokens = _ROWS // in_tile
    tiles = rows // tokens + sequences
    split_tokens = _split_tokens(rows, sequences, tokens, kv_heads * chunks, spans, heads, head_dim)
    lines = sequences * split_tokens * spans * heads
    part_values = torch.empty(lines * head_dim, dtype=torch.float32, device=q.device)
    part_sums = torch.empty(lines * 2, dtype=torch.float32, device=q.device)
    fp8 = k_pool.dtype == torch.float8_e4m3fn
    if fp8:
        k_pool, v_pool = k_pool.view(torch.uint8), v_pool.view(torch.uint8)
    unit = 1 / WIDENED_BY.value if fp8 else 1.0
    score_scale, value_scale = scale * kv_scale[0] * unit, kv_scale[1] * unit
    window = _NO_WINDOW if window is None else window
    dim, keys, warps = _shape(head_dim, q.dtype, fp8)
    common = {"KV_HEADS": kv_heads, "GROUP": group, "HEAD_DIM": head_dim, "DIM": dim, "SPAN": SPAN}
    attention_kernel[(tiles + (sequences * spans if split_tokens else 0), kv_heads * chunks)](
        q,
        k_pool,
        v_pool,
        batch.query_start,
        batch.kv_len,
        batch.block_table,
        sinks,
        out,
        part_values,
        part_sums,
        q.stride(0),
        q.stride(1),
        sequences,
        tiles,
        table_width,
        spans,
        split_tokens,
        window,
        score_scale * _LOG2E.value if softcap is None else score_scale / softcap,
        (1.0 if softcap is None else softcap) * _LOG2E.value,
        value_scale,
        HEADS=in_tile,
        ROWS=_ROWS,
        KEYS=keys,
        FP8=fp8,
        HAS_SOFTCAP=softcap is not None,
        num_warps=warps,
        num_stages=_STAGES,
        **common,
    )
    if split_tokens:
        merge_kernel[(sequences * split_tokens, -(-heads // _MERGED_HEADS))](
            batch.query_start,
            batch.kv_len,
            sinks,
            out,
            part_values,
            part_sums,
            spans,
            split_tokens,
            window,
            value_scale,
            HEADS=_MERGED_HEADS,
            num_warps=4,
            **common,
        )
    return out


def _split_tokens(
    rows: int, sequences: int, tokens: int, kv_heads: int, spans: int, heads: int, head_dim: int
) -> int:
    """Rows that a sequence may have for its spans to run side by side; 0: they never do. It
    decides speed and memory alone, no bits."""
    if spans < 2 or sequences * kv_heads >= _ENOUGH_PROGRAMS:
        return 0
    longest = max(1, rows - sequences + 1)  # where each sequence has a row
    affordable = _PARTIAL_BYTES // (sequences * spans * heads * (head_dim + 2) * 4)
    return min(_SPLIT_TOKENS, tokens, longest, affordable)


def _shape(head_dim: int, dtype: torch.dtype, fp8: bool) -> tuple[int, int, int]:
    """Dimensions and keys of a tile, and warps: by the layer alone, never by the batch."""
    dim = max(16, triton.next_power_of_2(head_dim))
    if dtype == torch.float32:
        return dim, 16, 8
    # More keys, or fewer warps, and what the loop needs no longer fits into registers.
    keys = 64 if dim * (2 if fp8 else 1) <= 128 else 32
    return dim, keys, 8 if dim > 128 else 4


_POINTERS = ("q", "k_pool", "v_pool", "query_start", "kv_len", "block_table", "out")
_PARTS = ("part_values", "part_sums")
_NUMBERS = ("q_row", "q_head", "sequences", "tiles", "table_width", "spans", "split_tokens")
_TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
_TENSOR_CORE = {80: r"mma\.sync\S*m16n8k16", 90: r"wgmma\.mma_async", 120: r"mma\.sync\S*m16n8k16"}


def _variant(
    dtype: str, head_dim: int, group: int = 4, fp8: bool = False, extras: bool = False
) -> Variant:
    """extras: a cap and sinks."""
    pool = "*u8" if fp8 else f"*{dtype}"
    signature = {"q": f"*{dtype}", "k_pool": pool, "v_pool": pool, "out": f"*{dtype}"}
    signature |= dict.fromkeys(("query_start", "kv_len", "block_table"), "*i32")
    signature |= dict.fromkeys(_PARTS, "*fp32") | dict.fromkeys((*_NUMBERS, "window"), "i32")
    signature |= dict.fromkeys(("scale", "softcap", "value_scale"), "fp32")
    dim, keys, warps = _shape(head_dim, _TYPES[dtype], fp8)
    constants: dict[str, object] = {
        "KV_HEADS": 8,
        "GROUP": group,
        "HEADS": min(group, _ROWS),
        "HEAD_DIM": head_dim,
        "DIM": dim,
        "ROWS": _ROWS,
        "KEYS": keys,
        "SPAN": SPAN,
        "FP8": fp8,
        "HAS_SOFTCAP": extras,
    }
    if extras:
        signature["sinks"] = "*fp32"
    else:
        constants["sinks"] = None
    return Variant(
        f"attention {dtype}{' e4m3' if fp8 else ''} {head_dim}/{group}{' extras' * extras}",
        attention_kernel,
        signature,
        constants,
        num_warps=warps,
        num_stages=_STAGES,
        aligned=(*_POINTERS, *_PARTS, "q_row", "q_head"),
        instructions={} if dtype == "fp32" else _TENSOR_CORE,
        # What is merged once in a span waits in memory. Triton 3.6 spills some words more than 3.7.
        spill_limit=0 if dim < 64 else 32 if dim < 128 else 448 if fp8 and dim > 128 else 256,
    )


def _merge_variant(dtype: str, head_dim: int) -> Variant:
    signature = dict.fromkeys(("query_start", "kv_len"), "*i32") | {"out": f"*{dtype}"}
    signature |= dict.fromkeys((*_PARTS, "sinks"), "*fp32")
    signature |= dict.fromkeys(("spans", "split_tokens", "window"), "i32")
    constants = {"KV_HEADS": 8, "GROUP": 4, "HEADS": _MERGED_HEADS, "HEAD_DIM": head_dim}
    return Variant(
        f"attention merge {dtype} {head_dim}",
        merge_kernel,
        {**signature, "value_scale": "fp32"},
        {**constants, "DIM": max(16, triton.next_power_of_2(head_dim)), "SPAN": SPAN},
        aligned=("query_start", "kv_len", "out", *_PARTS),
    )


VARIANTS = (
    *(_variant("bf16", dim) for dim in (16, 64, 80, 128, 256)),
    *(_variant("fp16", dim) for dim in (64, 128)),
    *(_variant("bf16", 128, group) for group in (1, 7, 8)),
    *(_variant("bf16", dim, 8, extras=True) for dim in (64, 256)),
    *(_variant("bf16", dim, fp8=True) for dim in (64, 128, 256)),
    _variant("fp16", 128, fp8=True),
    *(_variant("fp32", dim) for dim in (64, 128)),
    *(_merge_variant("bf16", dim) for dim in (64, 128, 256)),
)

"""One token for each row of logits on a GPU, in one launch and without waiting for the device.

A program takes a whole row, in chunks of CHUNK columns from the lowest id on: what it does depends
on its row and V alone. z <= 0 is ordered by the bits of |z|, its rank: the lower, the likelier. A
filter is a highest rank, found digit by digit with 16 candidates in each pass over the row, and a
highest id among the tokens that have just this rank.

Products are rounded before they are added, not fused with the sum: a penalty in other bits would
be another choice among equals.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quantd.kernels import sampling
from quantd.kernels.sampling import SamplingRows
from quantd.kernels.triton.variant import SHARED_LIMIT, Variant

_CHUNK = 2048
_WARPS = 8
_NOT_FINITE = tl.constexpr(sampling.NOT_FINITE)
_ALL_MASKED = tl.constexpr(sampling.ALL_MASKED)
_MASKED = tl.constexpr(sampling.MASKED)

_INFINITE_RANK = tl.constexpr(0x7F800000)
"""Of a masked token."""

_LOW = tl.constexpr(0xFFFFFFFF)


@triton.jit
def _philox_uniform(seed, position):
    """`reference.sampling.philox_uniform` for the purpose 0, as fp64."""
    key0 = seed.to(tl.uint64) & _LOW
    key1 = seed.to(tl.uint64) >> 32
    c0 = position.to(tl.uint64) & _LOW
    c1 = position.to(tl.uint64) >> 32
    c2 = c0 & 0
    c3 = c0 & 0
    for _ in tl.static_range(10):
        product0 = c0 * 0xD2511F53
        product1 = c2 * 0xCD9E8D57
        c0 = (product1 >> 32) ^ c1 ^ key0
        c1 = product1 & _LOW
        c2 = (product0 >> 32) ^ c3 ^ key1
        c3 = product0 & _LOW
        key0 = (key0 + 0x9E3779B9) & _LOW
        key1 = (key1 + 0xBB67AE85) & _LOW
    return ((c0 >> 9) * 2 + 1).to(tl.float64) * 5.9604644775390625e-08


@triton.jit(do_not_specialize=["count"])
def uniform_kernel(seeds, positions, out, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    seed = tl.load(seeds + at, mask=at < count, other=0)
    position = tl.load(positions + at, mask=at < count, other=0)
    tl.store(out + at, _philox_uniform(seed, position), mask=at < count)


@triton.jit
def _highest(row, vocabulary, CHUNK: tl.constexpr):
    """(highest value, its lowest id, whether there is a NaN) of a row."""
    best = float("-inf")
    token = 0
    nans = 0
    for start in range(0, vocabulary, CHUNK):
        at = start + tl.arange(0, CHUNK)
        value = tl.load(row + at, mask=at < vocabulary, other=float("-inf")).to(tl.float32)
        nans += tl.sum((value != value).to(tl.int32), 0)
        value = tl.where(value == value, value, float("-inf"))
        top = tl.max(value, 0)
        first = tl.min(tl.where(value == top, at, vocabulary), 0)
        token = tl.where(top > best, first, token)
        best = tl.maximum(best, top)
    return best, token, nans > 0


@triton.jit
def _see(seen, is_new, tokens, first, stop, words, CHUNK: tl.constexpr):
    """Sets the bits of new tokens in a row of `seen`. Several may lie in one word."""
    if is_new:
        for start in range(0, words, CHUNK):
            at = start + tl.arange(0, CHUNK)
            tl.store(seen + at, tl.zeros([CHUNK], tl.int32), mask=at < words)
        tl.debug_barrier()
    for start in range(first, stop, CHUNK):
        at = start + tl.arange(0, CHUNK)
        token = tl.load(tokens + at, mask=at < stop, other=0)
        bit = tl.full([CHUNK], 1, tl.int32) << (token % 32)
        tl.atomic_or(seen + token // 32, bit, mask=at < stop)


@triton.jit
def _bit(words, is_there, token, inside, other: tl.constexpr):
    """Whether the bit of a token is set; `other` where there are no words."""
    word = tl.load(words + token // 32, mask=inside & is_there, other=other)
    return ((word >> (token % 32)) & 1) != 0


@triton.jit
def _penalized(value, is_seen, repetition):
    worse = tl.where(value > 0, tl.div_rn(value, repetition), value * repetition)
    return tl.where(is_seen, worse, value)


@triton.jit
def _copy_edited(
    logits, work, mask, is_masked, seen, has_seen, repetition, vocabulary, CHUNK: tl.constexpr
):
    """What holds of all tokens: the mask and the penalty of those that were seen."""
    for start in range(0, vocabulary, CHUNK):
        at = start + tl.arange(0, CHUNK)
        inside = at < vocabulary
        value = tl.load(logits + at, mask=inside, other=0.0).to(tl.float32)
        value = tl.where(_bit(mask, is_masked, at, inside, -1), value, float("-inf"))
        value = _penalized(value, _bit(seen, has_seen, at, inside, 0), repetition)
        tl.store(work + at, value, mask=inside)


@triton.jit
def _edit(
    logits,
    work,
    mask,
    is_masked,
    seen,
    has_seen,
    first,
    stop,
    tokens,
    biases,
    counts,
    flags,
    repetition,
    frequency,
    presence,
    CHUNK: tl.constexpr,
):
    """The tokens that have more than that, from their logits on: a bias comes before a penalty."""
    for start in range(first, stop, CHUNK):
        at = start + tl.arange(0, CHUNK)
        inside = at < stop
        token = tl.load(tokens + at, mask=inside, other=0)
        flag = tl.load(flags + at, mask=inside, other=0)
        count = tl.load(counts + at, mask=inside, other=0.0)
        value = tl.load(logits + token, mask=inside, other=0.0).to(tl.float32)
        value = tl.where(_bit(mask, is_masked, token, inside, -1), value, float("-inf"))
        value = tl.where((flag & _MASKED) != 0, float("-inf"), value)
        value += tl.load(biases + at, mask=inside, other=0.0)
        value = _penalized(value, _bit(seen, has_seen, token, inside, 0), repetition)
        value = tl.where(count > 0, value - frequency * count - presence, value)
        tl.store(work + token, value, mask=inside)


@triton.jit
def _heat(work, highest, temperature, vocabulary, CHUNK: tl.constexpr):
    for start in range(0, vocabulary, CHUNK):
        at = start + tl.arange(0, CHUNK)
        value = tl.load(work + at, mask=at < vocabulary, other=0.0)
        z = tl.div_rn(value - highest, tl.full([CHUNK], 0.0, tl.float32) + temperature)
        tl.store(work + at, z, mask=at < vocabulary)


@triton.jit
def _chunk(work, start, vocabulary, CHUNK: tl.constexpr):
    """(ids, z, rank) of a chunk; what lies beyond the row counts as masked."""
    at = start + tl.arange(0, CHUNK)
    z = tl.load(work + at, mask=at < vocabulary, other=float("-inf"))
    return at, z, tl.abs(z).to(tl.int32, bitcast=True)


@triton.jit
def _kept(at, rank, most, last):
    """Whether a token passes a filter: the highest rank, and the last id of those that have it."""
    return (rank < _INFINITE_RANK) & ((rank < most) | ((rank == most) & (at <= last)))


@triton.jit
def _reach(work, vocabulary, most, last, goal, WEIGHTED: tl.constexpr, CHUNK: tl.constexpr):
    """(rank, sum before): the lowest rank up to which the kept tokens' probabilities (or, not
    WEIGHTED, their number) sum to `goal`, and the sum of all below it. Sums are fp32 within a chunk
    and fp64 over chunks. An infinite rank, or a higher one, where the goal is never reached."""
    digit = tl.arange(0, 16).to(tl.int64)
    base = tl.zeros([], tl.int64)
    before = tl.zeros([], tl.float64)
    for step in range(8):
        unit = tl.full([], 1, tl.int64) << (28 - 4 * step)
        # The ranges of the next digit end here, and each has the sum up to its end.
        end = base + digit * unit + (unit - 1)
        sums = tl.zeros([16], tl.float64)
        for start in range(0, vocabulary, CHUNK):
            at, z, rank = _chunk(work, start, vocabulary, CHUNK)
            weight = tl.exp(z) if WEIGHTED else tl.full([CHUNK], 1.0, tl.float32)
            weight = tl.where(_kept(at, rank, most, last), weight, 0.0)
            below = rank[:, None] <= end[None, :]
            sums += tl.sum(tl.where(below, weight[:, None], 0.0), 0).to(tl.float64)
        short = sums < goal
        passed = tl.minimum(tl.sum(short.to(tl.int32), 0), 15)
        before = tl.maximum(before, tl.max(tl.where(digit < passed, sums, 0.0), 0))
        base += passed * unit
    return base, before


@triton.jit
def _nth_of_rank(work, vocabulary, rank, most, last, n, CHUNK: tl.constexpr):
    """The id of the n-th (from 1) kept token of just this rank; `vocabulary` if there are fewer."""
    found = vocabulary
    seen = 0
    for start in range(0, vocabulary, CHUNK):
        at, _, ranks = _chunk(work, start, vocabulary, CHUNK)
        equal = ((ranks == rank) & _kept(at, ranks, most, last)).to(tl.int32)
        order = seen + tl.cumsum(equal, 0)
        here = tl.min(tl.where((order == n) & (equal != 0), at, vocabulary), 0)
        found = tl.minimum(found, here)
        seen += tl.sum(equal, 0)
    return found


@triton.jit
def _total(work, vocabulary, most, last, CHUNK: tl.constexpr):
    total = tl.zeros([], tl.float64)
    for start in range(0, vocabulary, CHUNK):
        at, z, rank = _chunk(work, start, vocabulary, CHUNK)
        weight = tl.where(_kept(at, rank, most, last), tl.exp(z), 0.0)
        total += tl.sum(weight, 0).to(tl.float64)
    return total


@triton.jit
def _choose(work, vocabulary, most, last, target, CHUNK: tl.constexpr):
    """The first kept token whose cumulative sum exceeds the target; the last one that has a
    probability if none does."""
    found = vocabulary
    likely = 0
    below = tl.zeros([], tl.float64)
    for start in range(0, vocabulary, CHUNK):
        at, z, rank = _chunk(work, start, vocabulary, CHUNK)
        weight = tl.where(_kept(at, rank, most, last), tl.exp(z), 0.0)
        reached = below + tl.cumsum(weight.to(tl.float64), 0)
        beyond = (reached > target) & (weight > 0)
        found = tl.minimum(found, tl.min(tl.where(beyond, at, vocabulary), 0))
        likely = tl.maximum(likely, tl.max(tl.where(weight > 0, at, 0), 0))
        below += tl.sum(weight, 0).to(tl.float64)
    return tl.where(found < vocabulary, found, likely)


@triton.jit(do_not_specialize=["mask_words", "seen_words"])
def sample_kernel(
    logits,  # [n, vocabulary], rows row_stride apart
    seeds,
    positions,
    temperatures,
    top_ks,
    top_ps,
    cuts,  # fp32 [n]: log(min_p)
    repetitions,
    frequencies,
    presences,
    mask,
    mask_rows,
    edit_start,
    edit_token,
    edit_bias,
    edit_count,
    edit_flags,
    seen,
    seen_rows,
    seen_new,
    seen_start,
    seen_token,
    work,  # fp32 [n, vocabulary]
    tokens,  # int64 [n]
    highest,  # fp32 [n]
    row_stride,
    vocabulary,
    mask_words,
    seen_words,
    CHUNK: tl.constexpr,
):
    """Program r: row r, as `reference.sample_rows` has it."""
    r = tl.program_id(0).to(tl.int64)
    seen_row = tl.load(seen_rows + r).to(tl.int64)
    seen += seen_row * seen_words
    if seen_row >= 0:
        stop = tl.load(seen_start + r + 1)
        is_new = tl.load(seen_new + r) != 0
        _see(seen, is_new, seen_token, tl.load(seen_start + r), stop, seen_words, CHUNK)
    row = logits + r * row_stride
    best, token, has_nan = _highest(row, vocabulary, CHUNK)
    tl.store(highest + r, tl.where(has_nan, float("nan"), best))
    if has_nan | (tl.abs(best) == float("inf")):
        tl.store(tokens + r, _NOT_FINITE)
        return
    temperature = tl.load(temperatures + r)
    first = tl.load(edit_start + r)
    stop = tl.load(edit_start + r + 1)
    mask_row = tl.load(mask_rows + r).to(tl.int64)
    if (temperature == 0.0) & (first == stop) & (mask_row < 0) & (seen_row < 0):
        tl.store(tokens + r, token)
        return
    mask += mask_row * mask_words
    work += r * vocabulary
    repetition = tl.load(repetitions + r)
    # At each of these barriers threads go on with what others have written, or write it anew.
    tl.debug_barrier()
    _copy_edited(row, work, mask, mask_row >= 0, seen, seen_row >= 0, repetition, vocabulary, CHUNK)
    tl.debug_barrier()
    _edit(
        row,
        work,
        mask,
        mask_row >= 0,
        seen,
        seen_row >= 0,
        first,
        stop,
        edit_token,
        edit_bias,
        edit_count,
        edit_flags,
        repetition,
        tl.load(frequencies + r),
        tl.load(presences + r),
        CHUNK,
    )
    tl.debug_barrier()
    best, token, has_nan = _highest(work, vocabulary, CHUNK)
    if best == float("-inf"):
        tl.store(tokens + r, _ALL_MASKED)
        return
    if temperature == 0.0:
        tl.store(tokens + r, token)
        return
    tl.debug_barrier()
    _heat(work, best, temperature, vocabulary, CHUNK)
    tl.debug_barrier()

    most = tl.abs(tl.load(cuts + r)).to(tl.int32, bitcast=True).to(tl.int64)
    last = vocabulary
    top_k = tl.load(top_ks + r)
    if (top_k > 0) & (top_k < vocabulary):
        rank, before = _reach(work, vocabulary, most, last, top_k.to(tl.float64), False, CHUNK)
        if rank <= most:
            left = top_k - before.to(tl.int32)
            last = _nth_of_rank(work, vocabulary, rank, most, last, left, CHUNK)
            most = rank
    total = _total(work, vocabulary, most, last, CHUNK)
    top_p = tl.load(top_ps + r)
    if top_p < 1.0:
        goal = total * top_p
        rank, before = _reach(work, vocabulary, most, last, goal, True, CHUNK)
        # A goal near the total may lie above all sums, which are rounded in another order.
        if rank <= most:
            weight = tl.exp(-rank.to(tl.int32).to(tl.float32, bitcast=True)).to(tl.float64)
            # The first of them that makes the sum reach the goal, and at least one.
            left = tl.ceil((goal - before) / tl.maximum(weight, 1e-300))
            left = tl.minimum(tl.maximum(left, 1.0), 2147483647.0).to(tl.int32)
            nth = _nth_of_rank(work, vocabulary, rank, most, last, left, CHUNK)
            # For the same reason there may be fewer, and top-k may have left not all of this rank.
            last = tl.where(rank == most, tl.minimum(last, nth), nth)
            most = rank
            total = _total(work, vocabulary, most, last, CHUNK)
    target = _philox_uniform(tl.load(seeds + r), tl.load(positions + r)) * total
    tl.store(tokens + r, _choose(work, vocabulary, most, last, target, CHUNK))


def philox_uniform(seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """For each pair of int64 [n] the reference's number, fp64 [n]."""
    out = torch.empty(seeds.shape, dtype=torch.float64, device=seeds.device)
    if out.numel():
        grid = (triton.cdiv(out.numel(), _CHUNK),)
        uniform_kernel[grid](seeds, positions, out, out.numel(), BLOCK=_CHUNK, num_warps=_WARPS)
    return out


def sample_rows(logits: torch.Tensor, rows: SamplingRows) -> tuple[torch.Tensor, torch.Tensor]:
    """As the reference; logits with a contiguous last dimension."""
    count, vocabulary = logits.shape
    tokens = torch.empty(count, dtype=torch.int64, device=logits.device)
    highest = torch.empty(count, dtype=torch.float32, device=logits.device)
    if not count:
        return tokens, highest
    sample_kernel[(count,)](
        logits,
        rows.seed,
        rows.position,
        rows.temperature,
        rows.top_k,
        rows.top_p,
        rows.min_p.log().float(),
        rows.repetition,
        rows.frequency,
        rows.presence,
        rows.mask,
        rows.mask_row,
        rows.edit_start,
        rows.edit_token,
        rows.edit_bias,
        rows.edit_count,
        rows.edit_flags,
        rows.seen,
        rows.seen_row,
        rows.seen_new,
        rows.seen_start,
        rows.seen_token,
        torch.empty(count, vocabulary, dtype=torch.float32, device=logits.device),
        tokens,
        highest,
        logits.stride(0),
        vocabulary,
        rows.mask.shape[1],
        rows.seen.shape[1],
        CHUNK=_CHUNK,
        num_warps=_WARPS,
        enable_fp_fusion=False,
    )
    return tokens, highest


def _variant(dtype: str) -> Variant:
    signature = {"logits": f"*{dtype}", "work": "*fp32", "tokens": "*i64", "highest": "*fp32"}
    signature |= dict.fromkeys(("seeds", "positions"), "*i64")
    signature |= dict.fromkeys(("temperatures", "cuts", "repetitions", "frequencies"), "*fp32")
    signature |= {"presences": "*fp32", "top_ks": "*i32", "top_ps": "*fp64"}
    signature |= dict.fromkeys(
        ("mask", "mask_rows", "edit_start", "edit_token", "edit_flags"), "*i32"
    )
    seen = ("seen", "seen_rows", "seen_new", "seen_start", "seen_token")
    signature |= dict.fromkeys(seen, "*i32")
    signature |= dict.fromkeys(("edit_bias", "edit_count"), "*fp32")
    signature |= dict.fromkeys(("row_stride", "vocabulary", "mask_words", "seen_words"), "i32")
    return Variant(
        f"sample {dtype}",
        sample_kernel,
        signature,
        {"CHUNK": _CHUNK},
        num_warps=_WARPS,
        is_fused=False,
        instructions=dict.fromkeys(SHARED_LIMIT, r"(?s)\A(?!.*fma\.rn\.f32)"),
        aligned=("logits", "work", "row_stride", "vocabulary"),
    )


VARIANTS = (
    _variant("bf16"),
    _variant("fp32"),
    Variant(
        "philox",
        uniform_kernel,
        {"seeds": "*i64", "positions": "*i64", "out": "*fp64", "count": "i32"},
        {"BLOCK": _CHUNK},
        num_warps=_WARPS,
        aligned=("seeds", "positions", "out"),
    ),
)

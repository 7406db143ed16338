"""Choosing a token from logits: the specification, in plain torch.

Each function works on one row of float32 logits [V] unless it says otherwise. A token is chosen
in this order, each step on the outcome of the one before (the order of vLLM):

1. masks: the grammar's, allowed ids, bad words, stop tokens before min_tokens: logit = -inf,
   which no bias or penalty brings back
2. logit bias: added
3. penalties: repetition, then frequency, then presence
4. temperature: z = (logit - highest logit) / temperature
5. filters: min-p and top-k, then top-p over what these two left, renormalized. "The first tokens"
   is by descending z, equal ones by ascending id, so that top-k keeps exactly k.
6. one uniform number u, by inverse CDF over the kept tokens in ascending order of id

Every row is computed by itself, in an order of operations that depends on V alone, so a row gives
the same token whatever else is in the batch. Nothing here knows requests or sequences.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF
_MASK64 = 0xFFFFFFFFFFFFFFFF
_CDF_BLOCK = 256
_NUM_BINS = 2048
_BINS_PER_NAT = 64.0

Words4 = tuple[int, int, int, int]


def philox4x32(counter: Words4, key: tuple[int, int]) -> Words4:
    """Philox4x32-10 (Salmon et al., SC 2011): four 32-bit words from a counter and a key."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0 = 0xD2511F53 * c0
        product1 = 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (
            (product1 >> 32) ^ c1 ^ k0,
            product1 & _MASK32,
            (product0 >> 32) ^ c3 ^ k1,
            product0 & _MASK32,
        )
        k0 = (k0 + 0x9E3779B9) & _MASK32
        k1 = (k1 + 0xBB67AE85) & _MASK32
    return c0, c1, c2, c3


def philox_uniform(seed: int, position: int, purpose: int = 0) -> float:
    """A number in (0, 1) that is a function of its arguments alone.

    Key: the 64-bit seed (a negative one as two's complement). Counter: the position in the
    sequence (64 bits) and the purpose (32 bits), which keeps uses of one position apart. The
    result is an odd multiple of 2**-24, so float32 holds it exactly and it is never 0 or 1.
    """
    seed &= _MASK64
    word = philox4x32(
        (position & _MASK32, (position >> 32) & _MASK32, purpose & _MASK32, 0),
        (seed & _MASK32, seed >> 32),
    )[0]
    return ((word >> 9) * 2 + 1) * 2.0**-24


def keep_allowed(rows: Tensor, allowed: Tensor) -> None:
    """Mask the tokens of rows [m, V] where `allowed` [m, V] (uint8) is 0, elsewhere it is 1; in
    place. As a minimum with +inf or -inf, which takes a fifth of masked_fill's time on a CPU."""
    torch.minimum(rows, allowed.to(rows.dtype).sub_(0.5).mul_(math.inf), out=rows)


def keep_only(row: Tensor, ids: Tensor) -> None:
    """Mask every token but `ids` (int64); in place."""
    kept = row[ids]
    row.fill_(-math.inf)
    row[ids] = kept


def mask_tokens(row: Tensor, ids: Tensor) -> None:
    """Mask `ids` (int64); in place."""
    row[ids] = -math.inf


def add_bias(row: Tensor, ids: Tensor, bias: Tensor) -> None:
    """Add `bias` (float32) to the logits of `ids` (int64, may repeat); in place."""
    row.index_add_(0, ids, bias)


def apply_repetition_penalty(row: Tensor, seen: Tensor, penalty: float) -> None:
    """CTRL (Keskar et al. 2019): logits of `seen` (int64, distinct: prompt and output) are
    divided by the penalty where positive and multiplied by it elsewhere; in place."""
    logits = row[seen]
    row[seen] = torch.where(logits > 0, logits / penalty, logits * penalty)


def apply_output_penalties(
    row: Tensor, output: Tensor, counts: Tensor, frequency: float, presence: float
) -> None:
    """Subtract frequency * count, then presence, from the logits of `output` (int64, distinct
    tokens of the output, without the prompt), which occur `counts` (float32) times; in place."""
    row[output] = row[output] - frequency * counts - presence


def apply_temperature(rows: Tensor, highest: Tensor, temperature: Tensor) -> None:
    """rows [m, V] becomes z <= 0; highest and temperature are [m], finite and > 0; in place."""
    rows.sub_(highest[:, None]).div_(temperature[:, None])


def kept_tokens(z: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """The ids (int64, ascending, at least one) that the filters leave of z [V], whose highest
    value is 0. Off: top_k 0, top_p 1, min_p 0.

    min-p keeps probabilities >= min_p * the highest one (Nguyen et al. 2024); top-p keeps the
    smallest set of first tokens whose sum reaches top_p, with the one that crosses it.
    """
    cut = math.log(min_p) if min_p > 0 else -math.inf
    top_k = top_k if top_k < z.numel() else 0
    if top_k:
        cut = max(cut, float(z.topk(top_k).values[-1]))
    if cut == -math.inf:
        return _first_to_reach(z, top_p)
    ids = (z >= cut).nonzero().squeeze(-1)
    if top_k and ids.numel() > top_k:  # several tokens have the k-th highest value
        ids = ids[_descending(z[ids])[:top_k]].sort().values
    return ids[_first_to_reach(z[ids], top_p)]


def _first_to_reach(z: Tensor, top_p: float) -> Tensor:
    """Ascending columns of z [n] that top-p keeps; without the masked ones.

    Sorting a vocabulary costs ten times the rest, so the probability is summed in bins of z, and
    only the bin in which the sum reaches top_p is sorted.
    """
    possible = z > -math.inf
    if top_p >= 1:
        return possible.nonzero().squeeze(-1)
    probabilities = z.softmax(-1).double()
    bins = (z * -_BINS_PER_NAT).clamp_(max=_NUM_BINS - 1).long()
    reached = torch.bincount(bins, probabilities, _NUM_BINS).cumsum(-1)
    target = top_p * reached[-1:]
    crossing = torch.searchsorted(reached, target)
    columns = ((bins == crossing) & possible).nonzero().squeeze(-1)
    columns = columns[_descending(z[columns])]
    before = probabilities[columns].cumsum(-1) - probabilities[columns]
    before += torch.where(crossing > 0, reached[(crossing - 1).clamp(min=0)], 0.0)
    kept = bins < crossing
    kept[columns[: max(1, int((before < target).sum()))]] = True
    return kept.nonzero().squeeze(-1)


def _descending(values: Tensor) -> Tensor:
    return values.sort(descending=True, stable=True).indices


def choose(z: Tensor, u: Tensor) -> Tensor:
    """Inverse CDF: for each row of z [m, n] (float32, -inf is never chosen, at least one finite)
    the first column whose cumulative probability exceeds u [m] (float64 in (0, 1)); int64 [m].

    Two levels, blocks of columns and then columns, because a cumulative sum over a whole
    vocabulary costs ten times the rest.
    """
    probabilities = z.softmax(-1)
    padding = -probabilities.shape[1] % _CDF_BLOCK
    padded = torch.nn.functional.pad(probabilities, (0, padding))
    blocks = padded.view(len(z), -1, _CDF_BLOCK)
    ends = blocks.sum(-1).cumsum(-1, dtype=torch.float64)
    target = u[:, None] * ends[:, -1:]
    block = torch.searchsorted(ends, target, right=True)
    below = torch.where(block > 0, ends.gather(1, (block - 1).clamp(min=0)), 0.0)
    inside = blocks[torch.arange(len(blocks), device=z.device), block[:, 0]]
    cdf = inside.cumsum(-1, dtype=torch.float64)
    # The block's sum and the end of its cumulative sum may differ in the last bits: a target
    # beyond the end belongs to the last column that can be chosen.
    column = torch.searchsorted(cdf, target - below, right=True)
    last = torch.searchsorted(cdf, cdf[:, -1:].contiguous(), right=False)
    return (block * _CDF_BLOCK + torch.minimum(column, last))[:, 0]


def top_tokens(row: Tensor, k: int) -> Tensor:
    """Ids (int64) of the min(k, V) highest of row [V], highest first, NaN above all, ties by
    ascending id."""
    k = min(k, row.numel())
    if k == 0:
        return torch.empty(0, dtype=torch.int64, device=row.device)
    ids = (~(row < row.topk(k).values[-1])).nonzero().squeeze(-1)
    return ids[_descending(row[ids])[:k]]

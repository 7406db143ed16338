"""GPTQ's bit layout: four tensors to grouped codes.

    W[n, k] = (q[n, k] - z[g_idx[k], n]) * scales[g_idx[k], n]

- qweight int32 [K * bits / 32, N]: for each row n a stream of codes from the lowest bit of the
  first word on. A code of three bits may begin in one word and end in the next.
- qzeros int32 [G, N * bits / 32]: the same stream along N. Version 1 holds z - 1, version 2 z.
- scales [G, N] and g_idx int32 [K], the group of each column, in any order.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor

from quantd.kernels.grouped import GROUP_MULTIPLE, GroupedCodes

BITS = (2, 3, 4, 8)


@dataclass(frozen=True, slots=True)
class Columns:
    """How the columns lie once those of a group are beside each other."""

    order: Tensor | None
    """int64 [K']: which column is at k, or -1 for padding. None: as stored."""
    group: int
    groups: Tensor
    """int64 [ceil(K' / group)]: the stored group that each of ours has its scale from."""


@dataclass(frozen=True, slots=True)
class Zeros:
    """Zero points: one for the whole weight, or uint8 [G, N] when there are several."""

    center: int
    table: Tensor | None


def unpack_stream(words: Tensor, bits: int) -> Tensor:
    """int32 [R, W], contiguous -> uint8 [R, W * 32 / bits]; W * 32 is a multiple of bits."""
    rows = len(words)
    octets = words.view(torch.uint8)
    if bits == 8:
        return octets
    if bits == 3:
        # Eight codes are three bytes, so that no code lies across two of these.
        triples = octets.view(rows, -1, 3).int()
        joined = triples[..., 0] | triples[..., 1] << 8 | triples[..., 2] << 16
        out = torch.empty(*joined.shape, 8, dtype=torch.uint8)
        for i in range(8):
            out[..., i] = joined >> 3 * i & 7
        return out.view(rows, -1)
    count, mask = 8 // bits, (1 << bits) - 1
    out = torch.empty(*octets.shape, count, dtype=torch.uint8)
    for i in range(count):
        out[..., i] = octets >> bits * i & mask
    return out.view(rows, -1)


def symmetric_version(stored: Tensor, bits: int) -> int | None:
    """The version in which these stored zero points all are the middle, or None."""
    first, middle = int(stored[0, 0]), 1 << (bits - 1)
    if first not in (middle - 1, middle) or not bool((stored == first).all()):
        return None
    return 2 if first == middle else 1


def unpack_zeros(qzeros: Tensor, bits: int, *, version: int, sym: bool, carries: bool) -> Zeros:
    """A symmetric weight whose zero points are all those of the other version is of that one.

    Version 1 adds one to each stored number, modulo 2 ** bits: a zero point of 0 is stored as
    2 ** bits - 1. With `carries` the one is added to the words as a whole, which gives back what
    was there before a writer subtracted it so.
    """
    stored = unpack_stream(qzeros.contiguous(), bits)
    if sym and symmetric_version(stored, bits) is not None:
        return Zeros(1 << (bits - 1), None)
    if version == 1 and carries and bits != 3:
        # As a signed number, because int32 is; the sum wraps.
        ones = sum(1 << at for at in range(0, 31, bits))
        stored = unpack_stream((qzeros + ones).contiguous(), bits)
    elif version == 1:
        stored = (stored + 1) & ((1 << bits) - 1)
    first = int(stored[0, 0])
    if bool((stored == first).all()):
        return Zeros(first, None)
    return Zeros(0, stored)


def arrange(g_idx: Tensor, num_groups: int) -> Columns:
    """g_idx int64 [K], each in [0, num_groups).

    Groups of one size, a multiple of 16, need no padding. Otherwise each group is padded to a
    multiple of 16 columns and cut into pieces of the largest size that divides all.
    """
    counts = g_idx.bincount(minlength=num_groups)
    used = counts.nonzero()[:, 0]
    order = g_idx.argsort(stable=True)
    sizes = counts[used]
    group = int(sizes[0])
    if len(used) == 1:
        group = -(-group // GROUP_MULTIPLE) * GROUP_MULTIPLE
    if group % GROUP_MULTIPLE == 0 and bool((sizes[:-1] == group).all()) and sizes[-1] <= group:
        groups = used
    else:
        padded = -(-counts // GROUP_MULTIPLE) * GROUP_MULTIPLE
        group = gcd(*padded[used].tolist())
        groups = torch.arange(num_groups).repeat_interleave(padded // group)
        order = _spread(g_idx, order, counts, padded)
    stored = torch.equal(order, torch.arange(len(g_idx)))
    return Columns(None if stored else order, group, groups)


def _spread(g_idx: Tensor, by_group: Tensor, counts: Tensor, padded: Tensor) -> Tensor:
    """The columns by group, each group followed by its padding."""
    shift = (padded - counts).cumsum(0) - (padded - counts)
    at = torch.arange(len(g_idx)) + shift[g_idx[by_group]]
    return torch.full((int(padded.sum()),), -1).index_copy_(0, at, by_group)


def unpack_rows(
    qweight: Tensor, scales: Tensor, zeros: Zeros, columns: Columns, bits: int, rows: slice
) -> GroupedCodes:
    """Some rows of W; the stored tensors whole."""
    codes = unpack_stream(qweight[:, rows].t().contiguous(), bits)
    if columns.order is not None:
        codes = codes.index_select(1, columns.order.clamp(min=0))
    scale = scales[:, rows].index_select(0, columns.groups).t().float().contiguous()
    if zeros.table is None:
        return GroupedCodes(codes, bits, columns.group, scale, center=zeros.center)
    zero = zeros.table[:, rows].index_select(0, columns.groups).t().float()
    return GroupedCodes(codes, bits, columns.group, scale, offset=-(zero * scale))

"""Blocks of the IQ types, whose codes are indices into grids of eight or four small integers.

A code here is four bits: the index of a magnitude, and 8 for a negative one. A grid's entry is then
one word of bytes, so that a lookup yields eight codes, and eight signs are or'ed in by another.
The grids are those of the gguf package, which took them from ggml.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from quantd.kernels.ops import GroupedCodes

NEGATIVE = 8
_TWOS = (8, 25, 43)
_THREES_XXS = (4, 12, 20, 28, 36, 44, 52, 62)
_THREES_S = (1, 3, 5, 7, 9, 11, 13, 15)
_ONES = ((-7, 1, 9), (-9, -1, 7))
"""(-1, 0, 1) + 1/8 and - 1/8, in eighths."""


def halves(data: Tensor) -> Tensor:
    """uint8 [..., 2n] -> fp32 [..., n] of fp16."""
    return data.contiguous().view(torch.float16).float()


def words(data: Tensor) -> Tensor:
    """uint8 [..., 2n] -> int32 [..., n] of unsigned 16-bit numbers."""
    return data.contiguous().view(torch.int16).int().bitwise_and_(0xFFFF)


def _copy(data: Tensor) -> Tensor:
    """One block counts as contiguous, but lies two bytes off where words of four may begin."""
    return data.clone(memory_format=torch.contiguous_format)


def nibbles(data: Tensor) -> Tensor:
    """uint8 [..., n] -> [..., 2n], the low half of each byte before its high one."""
    return torch.stack((data & 15, data >> 4), dim=-1).flatten(-2)


def bits(data: Tensor, value: int) -> Tensor:
    """uint8 [..., n] -> [..., 8n]: `value` where a bit is set, else 0; the lowest bit first."""
    return lookup(_bit_words(value), data.int()).view(torch.uint8)


def iq2_xxs(blocks: Tensor) -> GroupedCodes:
    """Per 32: four indices, four times seven bits of signs, four bits of scale."""
    pairs = torch.unflatten(_copy(blocks[..., 2:]).view(torch.int32), -1, (8, 2))
    signs = _seven_bit_signs(pairs[..., 1])
    index = torch.unflatten(blocks[..., 2:], -1, (8, 8))[..., :4]
    codes = _eights("IQ2_XXS", index.int()) | signs
    scale = (pairs[..., 1] >> 28 & 15).float().add_(0.5) * 0.25
    return _grouped(blocks, codes, 32, halves(blocks[..., :2]), scale, _TWOS)


def iq2_xs(blocks: Tensor) -> GroupedCodes:
    """Per 8: nine bits of index, seven of signs; per 16: four bits of scale."""
    index = words(blocks[..., 2:66])
    codes = _eights("IQ2_XS", index & 511) | lookup(_sevens(), index >> 9)
    scale = nibbles(blocks[..., 66:]).float().add_(0.5) * 0.25
    return _grouped(blocks, codes, 16, halves(blocks[..., :2]), scale, _TWOS)


def iq2_s(blocks: Tensor) -> GroupedCodes:
    """Per 8: ten bits of index, eight of signs; per 16: four bits of scale."""
    low, signs, high = blocks[..., 2:34], blocks[..., 34:66], blocks[..., 66:74]
    index = low.int() | (_pairs(high).int() << 8)
    codes = _eights("IQ2_S", index) | lookup(_bit_words(NEGATIVE), signs.int())
    scale = nibbles(blocks[..., 74:]).float().add_(0.5) * 0.25
    return _grouped(blocks, codes, 16, halves(blocks[..., :2]), scale, _TWOS)


def iq3_xxs(blocks: Tensor) -> GroupedCodes:
    """Per 4: eight bits of index; per 32: four times seven bits of signs, four bits of scale."""
    packed = _copy(blocks[..., 66:]).view(torch.int32)
    index = blocks[..., 2:66].int()
    codes = _fours("IQ3_XXS", index) | _seven_bit_signs(packed).flatten(-2)
    scale = (packed >> 28 & 15).float().add_(0.5) * 0.5
    return _grouped(blocks, codes, 32, halves(blocks[..., :2]), scale, _THREES_XXS)


def iq3_s(blocks: Tensor) -> GroupedCodes:
    """Per 4: nine bits of index; per 8: eight of signs; per 32: four bits of scale."""
    low, high, signs = blocks[..., 2:66], blocks[..., 66:74], blocks[..., 74:106]
    index = low.int() | (bits(high, 1).int() << 8)
    codes = _fours("IQ3_S", index) | lookup(_bit_words(NEGATIVE), signs.int())
    scale = nibbles(blocks[..., 106:]).float() * 2 + 1
    return _grouped(blocks, codes, 32, halves(blocks[..., :2]), scale, _THREES_S)


def iq1_s(blocks: Tensor) -> GroupedCodes:
    """Per 8: eleven bits of index; per 32: three bits of scale and the sign of the shift."""
    low, high = blocks[..., 2:34], words(blocks[..., 34:])
    shifts = torch.tensor([0, 3, 6, 9], dtype=torch.int32)
    index = torch.unflatten(low.int(), -1, (8, 4)) | ((high[..., None] >> shifts & 7) << 8)
    codes = _eights("IQ1_S", index) | _shifted(high >> 15)[..., None]
    scale = (2 * (high >> 12 & 7) + 1).float()
    return _ternary(blocks, codes, 32, halves(blocks[..., :2]), scale)


def iq1_m(blocks: Tensor) -> GroupedCodes:
    """Per 8: eleven bits of index and the sign of the shift; per 16: three bits of scale. The
    scale of the block is in the high four bits of four words."""
    low, high, packed = blocks[..., :32], nibbles(blocks[..., 32:48]).int(), words(blocks[..., 48:])
    index = low.int() | ((high & 7) << 8)
    codes = _eights("IQ1_M", index) | _shifted(high >> 3)
    tops = packed >> torch.tensor([12, 8, 4, 0], dtype=torch.int32)
    tops &= torch.tensor([0xF, 0xF0, 0xF00, 0xF000], dtype=torch.int32)
    d = tops.sum(-1, keepdim=True).to(torch.int16).view(torch.float16).float()
    shifts = torch.tensor([0, 3, 6, 9], dtype=torch.int32)
    scale = (2 * (packed[..., None] >> shifts & 7) + 1).float().flatten(-2)
    return _ternary(blocks, codes, 16, d, scale)


def _grouped(
    blocks: Tensor,
    codes: Tensor,
    group: int,
    d: Tensor,
    scale: Tensor,
    magnitudes: tuple[int, ...],
) -> GroupedCodes:
    """`codes` int64 words of eight, `d` [N, B, 1] and `scale` [N, B, G]: their product is exact."""
    rest = [0] * (NEGATIVE - len(magnitudes))
    values = [*magnitudes, *rest, *(-m for m in magnitudes), *rest]
    return _packed(blocks, codes, group, d * scale, values)


def _ternary(blocks: Tensor, codes: Tensor, group: int, d: Tensor, scale: Tensor) -> GroupedCodes:
    """The values are in eighths, and so is the scale."""
    rest = [0] * (NEGATIVE - len(_ONES[0]))
    return _packed(blocks, codes, group, d * scale / 8, [*_ONES[0], *rest, *_ONES[1], *rest])


def _packed(
    blocks: Tensor, codes: Tensor, group: int, scale: Tensor, values: list[int]
) -> GroupedCodes:
    rows = blocks.shape[0]
    table = torch.tensor(values, dtype=torch.int8)
    flat = codes.contiguous().view(rows, -1).view(torch.uint8)
    return GroupedCodes(flat, 4, group, scale.reshape(rows, -1), table=table)


def _pairs(data: Tensor) -> Tensor:
    """uint8 [..., n] -> [..., 4n] of two bits, the lowest first."""
    return (data[..., None] >> torch.arange(0, 8, 2, dtype=torch.uint8) & 3).flatten(-2)


def _seven_bit_signs(packed: Tensor) -> Tensor:
    """int32 [..., n] with four times seven bits -> int64 [..., n, 4] of eight signs."""
    shifts = torch.tensor([0, 7, 14, 21], dtype=torch.int32)
    return lookup(_sevens(), packed[..., None] >> shifts & 127)


def _shifted(negative: Tensor) -> Tensor:
    """int32 0 or 1 -> int64 of eight signs that are all the same."""
    return negative.long() * (NEGATIVE * 0x0101010101010101)


def _eights(name: str, index: Tensor) -> Tensor:
    return lookup(_grid(name), index)


def _fours(name: str, index: Tensor) -> Tensor:
    """Two neighbours make one word of eight."""
    return lookup(_grid(name), index).view(torch.int64)


def lookup(table: Tensor, index: Tensor) -> Tensor:
    return table.index_select(0, index.reshape(-1)).view(index.shape)


@cache
def _grid(name: str) -> Tensor:
    """Entries as words of codes: int64 for eight values, int32 for four."""
    # Imported when a model has such tensors: it takes a quarter of a second.
    from gguf import quants

    kind = getattr(quants, name)
    kind.init_grid()
    values = torch.from_numpy(kind.grid).view(kind.grid_shape).float()
    levels = torch.tensor(kind.grid_map, dtype=torch.float32)
    codes = torch.bucketize(values, levels).to(torch.uint8)
    word = torch.int64 if kind.grid_shape[1] == 8 else torch.int32
    return codes.view(word).flatten()


@cache
def _bit_words(value: int) -> Tensor:
    """int64 [256]: byte i of entry n is `value` where bit i of n is set."""
    numbers = torch.arange(256, dtype=torch.uint8)[:, None]
    return ((numbers >> torch.arange(8, dtype=torch.uint8) & 1) * value).view(torch.int64)[:, 0]


@cache
def _sevens() -> Tensor:
    """int64 [128]: as `_sign_words`, for seven bits and an eighth that makes their number even."""
    from gguf import quants

    full = torch.frombuffer(bytearray(quants.IQ2_XXS.ksigns), dtype=torch.uint8)
    return lookup(_bit_words(NEGATIVE), full.int())

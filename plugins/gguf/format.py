"""Blocks of GGUF's quantized types to grouped codes, exactly.

Layouts: ggml/src/ggml-common.h. All are affine in groups of 16 or 32 columns or have at most
sixteen values, so `GroupedCodes` holds each without loss: the products of an fp16 scale and a small
integer scale are exact in fp32, and what follows is the one product and one sum of ggml.

An unpacker takes uint8 [N, B, bytes of a block], B blocks to a row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache

import torch
from torch import Tensor

from quantd.kernels.ops import GroupedCodes
from quantd.plugins.gguf import codebooks
from quantd.plugins.gguf.codebooks import bits, halves, lookup, nibbles, words

_KVALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
"""Doubled, so that they are integers; the scales are halved."""


def unpack(type_name: str, data: Tensor) -> GroupedCodes:
    """uint8 [N, bytes of a row] -> the rows' codes. `type_name` is a key of BLOCKS."""
    _, nbytes = BLOCKS[type_name]
    return _UNPACKERS[type_name](torch.unflatten(data, 1, (-1, nbytes)))


def _planes(data: Tensor, shifts: tuple[int, ...], mask: int) -> Tensor:
    """uint8 [..., n] -> [..., len(shifts), n]: some bits of all bytes, then the next of all."""
    data = data.contiguous()
    return torch.stack([(data >> shift if shift else data) & mask for shift in shifts], dim=-2)


def _halves_of(data: Tensor, width: int) -> Tensor:
    """uint8 [N, B, n]: in runs of `width` bytes, the low nibbles, then the high ones."""
    data = torch.unflatten(data.contiguous(), -1, (-1, width))
    return torch.stack((data & 15, data >> 4), dim=-2)


def _codes(planes: Tensor) -> Tensor:
    return planes.reshape(planes.shape[0], -1)


def _flat(per_group: Tensor) -> Tensor:
    return per_group.reshape(per_group.shape[0], -1)


def _q4_0(b: Tensor) -> GroupedCodes:
    codes = _codes(_halves_of(b[..., 2:], 16))
    return GroupedCodes(codes, 4, 32, _flat(halves(b[..., :2])), center=8)


def _q4_1(b: Tensor) -> GroupedCodes:
    scale, offset = _flat(halves(b[..., :2])), _flat(halves(b[..., 2:4]))
    return GroupedCodes(_codes(_halves_of(b[..., 4:], 16)), 4, 32, scale, offset)


def _fifth_bits(data: Tensor) -> Tensor:
    """uint8 [N, B, 4] -> [N, B, 1, 2, 16], 16 or 0: bit i is of value i."""
    return bits(data, 16).view(*data.shape[:2], 1, 2, 16)


def _q5_0(b: Tensor) -> GroupedCodes:
    codes = _codes(_halves_of(b[..., 6:], 16) | _fifth_bits(b[..., 2:6]))
    return GroupedCodes(codes, 5, 32, _flat(halves(b[..., :2])), center=16)


def _q5_1(b: Tensor) -> GroupedCodes:
    codes = _codes(_halves_of(b[..., 8:], 16) | _fifth_bits(b[..., 4:8]))
    return GroupedCodes(codes, 5, 32, _flat(halves(b[..., :2])), _flat(halves(b[..., 2:4])))


def _q8_0(b: Tensor) -> GroupedCodes:
    codes = _codes(b[..., 2:] ^ 128)
    return GroupedCodes(codes, 8, 32, _flat(halves(b[..., :2])), center=128)


def _q2_k(b: Tensor) -> GroupedCodes:
    scales, d = b[..., :16], halves(b[..., 80:84])
    codes = _codes(_planes(torch.unflatten(b[..., 16:80], -1, (2, 32)), (0, 2, 4, 6), 3))
    scale = _flat(d[..., :1] * (scales & 15).float())
    return GroupedCodes(codes, 2, 16, scale, -_flat(d[..., 1:] * (scales >> 4).float()))


def _q3_k(b: Tensor) -> GroupedCodes:
    low = _planes(torch.unflatten(b[..., 32:96], -1, (2, 32)), (0, 2, 4, 6), 3)
    # The third bit of the eight runs of 32 values are the eight bits of the mask's bytes.
    high = _planes(b[..., :32], (0, 1, 2, 3, 4, 5, 6, 7), 1) << 2
    codes = _codes(low.flatten(2, 3) | high)
    low = _planes(b[..., 96:104], (0, 4), 15)
    high = _planes(b[..., 104:108], (0, 2, 4, 6), 3) << 4
    scales = (low.flatten(2) | high.flatten(2)).float() - 32
    scale = halves(b[..., 108:]) * scales
    return GroupedCodes(codes, 3, 16, _flat(scale), center=4)


def _six_bit_scales(b: Tensor) -> tuple[Tensor, Tensor]:
    """Of Q4_K and Q5_K: (scale, offset), fp32 [N, 8B], from d, dmin and twelve bytes."""
    d = halves(b[..., :4])
    first, second, third = b[..., 4:8], b[..., 8:12], b[..., 12:16]
    scales = torch.cat((first & 63, (third & 15) | (first >> 2 & 48)), dim=-1)
    mins = torch.cat((second & 63, (third >> 4) | (second >> 2 & 48)), dim=-1)
    return _flat(d[..., :1] * scales.float()), -_flat(d[..., 1:] * mins.float())


def _q4_k(b: Tensor) -> GroupedCodes:
    return GroupedCodes(_codes(_halves_of(b[..., 16:], 32)), 4, 32, *_six_bit_scales(b))


def _q5_k(b: Tensor) -> GroupedCodes:
    low = _halves_of(b[..., 48:], 32).flatten(2, 3)
    high = _planes(b[..., 16:48], (0, 1, 2, 3, 4, 5, 6, 7), 1).bitwise_left_shift_(4)
    return GroupedCodes(_codes(low.bitwise_or_(high)), 5, 32, *_six_bit_scales(b))


def _q6_k(b: Tensor) -> GroupedCodes:
    low = _halves_of(b[..., :128], 64)
    high = _planes(
        torch.unflatten(b[..., 128:192], -1, (2, 32)), (0, 2, 4, 6), 3
    ).bitwise_left_shift_(4)
    codes = _codes(low.bitwise_or_(high.view(low.shape)))
    scale = halves(b[..., 208:]) * b[..., 192:208].view(torch.int8).float()
    return GroupedCodes(codes, 6, 16, _flat(scale), center=32)


def _iq4_nl(b: Tensor) -> GroupedCodes:
    codes = _codes(_halves_of(b[..., 2:], 16))
    return GroupedCodes(codes, 4, 32, _flat(halves(b[..., :2])), table=_table(_KVALUES))


def _iq4_xs(b: Tensor) -> GroupedCodes:
    shifts = torch.arange(0, 16, 2, dtype=torch.int32)
    scales = nibbles(b[..., 4:8]).int() | ((words(b[..., 2:4]) >> shifts & 3) << 4)
    scale = halves(b[..., :2]) * (scales - 32).float()
    codes = _codes(_halves_of(b[..., 8:], 16))
    return GroupedCodes(codes, 4, 32, _flat(scale), table=_table(_KVALUES))


def _tq1_0(b: Tensor) -> GroupedCodes:
    """Base 3: a byte is a fraction of 256, whose digits come out by multiplying."""
    powers = torch.tensor([1, 3, 9, 27, 81], dtype=torch.uint8)
    parts = [
        (data[..., None, :] * powers[:count, None]).flatten(2)
        for data, count in ((b[..., :32], 5), (b[..., 32:48], 5), (b[..., 48:52], 4))
    ]
    codes = (torch.cat(parts, dim=-1).short() * 3 >> 8).to(torch.uint8)
    return GroupedCodes(_codes(codes), 2, 256, _flat(halves(b[..., 52:])), center=1)


def _tq2_0(b: Tensor) -> GroupedCodes:
    codes = _codes(_planes(torch.unflatten(b[..., :64], -1, (2, 32)), (0, 2, 4, 6), 3))
    return GroupedCodes(codes, 2, 256, _flat(halves(b[..., 64:])), center=1)


def _mxfp4(b: Tensor) -> GroupedCodes:
    scale = lookup(_half_e8m0(), b[..., 0].int())
    codes = _codes(_halves_of(b[..., 1:], 16))
    return GroupedCodes(codes, 4, 32, scale, table=_table(_E2M1))


def _nvfp4(b: Tensor) -> GroupedCodes:
    scale = _flat(lookup(_half_ue4m3(), b[..., :4].int()))
    codes = _codes(_halves_of(b[..., 4:], 8))
    return GroupedCodes(codes, 4, 16, scale, table=_table(_E2M1))


def _table(values: tuple[int, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.int8)


@cache
def _half_e8m0() -> Tensor:
    """fp32 [256]: 2 to the (n - 128); the first two are subnormal, so they are made of bits."""
    patterns = [0x200000, 0x400000, *(n << 23 for n in range(1, 255))]
    return torch.tensor(patterns, dtype=torch.int32).view(torch.float32)


@cache
def _half_ue4m3() -> Tensor:
    """fp32 [256]: half of the unsigned E4M3 number; its NaN is 0, and the top bit means nothing."""
    values = []
    for n in range(256):
        exponent, mantissa = n >> 3 & 15, n & 7
        value = mantissa * 2.0**-9 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
        values.append(0.0 if n in (0, 0x7F) else value / 2)
    return torch.tensor(values, dtype=torch.float32)


BLOCKS: Mapping[str, tuple[int, int]] = {
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q5_0": (32, 22),
    "Q5_1": (32, 24),
    "Q8_0": (32, 34),
    "Q2_K": (256, 84),
    "Q3_K": (256, 110),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
    "IQ1_S": (256, 50),
    "IQ1_M": (256, 56),
    "IQ2_XXS": (256, 66),
    "IQ2_XS": (256, 74),
    "IQ2_S": (256, 82),
    "IQ3_XXS": (256, 98),
    "IQ3_S": (256, 110),
    "IQ4_NL": (32, 18),
    "IQ4_XS": (256, 136),
    "TQ1_0": (256, 54),
    "TQ2_0": (256, 66),
    "MXFP4": (32, 17),
    "NVFP4": (64, 36),
}
"""The types that are read: values of a block, and its bytes."""

_UNPACKERS: Mapping[str, Callable[[Tensor], GroupedCodes]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ1_S": codebooks.iq1_s,
    "IQ1_M": codebooks.iq1_m,
    "IQ2_XXS": codebooks.iq2_xxs,
    "IQ2_XS": codebooks.iq2_xs,
    "IQ2_S": codebooks.iq2_s,
    "IQ3_XXS": codebooks.iq3_xxs,
    "IQ3_S": codebooks.iq3_s,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
    "TQ1_0": _tq1_0,
    "TQ2_0": _tq2_0,
    "MXFP4": _mxfp4,
    "NVFP4": _nvfp4,
}

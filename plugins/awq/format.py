"""AWQ's three bit layouts, all of four bits: tensors to grouped codes.

    W[n, k] = (q[n, k] - z[n, k // group]) * scale[n, k // group]

| version   | qweight                   | zeros                                | scales           |
|-----------|---------------------------|--------------------------------------|------------------|
| gemm      | int32 [K, N / 8]          | int32 [G, N / 8]                     | [G, N]           |
| gemv      | int32 [N, K / 8]          | int32 [N, width / 8]                 | [N, width]       |
| gemv_fast | int16 [N / 4, K]          | float [width, N], which is -z * scale | [width, N]       |

gemm puts eight rows n into a word in the order 0 2 4 6 1 3 5 7 from the lowest bits on; gemv puts
eight columns into a word in their order. width is G, padded: see `padded_groups`. gemv_fast is
described at `_interleaved`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantd.kernels.grouped import GroupedCodes

BITS = 4
VERSIONS = ("gemm", "gemv", "gemv_fast")
_NIBBLE_OF_ROW = (0, 4, 1, 5, 2, 6, 3, 7)
_MIDDLE = 8
"""The zero point where there are none stored."""
_STRIDE = 64
"""Columns of four rows that lie together in gemv_fast."""


def padded_groups(columns: int, group: int) -> int:
    """What gemv and gemv_fast round the number of groups up to: whole words of eight zero points,
    and for groups below 128 as many words as make 1024 columns a row's unit."""
    words = -(-(columns // group) // 8)
    multiple = max(1, 128 // group)
    return -(-words // multiple) * multiple * 8


def shapes(version: str, rows: int, columns: int, group: int) -> dict[str, tuple[int, int]]:
    """Of qweight, qzeros and scales. All divisions are exact."""
    groups = columns // group
    if version == "gemm":
        return {
            "qweight": (columns, rows // 8),
            "qzeros": (groups, rows // 8),
            "scales": (groups, rows),
        }
    width = padded_groups(columns, group)
    if version == "gemv":
        return {
            "qweight": (rows, columns // 8),
            "qzeros": (rows, width // 8),
            "scales": (rows, width),
        }
    return {"qweight": (rows // 4, columns), "qzeros": (width, rows), "scales": (width, rows)}


def row_multiple(version: str) -> int:
    return {"gemm": 8, "gemv": 1, "gemv_fast": 4}[version]


def column_multiple(version: str) -> int:
    return {"gemm": 1, "gemv": 8, "gemv_fast": _STRIDE}[version]


def unpack_rows(
    version: str, qweight: Tensor, qzeros: Tensor | None, scales: Tensor, group: int, rows: slice
) -> GroupedCodes:
    """Some rows of W, from a multiple of 8 on; the stored tensors whole."""
    if version == "gemm":
        words = slice(rows.start // 8, rows.stop // 8)
        codes = _columns_of_words(qweight[:, words])
        scale = scales[:, rows].t()
        zeros = None if qzeros is None else _columns_of_words(qzeros[:, words])
    elif version == "gemv":
        codes = _nibbles(qweight[rows])
        scale = scales[rows]
        zeros = None if qzeros is None else _nibbles(qzeros[rows])
    else:
        codes = _interleaved(qweight[rows.start // 4 : rows.stop // 4])
        scale = scales[:, rows].t()
        zeros = None if qzeros is None else qzeros[:, rows].t()
    groups = codes.shape[1] // group
    scale = scale[:, :groups].float().contiguous()
    if zeros is None:
        return GroupedCodes(codes, BITS, group, scale, center=_MIDDLE)
    zeros = zeros[:, :groups].float()
    offset = zeros if version == "gemv_fast" else -(zeros * scale)
    return GroupedCodes(codes, BITS, group, scale, offset=offset.contiguous())


def _columns_of_words(words: Tensor) -> Tensor:
    """int32 [X, W] -> uint8 [8 * W, X]"""
    turned = words.t().contiguous()
    out = torch.empty(turned.shape[0], 8, turned.shape[1], dtype=torch.uint8)
    for row, nibble in enumerate(_NIBBLE_OF_ROW):
        out[:, row] = turned >> 4 * nibble & 15
    return out.flatten(0, 1)


def _nibbles(words: Tensor) -> Tensor:
    """Integers [R, W] -> uint8 [R, ...], each byte's low half first."""
    octets = words.contiguous().view(torch.uint8)
    return torch.stack((octets & 15, octets >> 4), dim=2).flatten(1)


def _interleaved(qweight: Tensor) -> Tensor:
    """int16 [N / 4, K] -> uint8 [N, K].

    The nibbles of a row of qweight are, for every 64 columns, those 64 of row 0, then of rows 1,
    2 and 3. Of 32 columns, written as [i, j, t] with i and j of 4 and t of 2, the nibbles are in
    the order [j, t, i].
    """
    quads = _nibbles(qweight).view(len(qweight), -1, 4, _STRIDE).transpose(1, 2)
    mixed = quads.reshape(4 * len(qweight), -1, 4, 2, 4)
    return mixed.permute(0, 1, 4, 2, 3).flatten(1)

"""Grouped weights on a GPU: which layout holds a part, and which kernel multiplies it.

| part       | what it is                                                                        |
|------------|-----------------------------------------------------------------------------------|
| PackedPart | codes of 2 to 8 bits in planes, unpacked while they are multiplied (`grouped.py`) |
| BytePart   | a scale for each row, activations of eight bits: int8 by int8 (`w8a8.py`)         |
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain

import torch

from quantd.kernels.grouped import GroupedCodes
from quantd.kernels.triton.grouped import grouped_matmul
from quantd.kernels.triton.grouped_layout import (
    PackedPart,
    format_of,
    gather,
    join_parts,
    pack_part,
    unpack_part,
)
from quantd.kernels.triton.w8a8 import (
    BytePart,
    byte_matmul,
    join_bytes,
    pack_bytes,
    quantize_rows,
    unpack_bytes,
)

Part = PackedPart | BytePart


def pack(
    chunks: Iterable[GroupedCodes],
    rows: int,
    columns: int,
    *,
    order: torch.Tensor | None,
    per_row: bool,
    device: torch.device,
) -> Part:
    """As pack_grouped, for codes [rows, columns]; chunks may lie on another device, and may have
    any number of rows."""
    rest = iter(chunks)
    first = next(rest, None)
    if first is None:
        raise ValueError(f"chunks of 0 rows for a weight of {rows}")
    rest = chain((first,), rest)
    if per_row and order is None and _is_int8(first, columns):
        return _pack_int8(rest, rows, columns, device)
    return pack_part(rest, rows, columns, order=order, per_row=per_row, device=device)


def join(parts: Sequence[Part]) -> tuple[Part, ...]:
    """The same rows, neighbours of one format in one part."""
    packed = [part for part in parts if isinstance(part, PackedPart)]
    if len(packed) == len(parts):
        return join_parts(packed)
    whole = [part for part in parts if isinstance(part, BytePart)]
    return (join_bytes(whole),) if len(whole) == len(parts) else tuple(parts)


def unpack(part: Part) -> torch.Tensor:
    """fp32 [rows, columns], columns as the codes lie."""
    return unpack_bytes(part) if isinstance(part, BytePart) else unpack_part(part)


def multiply(x: torch.Tensor, parts: Sequence[Part], bias: torch.Tensor | None) -> torch.Tensor:
    """x [T, K] times the parts transposed, plus bias -> [T, rows of all parts], of x's dtype."""
    out = x.new_empty((x.shape[0], sum(part.rows for part in parts)))
    x, start = x if x.stride(1) == 1 else x.contiguous(), 0
    for part in parts:
        stop = start + part.rows
        _multiply_part(x, part, None if bias is None else bias[start:stop], out[:, start:stop])
        start = stop
    return out


def _multiply_part(
    x: torch.Tensor, part: Part, bias: torch.Tensor | None, out: torch.Tensor
) -> None:
    if isinstance(part, BytePart):
        return byte_matmul(*quantize_rows(x), part, bias, out)
    read = x if part.order is None else gather(x, part.order)
    if part.per_row:
        codes, scale = quantize_rows(read)
        return grouped_matmul(codes, part, bias, out, scale)
    return grouped_matmul(read, part, bias, out)


def _is_int8(chunk: GroupedCodes, columns: int) -> bool:
    symmetric = chunk.center == 128 and chunk.offset is None and chunk.table is None
    return chunk.bits == 8 and symmetric and chunk.group >= columns


def _pack_int8(
    chunks: Iterable[GroupedCodes], rows: int, columns: int, device: torch.device
) -> BytePart:
    codes = torch.empty(rows, columns, dtype=torch.int8, device=device)
    scale = torch.empty(rows, dtype=torch.float32, device=device)
    first, done = None, 0
    for chunk in chunks:
        first, stop = first or chunk, done + len(chunk.codes)
        if format_of(chunk) != format_of(first):
            raise ValueError("chunks of one weight must agree in bits, group, center and table")
        if chunk.codes.shape[1] != columns or stop > rows:
            raise ValueError(
                f"a chunk {list(chunk.codes.shape)} after {done} rows of {[rows, columns]}"
            )
        codes[done:stop] = (chunk.codes.to(device) ^ 128).view(torch.int8)
        scale[done:stop] = chunk.scale[:, 0]
        done = stop
    if done != rows:
        raise ValueError(f"chunks of {done} rows for a weight of {rows}")
    return pack_bytes(codes, scale)

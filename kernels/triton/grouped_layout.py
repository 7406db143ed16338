"""Grouped weights as they lie on a GPU: packed by torch on any device, multiplied by `grouped.py`.

Columns are cut into blocks of 128 and those into eight chunks of sixteen. A word holds eight codes,
one of each chunk, of one row of the weight:

    plane[block, r, n] = sum over j of bits(codes[n, 128 * block + 16 * j + r]) << (j * width)

so a program reads each word once, for consecutive rows n at consecutive addresses, and shifts; and
what it has after a shift are sixteen columns, inside of which the scale never changes. Widths that
are no power of two, and eight bits, are two planes: 3 = 2 + 1, 5 = 4 + 1, 6 = 4 + 2, 8 = 4 + 4, the
low bits first. Words of a plane of 4, 2 and 1 bits are int32, int16 and uint8. Rows are padded to a
multiple of 16, columns to one of 128.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from quantd.kernels.grouped import GroupedCodes
from quantd.kernels.reference.grouped import dequantize_grouped

CHUNK, CHUNKS = 16, 8
BLOCK = CHUNK * CHUNKS
"""Columns that a word spans."""
ROW_MULTIPLE = 16

PLANES = {2: (2, 0), 3: (2, 1), 4: (4, 0), 5: (4, 1), 6: (4, 2), 8: (4, 4)}
"""Bits of a code → bits of its low plane and of its high one, 0 for none."""
_WORDS = {4: torch.int32, 2: torch.int16, 1: torch.uint8}


@dataclass(frozen=True, slots=True)
class PackedPart:
    """Rows of a weight of one format. What `GroupedCodes` says of its fields holds here."""

    low: torch.Tensor
    """[blocks, 16, padded rows]"""
    high: torch.Tensor | None
    rows: int
    columns: int
    """Of the codes."""
    bits: int
    group: int
    scale: torch.Tensor
    """[groups, padded rows], fp16 where that is exact, else fp32."""
    offset: torch.Tensor | None
    center: int
    table: tuple[int, ...]
    """Empty for none."""
    order: torch.Tensor | None
    """int64 [columns] or None, as in pack_grouped."""
    per_row: bool
    """Activations come in eight bits, with a scale for each row."""

    @property
    def nbytes(self) -> int:
        held = (self.low, self.high, self.scale, self.offset)
        return sum(tensor.nbytes for tensor in held if tensor is not None)

    def joins(self, other: PackedPart) -> bool:
        """Whether the rows of both can lie in one part."""
        return _marks(self) == _marks(other) and (
            self.order is other.order
            if self.order is None or other.order is None
            else torch.equal(self.order, other.order)
        )


def pack_part(
    chunks: Iterable[GroupedCodes],
    rows: int,
    columns: int,
    *,
    order: torch.Tensor | None,
    per_row: bool,
    device: torch.device,
) -> PackedPart:
    """As pack_grouped, for codes [rows, columns]; chunks may lie on another device."""
    first, done = None, 0
    scales, offsets = [], []
    for chunk in chunks:
        count = len(chunk.codes)
        if first is None:
            first = chunk
            padded, blocks = _up(rows, ROW_MULTIPLE), -(-columns // BLOCK)
            planes = [
                torch.zeros(blocks, CHUNK, padded, dtype=_WORDS[width], device=device)
                for width in PLANES[chunk.bits]
                if width
            ]
        elif format_of(chunk) != format_of(first):
            raise ValueError("chunks of one weight must agree in bits, group, center and table")
        if chunk.codes.shape[1] != columns or done + count > rows:
            raise ValueError(
                f"a chunk {list(chunk.codes.shape)} after {done} rows of {[rows, columns]}"
            )
        _pack_codes(
            chunk.codes.to(device), chunk.bits, [p[:, :, done : done + count] for p in planes]
        )
        scales.append(chunk.scale.to(device, copy=True))
        if chunk.offset is not None:
            offsets.append(chunk.offset.to(device, copy=True))
        done += count
    if first is None or done != rows:
        raise ValueError(f"chunks of {done} rows for a weight of {rows}")
    return PackedPart(
        low=planes[0],
        high=planes[1] if len(planes) > 1 else None,
        rows=rows,
        columns=columns,
        bits=first.bits,
        group=first.group,
        scale=_by_group(scales, padded),
        offset=_by_group(offsets, padded) if offsets else None,
        center=first.center,
        table=() if first.table is None else tuple(first.table.tolist()),
        order=None if order is None else order.to(device),
        per_row=per_row,
    )


def unpack_part(part: PackedPart) -> torch.Tensor:
    """fp32 [rows, columns], columns as the codes lie: what was packed, bit for bit."""
    codes = torch.zeros(1, dtype=torch.int32, device=part.low.device)
    below = 0
    for plane, width in zip((part.low, part.high), PLANES[part.bits], strict=True):
        if plane is not None:
            shifts = torch.arange(CHUNKS, dtype=torch.int32, device=plane.device) * width
            parted = (plane.int()[:, None] >> shifts[:, None, None]) & ((1 << width) - 1)
            codes = codes | parted << below
            below += width
    codes = codes.flatten(0, 2)[: part.columns, : part.rows].T.to(torch.uint8)
    table = torch.tensor(part.table, dtype=torch.int8, device=codes.device) if part.table else None
    scale, offset = (
        None if t is None else t[:, : part.rows].T.float() for t in (part.scale, part.offset)
    )
    assert scale is not None
    return dequantize_grouped(
        GroupedCodes(codes, part.bits, part.group, scale, offset, part.center, table)
    )


def join_parts(parts: Sequence[PackedPart]) -> tuple[PackedPart, ...]:
    """The same rows in as few parts as neighbours of one format allow."""
    joined: list[list[PackedPart]] = []
    for part in parts:
        if joined and joined[-1][0].joins(part):
            joined[-1].append(part)
        else:
            joined.append([part])
    return tuple(_join(run) for run in joined)


def gather(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Columns of x [T, K] as the codes lie; zero where order is -1."""
    return F.pad(x, (0, 1))[:, order]


def format_of(chunk: GroupedCodes) -> tuple[object, ...]:
    """What all chunks of a weight agree in."""
    table = () if chunk.table is None else tuple(chunk.table.tolist())
    return (chunk.bits, chunk.group, chunk.center, chunk.offset is not None, table)


def _join(parts: list[PackedPart]) -> PackedPart:
    if len(parts) == 1:
        return parts[0]
    first, rows = parts[0], [part.rows for part in parts]
    low = _beside([part.low for part in parts], rows)
    high = [part.high for part in parts if part.high is not None]
    offset = [part.offset for part in parts if part.offset is not None]
    return replace(
        first,
        low=low,
        high=_beside(high, rows) if high else None,
        rows=sum(rows),
        scale=_beside([part.scale for part in parts], rows),
        offset=_beside(offset, rows) if offset else None,
    )


def _beside(tensors: Sequence[torch.Tensor], rows: Sequence[int]) -> torch.Tensor:
    """One after the other in the last dimension without padding between; in fp32 where one is."""
    wide = max((tensor.dtype for tensor in tensors), key=lambda dtype: dtype.itemsize)
    kept = [tensor[..., :count].to(wide) for tensor, count in zip(tensors, rows, strict=True)]
    return F.pad(torch.cat(kept, dim=-1), (0, -sum(rows) % ROW_MULTIPLE)).contiguous()


def _marks(part: PackedPart) -> tuple[object, ...]:
    offset = part.offset is not None
    return (part.columns, part.bits, part.group, part.center, part.table, part.per_row, offset)


def _pack_codes(codes: torch.Tensor, bits: int, planes: list[torch.Tensor]) -> None:
    """codes uint8 [n, K] into planes [blocks, 16, n]."""
    if codes.numel() and int(codes.max()) >> bits:
        raise ValueError(f"a code is not below 2 ** {bits}")
    wide = F.pad(codes, (0, -codes.shape[1] % BLOCK)).T
    by_chunk = wide.reshape(-1, CHUNKS, CHUNK, codes.shape[0]).int()
    below = 0
    for plane, width in zip(planes, PLANES[bits], strict=False):
        word = torch.zeros_like(by_chunk[:, 0])
        for j in range(CHUNKS):
            word |= ((by_chunk[:, j] >> below) & ((1 << width) - 1)) << (j * width)
        plane.copy_(word)
        below += width


def _by_group(per_row: list[torch.Tensor], padded: int) -> torch.Tensor:
    """[n, groups] each -> [groups, padded], fp16 where that is exact."""
    wide = torch.cat(per_row).T
    wide = F.pad(wide, (0, padded - wide.shape[1])).contiguous()
    narrow = wide.half()
    return narrow if torch.equal(narrow.float(), wide) else wide


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple

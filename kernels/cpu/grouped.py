"""Grouped weights on the CPU: packed, and which route multiplies them.

A weight is one or more parts whose rows lie one after the other (q, k, v): each part has its own
bits, groups and column order. See csrc/grouped_layout.h for the native layout.

| route  | what it is                                                                             |
|--------|----------------------------------------------------------------------------------------|
| native | csrc/grouped.h: codes times activations of eight bits, or unpacked to fp32 where exact |
| torch  | without the library: dequantized for each call and multiplied in fp32                  |
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from quantd.kernels.cpu.library import Library, open_library
from quantd.kernels.cpu.native_grouped import NativeCall, NativeGrouped, NativePart
from quantd.kernels.grouped import GroupedCodes
from quantd.kernels.reference.grouped import dequantize_grouped, quantize_rows

if TYPE_CHECKING:
    from quantd.kernels.triton.linear import Part as GpuPart


@dataclass(frozen=True, slots=True)
class TorchPart:
    """What GroupedCodes holds, two codes to a byte where they have four bits or fewer."""

    data: torch.Tensor
    rows: int
    columns: int
    bits: int
    group: int
    scale: torch.Tensor
    offset: torch.Tensor | None
    center: int
    table: torch.Tensor | None
    order: torch.Tensor | None
    per_row: bool

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.data, self.scale, self.offset) if t is not None)

    def dequantize(self) -> torch.Tensor:
        codes = self.data
        if self.bits <= 4:
            codes = torch.stack((codes & 15, codes >> 4), dim=2).view(self.rows, -1)
            codes = codes[:, : self.columns]
        return dequantize_grouped(
            GroupedCodes(
                codes, self.bits, self.group, self.scale, self.offset, self.center, self.table
            )
        )


@dataclass(frozen=True, slots=True)
class GroupedWeight:
    """A packed weight. Opaque: made by pack_grouped and join_grouped, read by grouped_linear."""

    parts: tuple[NativePart | TorchPart, ...]
    call: NativeCall | None
    """What the native route reads; None on the torch route."""
    shape: tuple[int, int]
    """(out_features, in_features)"""
    exact: bool
    per_row: bool
    route: str
    """native or torch; triton on a GPU."""
    nbytes: int
    gpu_parts: tuple[GpuPart, ...] = ()
    """What it consists of on a GPU, in the place of `parts`."""


@cache
def native_grouped() -> NativeGrouped | None:
    """The native operations at the best level of this machine, or None."""
    library = open_library()
    return NativeGrouped(library, library.best_level) if isinstance(library, Library) else None


def grouped_route() -> str:
    """Which route pack_grouped takes in this process."""
    return "torch" if native_grouped() is None else "native"


def pack_grouped(
    chunks: Iterable[GroupedCodes],
    shape: tuple[int, int],
    *,
    order: torch.Tensor | None = None,
    exact: bool = False,
    per_row: bool = False,
) -> GroupedWeight:
    """As kernels/grouped_linear.py has it, for the CPU."""
    rows, columns = shape
    if order is not None:
        order = checked_order(order, columns)
        columns = order.numel()
    native = native_grouped()
    part: NativePart | TorchPart
    if native is None:
        part = _pack_torch(chunks, rows, columns, order, per_row)
    else:
        part = native.pack(chunks, rows, columns, order=order, exact=exact, per_row=per_row)
    return _weight((part,), shape, exact, per_row)


def join_grouped(weights: Sequence[GroupedWeight]) -> GroupedWeight:
    """One weight of these, their rows one after the other; all with the same in_features."""
    columns = weights[0].shape[1]
    if any(w.shape[1] != columns for w in weights):
        raise ValueError(f"in_features differ: {[w.shape[1] for w in weights]}")
    return _weight(
        tuple(part for w in weights for part in w.parts),
        (sum(w.shape[0] for w in weights), columns),
        all(w.exact for w in weights),
        all(w.per_row for w in weights),
    )


def unpack_grouped(w: GroupedWeight) -> torch.Tensor:
    """The weight [N, K] that is multiplied by, fp32, columns in the order of the activations."""
    out = [in_order(_unpack(part), part.order, w.shape[1]) for part in w.parts]
    return torch.cat(out) if len(out) > 1 else out[0]


def checked_order(order: torch.Tensor, columns: int) -> torch.Tensor:
    """As int64. Raises ValueError where it names a column that activations do not have."""
    order = order.to(torch.int64).contiguous()
    if order.dim() != 1 or (order.numel() and not -1 <= order.min() <= order.max() < columns):
        raise ValueError(f"order must be one row of numbers from -1 to {columns - 1}")
    return order


def in_order(values: torch.Tensor, order: torch.Tensor | None, columns: int) -> torch.Tensor:
    """values [N, K'] as the codes lie -> [N, columns] as the activations do."""
    if order is None:
        return values
    kept = order >= 0
    plain = values.new_zeros(values.shape[0], columns)
    # A column of the activations may meet several columns of codes.
    return plain.index_add_(1, order[kept], values[:, kept])


def grouped_linear(x: torch.Tensor, w: GroupedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """x [T, K] times w transposed plus bias [N] -> [T, N] of x's dtype, fp32 inside."""
    if x.shape[0] == 0:
        return x.new_empty((0, w.shape[0]))
    native = native_grouped()
    if native is not None and w.call is not None:
        return native.linear(x, w.call, bias)
    wide, outputs = x.float(), []
    for part in w.parts:
        read = wide if part.order is None else _gather(wide, part.order)
        if isinstance(part, TorchPart) and part.per_row:
            codes, scale = quantize_rows(read, None)
            read = codes.float() * scale
        outputs.append(F.linear(read, _unpack(part)))
    out = torch.cat(outputs, dim=1)
    return (out if bias is None else out.add_(bias.float())).to(x.dtype)


def _weight(
    parts: tuple[NativePart | TorchPart, ...], shape: tuple[int, int], exact: bool, per_row: bool
) -> GroupedWeight:
    native = [part for part in parts if isinstance(part, NativePart)]
    if native and len(native) != len(parts):
        raise ValueError("weights of different routes cannot be joined")
    call = NativeCall(native, shape[1]) if native else None
    nbytes = sum(part.nbytes for part in parts)
    return GroupedWeight(
        parts, call, shape, exact, per_row, "native" if native else "torch", nbytes
    )


def _unpack(part: NativePart | TorchPart) -> torch.Tensor:
    if isinstance(part, TorchPart):
        return part.dequantize()
    native = native_grouped()
    assert native is not None
    return native.unpack(part)


def _gather(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    return F.pad(x, (0, 1))[:, order]


def _pack_torch(
    chunks: Iterable[GroupedCodes],
    rows: int,
    columns: int,
    order: torch.Tensor | None,
    per_row: bool,
) -> TorchPart:
    packed, scales, offsets, first = [], [], [], None
    for chunk in chunks:
        first = first or chunk
        if chunk.codes.shape[1] != columns:
            raise ValueError(f"a chunk {list(chunk.codes.shape)} for {columns} columns")
        codes = chunk.codes
        if chunk.bits <= 4:
            even = F.pad(codes, (0, columns % 2))
            codes = even[:, ::2] | even[:, 1::2] << 4
        packed.append(codes if codes is not chunk.codes else codes.clone())
        scales.append(chunk.scale.clone())
        if chunk.offset is not None:
            offsets.append(chunk.offset.clone())
    if first is None or sum(len(codes) for codes in packed) != rows:
        raise ValueError(f"chunks of {sum(map(len, packed))} rows for a weight of {rows}")
    return TorchPart(
        torch.cat(packed),
        rows,
        columns,
        first.bits,
        first.group,
        torch.cat(scales),
        torch.cat(offsets) if offsets else None,
        first.center,
        first.table,
        order,
        per_row,
    )

"""The native library's grouped weights: packing, unpacking and multiplying (csrc/grouped.h)."""

import ctypes
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from quantd.kernels.cpu.library import Library
from quantd.kernels.cpu.memory import empty_weight
from quantd.kernels.cpu.native import DTYPES
from quantd.kernels.grouped import GroupedCodes

PANEL_ROWS = 16
MOST_PARTS = 16
_OFFSET, _TABLE, _WIDE = 1, 2, 4
_PER_BLOCK, _PER_ROW, _FLOATS = 0, 1, 2

_int, _long, _pointer = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p


class _Part(ctypes.Structure):
    """struct g_part"""

    _fields_ = [
        ("data", _pointer),
        ("rows", _long),
        ("columns", _long),
        ("group", _long),
        ("bits", ctypes.c_int32),
        ("center", ctypes.c_int32),
        ("input", ctypes.c_int32),
        ("flags", ctypes.c_int32),
        ("table", ctypes.c_int8 * 16),
    ]


class _Source(ctypes.Structure):
    """struct g_source"""

    _fields_ = [("order", _pointer), ("columns", _long), ("kind", ctypes.c_int32)]


@dataclass(frozen=True, slots=True)
class NativePart:
    """A packed weight."""

    data: torch.Tensor
    """uint8, the panels."""
    rows: int
    columns: int
    """Of the codes."""
    bits: int
    group: int
    center: int
    flags: int
    table: tuple[int, ...]
    order: torch.Tensor | None
    """int64 [columns] or None, as in pack_grouped."""
    kind: int
    """How activations come in: eight bits per block or per row, or fp32."""

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def reads_as(self, other: "NativePart") -> bool:
        """Whether one reading of the activations serves both."""
        if self.kind != other.kind or self.columns != other.columns:
            return False
        if self.order is None or other.order is None:
            return self.order is other.order
        return torch.equal(self.order, other.order)


class NativeCall:
    """The parts that one call multiplies by, as C reads them; keeps them alive."""

    __slots__ = ("columns", "parts", "rows", "sources", "structs")

    def __init__(self, parts: Sequence[NativePart], columns: int) -> None:
        if len(parts) > MOST_PARTS:
            raise ValueError(f"{len(parts)} parts, at most {MOST_PARTS} can be joined")
        self.parts = tuple(parts)
        self.columns = columns
        self.rows = sum(part.rows for part in parts)
        readers: list[NativePart] = []
        self.structs = (_Part * len(parts))()
        for i, part in enumerate(parts):
            if not any(part.reads_as(reader) for reader in readers):
                readers.append(part)
            found = next(i for i, reader in enumerate(readers) if part.reads_as(reader))
            self.structs[i] = _struct(part, found)
        self.sources = (_Source * len(readers))()
        for i, reader in enumerate(readers):
            order = None if reader.order is None else reader.order.data_ptr()
            self.sources[i] = _Source(order, reader.columns, reader.kind)


class NativeGrouped:
    """Grouped weights at one level of the instruction set; the layout is the same at every level.

    Sizes that disagree are a ValueError, because C would read beyond them.
    """

    def __init__(self, library: Library, level: str) -> None:
        def bind(name: str, *arguments: type, result: type = _int) -> Callable[..., int]:
            symbol = f"quantd_grouped_{name}_{level}"
            function: Any = getattr(library.handle, symbol)
            function.argtypes = (_int, _int, *arguments)
            function.restype = result
            bound: Callable[..., int] = function
            return bound

        self.level = level
        read = (_long, _long, _pointer, _long, _int, _pointer, _int, _pointer)
        self._linear = bind("linear", *read, _pointer, _int, _pointer)
        self._pack = bind("pack", _pointer, _long, _long, *(_pointer,) * 3)
        self._unpack = bind("unpack", _pointer, _pointer)
        self._panel_bytes = bind("panel_bytes", _pointer, result=_long)

    def pack(
        self,
        chunks: Iterable[GroupedCodes],
        rows: int,
        columns: int,
        *,
        order: torch.Tensor | None,
        exact: bool,
        per_row: bool,
    ) -> NativePart:
        """As pack_grouped, for codes [rows, columns]."""
        part, done = None, 0
        for chunk in chunks:
            if part is None:
                kind = _PER_ROW if per_row else _FLOATS if exact else _PER_BLOCK
                part = self._empty(chunk, rows, columns, order, exact, kind)
            elif _kind_of(chunk) != (part.bits, part.group, part.center, *_marks(part)):
                raise ValueError("chunks of one weight must agree in bits, group, center and table")
            count = len(chunk.codes)
            if chunk.codes.shape[1] != columns or done % PANEL_ROWS or done + count > rows:
                raise ValueError(
                    f"a chunk {list(chunk.codes.shape)} after {done} rows of {[rows, columns]}"
                )
            self._pack_chunk(part, done // PANEL_ROWS, chunk)
            done += count
        if part is None or done != rows:
            raise ValueError(f"chunks of {done} rows for a weight of {rows}")
        return part

    def _empty(
        self,
        chunk: GroupedCodes,
        rows: int,
        columns: int,
        order: torch.Tensor | None,
        exact: bool,
        kind: int,
    ) -> NativePart:
        flags = 0 if chunk.offset is None else _OFFSET
        flags |= 0 if chunk.table is None else _TABLE
        flags |= _WIDE if exact else 0
        table = () if chunk.table is None else tuple(chunk.table.tolist())
        nothing = torch.empty(0, dtype=torch.uint8)
        shape = (rows, columns, chunk.bits, chunk.group, chunk.center, flags, table, order, kind)
        size = self._panel_bytes(0, 0, ctypes.byref(_struct(NativePart(nothing, *shape))))
        panels = empty_weight((-(-rows // PANEL_ROWS), size), torch.uint8)
        return NativePart(panels, *shape)

    def _pack_chunk(self, part: NativePart, first_panel: int, chunk: GroupedCodes) -> None:
        codes, scale = chunk.codes.contiguous(), chunk.scale.contiguous()
        offset = None if chunk.offset is None else chunk.offset.contiguous()
        for name, tensor, dtype in (
            ("codes", codes, torch.uint8),
            ("scale", scale, torch.float32),
            ("offset", offset, torch.float32),
        ):
            if tensor is not None and tensor.dtype != dtype:
                raise ValueError(f"{name} are {tensor.dtype}, must be {dtype}")
        problem = self._pack(
            torch.get_num_threads(),
            0,
            ctypes.byref(_struct(part)),
            first_panel,
            len(codes),
            codes.data_ptr(),
            scale.data_ptr(),
            None if offset is None else offset.data_ptr(),
        )
        if problem:
            raise ValueError(f"a code is not below 2 ** {part.bits}")

    def unpack(self, part: NativePart) -> torch.Tensor:
        """fp32 [rows, columns], columns as the codes lie."""
        out = torch.empty(part.rows, part.columns)
        self._unpack(torch.get_num_threads(), 0, ctypes.byref(_struct(part)), out.data_ptr())
        return out

    def linear(self, x: torch.Tensor, call: NativeCall, bias: torch.Tensor | None) -> torch.Tensor:
        """x [T, columns of the call] -> [T, rows of the call], of x's dtype."""
        rows, columns = x.shape
        if columns != call.columns or x.dtype not in DTYPES:
            raise ValueError(f"x is {x.dtype} {list(x.shape)} for {call.columns} columns")
        if bias is not None and (
            bias.shape != (call.rows,) or bias.dtype not in DTYPES or not bias.is_contiguous()
        ):
            raise ValueError(f"bias is {bias.dtype} {list(bias.shape)} for {call.rows} rows")
        out = torch.empty((rows, call.rows), dtype=x.dtype)
        if not rows:
            return out
        if x.stride(1) != 1:
            x = x.contiguous()
        problem = self._linear(
            torch.get_num_threads(),
            DTYPES[x.dtype],
            rows,
            call.rows,
            x.data_ptr(),
            x.stride(0),
            len(call.structs),
            call.structs,
            len(call.sources),
            call.sources,
            None if bias is None else bias.data_ptr(),
            0 if bias is None else DTYPES[bias.dtype],
            out.data_ptr(),
        )
        if problem:
            raise MemoryError("the native library could not allocate its scratch memory")
        return out


def _struct(part: NativePart, source: int = 0) -> _Part:
    table = (*part.table, *(0,) * (16 - len(part.table)))
    return _Part(
        part.data.data_ptr(),
        part.rows,
        part.columns,
        part.group,
        part.bits,
        part.center,
        source,
        part.flags,
        (ctypes.c_int8 * 16)(*table),
    )


def _kind_of(chunk: GroupedCodes) -> tuple[object, ...]:
    table = () if chunk.table is None else tuple(chunk.table.tolist())
    return (chunk.bits, chunk.group, chunk.center, chunk.offset is not None, table)


def _marks(part: NativePart) -> tuple[object, ...]:
    return (bool(part.flags & _OFFSET), part.table)

"""GGUF's quantized types, any of them in any part of a layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from quantd.kernels import ops
from quantd.plugins import parts
from quantd.plugins.api import Description, LinearSpec, QuantLinear, TensorSource
from quantd.plugins.gguf.format import BLOCKS, unpack
from quantd.plugins.grouped import GroupedLinear, Part

_FLOATS = frozenset({"BF16", "F16", "F32"})
_CHUNK_VALUES = 1 << 20
"""Unpacked at a time: so many that the calls cost little, so few that loading takes no memory to
speak of and finds them in the last cache."""
_CHUNK_ROWS = 16
"""A chunk's rows are a multiple of this, as packing wants."""


class GgufQuantizer:
    """Claims layers of which at least one part has blocks; the other parts may be plain."""

    name = "gguf"
    api_version = 1

    def claims(self, spec: LinearSpec, source: TensorSource) -> bool:
        present = source.names()
        names = [f"{part}.weight" for part in spec.parts]
        if not all(name in present for name in names):
            return False
        types = {source.dtype(name) for name in names}
        return bool(types & BLOCKS.keys()) and types <= BLOCKS.keys() | _FLOATS

    def refuses(self, spec: LinearSpec, device: torch.device) -> str | None:
        return parts.why_not(spec, device)

    def tensors(self, spec: LinearSpec, source: TensorSource) -> Mapping[str, tuple[int, ...]]:
        return parts.plain_shapes(spec)

    def describe(self, spec: LinearSpec, source: TensorSource, device: torch.device) -> Description:
        texts, nbytes = [], 0
        for part, rows in zip(spec.parts, spec.part_rows, strict=True):
            kind = source.dtype(f"{part}.weight")
            if kind in BLOCKS:
                # What a block becomes is the same for all of its type.
                codes = unpack(kind, torch.zeros(1, BLOCKS[kind][1], dtype=torch.uint8))
                text, size = _text(kind, codes), _row_bytes(codes, spec)
            else:
                text, size = parts.plain_row(spec, part, source, device)
            texts.append(text)
            nbytes += rows * size
        return Description("; ".join(dict.fromkeys(texts)), nbytes, ops.grouped_route(device))

    def dequantize_rows(self, name: str, source: TensorSource, rows: Tensor) -> Tensor:
        data, kind = source.read(name)[rows], source.dtype(name)
        return data.float() if kind in _FLOATS else ops.dequantize_grouped(unpack(kind, data))

    def load(self, spec: LinearSpec, source: TensorSource, device: torch.device) -> QuantLinear:
        loaded = [_load_part(spec, source, part, device) for part in spec.parts]
        return GroupedLinear(loaded, parts.load_bias(spec, source, device))


def _text(kind: str, codes: ops.GroupedCodes) -> str:
    table = " of a table" if codes.table is not None else ""
    return f"{kind}: {codes.bits} bits{table}, groups of {codes.group}"


def _row_bytes(codes: ops.GroupedCodes, spec: LinearSpec) -> int:
    scales = 1 if codes.offset is None else 2
    groups = -(-spec.in_features // codes.group)
    return spec.in_features * codes.bits // 8 + groups * scales * (4 if spec.exact else 2)


def _load_part(spec: LinearSpec, source: TensorSource, part: str, device: torch.device) -> Part:
    name = f"{part}.weight"
    kind = source.dtype(name)
    if kind not in BLOCKS:
        return parts.plain_part(spec, part, source, device)
    rows, columns = source.shape(name)
    chunks = _chunks(kind, source.read(name), spec.in_features)
    packed = ops.pack_grouped(chunks, (rows, columns), exact=spec.exact, device=device)
    source.release(name)
    return packed


def _chunks(kind: str, stored: Tensor, columns: int) -> Iterator[ops.GroupedCodes]:
    rows = max(_CHUNK_ROWS, _CHUNK_VALUES // columns // _CHUNK_ROWS * _CHUNK_ROWS)
    for start in range(0, len(stored), rows):
        yield unpack(kind, stored[start : start + rows])

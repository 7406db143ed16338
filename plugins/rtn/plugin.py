"""Formats that are made from plain weights while they load: int8, w8a8 and int4.

No checkpoint has them, so they take a layer by a rule only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from quantd.kernels import ops
from quantd.plugins import parts
from quantd.plugins.api import Description, LinearSpec, QuantLinear, Refused, TensorSource
from quantd.plugins.grouped import GroupedLinear
from quantd.plugins.rtn.codes import INT4_GROUP, int4_codes, int8_codes

_FLOATS = frozenset({"BF16", "F16", "F32"})
_CHUNK_VALUES = 1 << 17
"""Rounded at a time: so few that what int4 tries stays in the cache."""
_CHUNK_ROWS = 16
"""A chunk's rows are a multiple of this, as packing wants."""


class _Rounded:
    """Common to the three."""

    name = ""
    api_version = 1
    from_plain = True
    _text = ""
    _per_row = False

    def claims(self, spec: LinearSpec, source: TensorSource) -> bool:
        return False

    def refuses(self, spec: LinearSpec, device: torch.device) -> str | None:
        return parts.why_not(spec, device)

    def tensors(self, spec: LinearSpec, source: TensorSource) -> Mapping[str, tuple[int, ...]]:
        shapes = parts.plain_shapes(spec)
        for name in shapes:
            if name in source.names() and source.dtype(name) not in _FLOATS:
                raise Refused(
                    f"{self.name} is made from plain weights, but the tensor {name} is of the type "
                    f"{source.dtype(name)}"
                )
        return shapes

    def describe(self, spec: LinearSpec, source: TensorSource, device: torch.device) -> Description:
        probe = self._codes(torch.zeros(1, 1))
        bits, scales = probe.bits * spec.in_features, 1
        if probe.offset is not None:
            scales = 2 * -(-spec.in_features // probe.group)
        nbytes = spec.out_features * (bits // 8 + scales * (4 if spec.exact else 2))
        return Description(self._text, nbytes, ops.grouped_route(device))

    def dequantize_rows(self, name: str, source: TensorSource, rows: Tensor) -> Tensor:
        raise Refused(f"{self.name} has no tables of embeddings, so it cannot read {name}")

    def load(self, spec: LinearSpec, source: TensorSource, device: torch.device) -> QuantLinear:
        loaded = []
        for part, rows in zip(spec.parts, spec.part_rows, strict=True):
            name = f"{part}.weight"
            chunks = self._chunks(name, source.read(name))
            shape = (rows, spec.in_features)
            packed = ops.pack_grouped(
                chunks, shape, exact=spec.exact, per_row=self._per_row, device=device
            )
            loaded.append(packed)
            source.release(name)
        return GroupedLinear(loaded, parts.load_bias(spec, source, device))

    def _chunks(self, name: str, stored: Tensor) -> Iterator[ops.GroupedCodes]:
        rows = max(_CHUNK_ROWS, _CHUNK_VALUES // stored.shape[1] // _CHUNK_ROWS * _CHUNK_ROWS)
        for start in range(0, len(stored), rows):
            codes = self._codes(stored[start : start + rows].float())
            if not codes.scale.isfinite().all():
                raise Refused(
                    f"{self.name} cannot round the tensor {name}: rows {start} to "
                    f"{min(start + rows, len(stored)) - 1} hold a NaN or an infinity"
                )
            yield codes

    def _codes(self, weight: Tensor) -> ops.GroupedCodes:
        return int8_codes(weight)


class Int8Quantizer(_Rounded):
    """Eight bits, a symmetric scale for each output channel."""

    name = "int8"
    _text = "8 bits, a scale per row, rounded at load"


class W8A8Quantizer(_Rounded):
    """As int8, and activations in eight bits too, with one scale for each token."""

    name = "w8a8"
    _text = "8 bits, a scale per row, rounded at load; activations 8 bits, a scale per token"
    _per_row = True


class Int4Quantizer(_Rounded):
    """Four bits, a scale and an offset for each group of 32."""

    name = "int4"
    _text = f"4 bits, groups of {INT4_GROUP} with offsets, rounded at load"

    def _codes(self, weight: Tensor) -> ops.GroupedCodes:
        return int4_codes(weight)

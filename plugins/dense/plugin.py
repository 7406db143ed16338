"""Weights as they are: bfloat16, float16 and float32, over `kernels.ops.pack_linear`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from quantd.kernels import ops
from quantd.plugins.api import Description, LinearSpec, QuantLinear, TensorSource

_STORED = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


class DenseLinear:
    """One packed weight, and a bias or none."""

    __slots__ = ("_bias", "_weight")

    def __init__(self, weight: ops.LinearWeight, bias: Tensor | None) -> None:
        self._weight = weight
        self._bias = bias

    @property
    def nbytes(self) -> int:
        return self._weight.nbytes + (0 if self._bias is None else self._bias.nbytes)

    @property
    def weight(self) -> ops.Weight | None:
        return self._weight if self._bias is None else None

    def __call__(self, x: Tensor) -> Tensor:
        return ops.linear(x, self._weight, self._bias)

    def dequantize(self) -> Tensor:
        return ops.unpack_linear(self._weight).clone()


class DenseQuantizer:
    """The unquantized format. Weights are held in the spec's dtype, or in the narrower one that the
    checkpoint has where `pack_linear` can multiply by it exactly."""

    name = "dense"
    api_version = 1

    def claims(self, spec: LinearSpec, source: TensorSource) -> bool:
        names = [f"{part}.weight" for part in spec.parts]
        present = source.names()
        return all(name in present and source.dtype(name) in _STORED for name in names)

    def refuses(self, spec: LinearSpec, device: torch.device) -> str | None:
        if not spec.dtype.is_floating_point:
            return f"activations are {spec.dtype}, which is no floating point type"
        return None

    def tensors(self, spec: LinearSpec, source: TensorSource) -> Mapping[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        for part, rows in zip(spec.parts, spec.part_rows, strict=True):
            shapes[f"{part}.weight"] = (rows, spec.in_features)
            if spec.bias:
                shapes[f"{part}.bias"] = (rows,)
        return shapes

    def describe(self, spec: LinearSpec, source: TensorSource, device: torch.device) -> Description:
        stored = sorted({source.dtype(f"{part}.weight") for part in spec.parts})
        held = ops.held_dtype(_read_dtype(spec, source), spec.dtype, device)
        row = spec.in_features * held.itemsize + spec.bias * spec.dtype.itemsize
        text = f"{'/'.join(stored)} held as {held}".replace("torch.", "")
        # The route goes by dtype and device, and packing is what decides.
        route = ops.pack_linear(torch.zeros(1, 1, dtype=spec.dtype, device=device)).route
        return Description(text, row * spec.out_features, route)

    def dequantize_rows(self, name: str, source: TensorSource, rows: Tensor) -> Tensor:
        return source.read(name)[rows].float()

    def load(self, spec: LinearSpec, source: TensorSource, device: torch.device) -> QuantLinear:
        stored, dtype = source.read(f"{spec.parts[0]}.weight"), _read_dtype(spec, source)
        if len(spec.parts) == 1:
            weight = stored.to(device, dtype)
        else:
            weight = torch.empty(spec.out_features, spec.in_features, dtype=dtype, device=device)
            _concatenate(spec, source, "weight", weight)
        packed = ops.pack_linear(weight, spec.dtype)
        if packed.data is stored:
            # A route that keeps the tensor that it is given, which here is the mapped file.
            packed = ops.pack_linear(weight.clone(), spec.dtype)
        source.release(f"{spec.parts[0]}.weight")
        bias = None
        if spec.bias:
            bias = torch.empty(spec.out_features, dtype=spec.dtype, device=device)
            _concatenate(spec, source, "bias", bias)
        return DenseLinear(packed, bias)


def _read_dtype(spec: LinearSpec, source: TensorSource) -> torch.dtype:
    """In which the parts are read: their own where all have one and it is narrower than what the
    spec wants, else the spec's."""
    stored = {_STORED[source.dtype(f"{part}.weight")] for part in spec.parts}
    own = stored.pop()
    return own if not stored and own.itemsize < spec.dtype.itemsize else spec.dtype


def _concatenate(spec: LinearSpec, source: TensorSource, leaf: str, out: Tensor) -> None:
    """Copies every part's tensor into its rows of `out`, and gives its pages back at once."""
    row = 0
    for part, rows in zip(spec.parts, spec.part_rows, strict=True):
        out[row : row + rows].copy_(source.read(f"{part}.{leaf}"))
        source.release(f"{part}.{leaf}")
        row += rows

"""What the formats share: shapes, plain parts, biases, rows at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from quantd.kernels import ops
from quantd.plugins.api import LinearSpec, Refused, TensorSource
from quantd.plugins.grouped import Part

FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
INTEGERS = frozenset({"I32"})
SHORTS = frozenset({"I16"})
_CHUNK_VALUES = 1 << 20
"""Unpacked at a time, which bounds what loading holds beside the packed weight."""
_CHUNK_ROWS = 32
"""A chunk's rows are a multiple of this: packing wants 16, whole words of three bits want 32."""


def quantization_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Empty when config.json has none. Raises Refused when it is no object."""
    value = config.get("quantization_config") or {}
    if not isinstance(value, Mapping):
        raise Refused(f"quantization_config is {value!r}, must be an object")
    return value


def plain_shapes(spec: LinearSpec) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a layer whose parts have a weight each."""
    shapes: dict[str, tuple[int, ...]] = {}
    for part, rows in zip(spec.parts, spec.part_rows, strict=True):
        shapes[f"{part}.weight"] = (rows, spec.in_features)
        if spec.bias:
            shapes[f"{part}.bias"] = (rows,)
    return shapes


def is_packed(part: str, source: TensorSource) -> bool:
    """Parts that a tool left alone have a plain weight instead."""
    return f"{part}.qweight" in source.names()


def all_present(spec: LinearSpec, source: TensorSource) -> bool:
    """Is every part packed or plain, and at least one packed?"""
    packed = [is_packed(part, source) for part in spec.parts]
    names = source.names()
    plain = [f"{part}.weight" in names for part in spec.parts]
    return any(packed) and all(a or b for a, b in zip(packed, plain, strict=True))


def why_not(spec: LinearSpec, device: torch.device) -> str | None:
    """Of a grouped layer."""
    if not spec.dtype.is_floating_point:
        return f"activations are {spec.dtype}, which is no floating point type"
    return ops.grouped_problem(device, spec.dtype)


def check_type(name: str, source: TensorSource, allowed: Collection[str]) -> None:
    """Raises Refused."""
    if source.dtype(name) not in allowed:
        listed = ", ".join(sorted(allowed))
        raise Refused(f"the tensor {name} is of the type {source.dtype(name)}, must be {listed}")


def take(name: str, source: TensorSource) -> Tensor:
    """A copy of a small tensor; its pages go back."""
    copy = source.read(name).clone()
    source.release(name)
    return copy


def plain_row(
    spec: LinearSpec, part: str, source: TensorSource, device: torch.device
) -> tuple[str, int]:
    """A part that `plain_part` would load: how it is held, and the bytes of one of its rows."""
    held = ops.held_dtype(FLOATS[source.dtype(f"{part}.weight")], spec.dtype, device)
    return f"plain {held}".replace("torch.", ""), spec.in_features * held.itemsize


def plain_part(spec: LinearSpec, part: str, source: TensorSource, device: torch.device) -> Part:
    name = f"{part}.weight"
    check_type(name, source, FLOATS)
    held = ops.held_dtype(FLOATS[source.dtype(name)], spec.dtype, device)
    # A copy in any case: a route of pack_linear may keep the tensor that it is given.
    packed = ops.pack_linear(source.read(name).to(device, held, copy=True), spec.dtype)
    source.release(name)
    return packed


def bias_names(spec: LinearSpec, source: TensorSource) -> Iterator[tuple[str, int]]:
    """(name, rows) of the biases that the layer has, or that a tool wrote although it has none."""
    names = source.names()
    for part, rows in zip(spec.parts, spec.part_rows, strict=True):
        name = f"{part}.bias"
        if spec.bias or (name in names and is_packed(part, source)):
            yield name, rows


def load_bias(spec: LinearSpec, source: TensorSource, device: torch.device) -> Tensor | None:
    """Raises Refused for a bias that is not zero in a model that has none."""
    biases = []
    for name, _ in bias_names(spec, source):
        check_type(name, source, FLOATS)
        bias = take(name, source).to(device, spec.dtype)
        if not spec.bias and bias.any():
            raise Refused(
                f"the tensor {name} is not zero, but by config.json this layer has no bias"
            )
        biases.append(bias)
    return torch.cat(biases) if spec.bias else None


def row_chunks(rows: int, columns: int) -> Iterator[slice]:
    """All rows in chunks, each but the last a multiple of 32."""
    step = max(_CHUNK_ROWS, _CHUNK_VALUES // columns // _CHUNK_ROWS * _CHUNK_ROWS)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))

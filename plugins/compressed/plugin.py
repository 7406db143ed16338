"""compressed-tensors checkpoints: integer weights, packed or not, and W8A8 with dynamic tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from quantd.kernels import ops
from quantd.plugins import parts
from quantd.plugins.api import Description, LinearSpec, QuantLinear, Refused, TensorSource
from quantd.plugins.compressed.format import grouped, order_of, raise_codes, unpack_columns
from quantd.plugins.compressed.scheme import Scheme, is_compressed, scheme_of
from quantd.plugins.grouped import GroupedLinear, Part

_FLOATS = frozenset({"BF16", "F16", "F32"})
_CHUNK_VALUES = 1 << 19
"""Unpacked at a time: so few that they are still in the cache when they are packed."""
_CHUNK_ROWS = 16
_GROUP_MULTIPLE = 16


class CompressedTensorsQuantizer:
    """Claims layers of which at least one part is quantized; the other parts may be plain."""

    name = "compressed_tensors"
    api_version = 1

    def claims(self, spec: LinearSpec, source: TensorSource) -> bool:
        if not is_compressed(source.config):
            return False
        plain = [_is_plain(source, part) for part in spec.parts]
        return not all(plain)

    def refuses(self, spec: LinearSpec, device: torch.device) -> str | None:
        return parts.why_not(spec, device)

    def tensors(self, spec: LinearSpec, source: TensorSource) -> Mapping[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        for part, rows in zip(spec.parts, spec.part_rows, strict=True):
            if _is_plain(source, part):
                shapes[f"{part}.weight"] = (rows, spec.in_features)
            else:
                scheme = scheme_of(source.config, part)
                shapes |= _shapes(scheme, source, part, rows, spec.in_features)
            if spec.bias:
                shapes[f"{part}.bias"] = (rows,)
        return shapes

    def describe(self, spec: LinearSpec, source: TensorSource, device: torch.device) -> Description:
        texts, nbytes = [], 0
        for part, rows in zip(spec.parts, spec.part_rows, strict=True):
            if _is_plain(source, part):
                text, size = parts.plain_row(spec, part, source, device)
                texts.append(text)
                nbytes += rows * size
                continue
            scheme = scheme_of(source.config, part)
            groups = -(-spec.in_features // _group(scheme, spec.in_features))
            texts.append(_text(scheme))
            scales = groups * (1 if scheme.symmetric else 2) * (4 if spec.exact else 2)
            nbytes += rows * (spec.in_features * scheme.bits // 8 + scales)
        return Description(" / ".join(dict.fromkeys(texts)), nbytes, ops.grouped_route(device))

    def dequantize_rows(self, name: str, source: TensorSource, rows: Tensor) -> Tensor:
        raise Refused(f"{self.name} has no tables of embeddings, so it cannot read {name}")

    def load(self, spec: LinearSpec, source: TensorSource, device: torch.device) -> QuantLinear:
        loaded = [
            _load_part(spec, source, part, rows, device)
            for part, rows in zip(spec.parts, spec.part_rows, strict=True)
        ]
        return GroupedLinear(loaded, _bias(spec, source, device) if spec.bias else None)


def _is_plain(source: TensorSource, part: str) -> bool:
    name = f"{part}.weight"
    return name in source.names() and source.dtype(name) in _FLOATS


def _shapes(
    scheme: Scheme, source: TensorSource, part: str, rows: int, columns: int
) -> dict[str, tuple[int, ...]]:
    packed = _is_packed(source, part)
    groups = -(-columns // _group(scheme, columns))
    per_group: tuple[int, ...] = (rows, groups)
    if scheme.strategy == "tensor":
        per_group = _one(source, f"{part}.weight_scale")
    words = -(-columns * scheme.bits // 32)
    shapes: dict[str, tuple[int, ...]] = {f"{part}.weight_scale": per_group}
    if packed:
        shapes |= {f"{part}.weight_packed": (rows, words), f"{part}.weight_shape": (2,)}
    else:
        shapes[f"{part}.weight"] = (rows, columns)
    if not scheme.symmetric:
        down = (-(-rows * scheme.bits // 32), groups)
        name = f"{part}.weight_zero_point"
        if scheme.strategy == "tensor":
            shapes[name] = _one(source, name)
        else:
            shapes[name] = down if packed else per_group
    if scheme.act_order and f"{part}.weight_g_idx" in source.names():
        shapes[f"{part}.weight_g_idx"] = (columns,)
    _check_types(source, part, shapes)
    return shapes


def _one(source: TensorSource, name: str) -> tuple[int, ...]:
    """The shape of a tensor that holds one number: there are files with any of three."""
    given = source.shape(name) if name in source.names() else (1,)
    return given if given in ((), (1, 1)) else (1,)


def _check_types(source: TensorSource, part: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    zeros = "I32" if f"{part}.weight_packed" in shapes else "I8"
    wanted = {
        "weight": ("I8",),
        "weight_packed": ("I32",),
        "weight_scale": tuple(sorted(_FLOATS)),
        "weight_shape": ("I32", "I64"),
        "weight_zero_point": (zeros,),
        "weight_g_idx": ("I32", "I64"),
    }
    for name in shapes:
        allowed = wanted[name.rpartition(".")[2]]
        if name in source.names() and source.dtype(name) not in allowed:
            raise Refused(
                f"the tensor {name} is of the type {source.dtype(name)}, must be "
                f"{' or '.join(allowed)}"
            )


def _is_packed(source: TensorSource, part: str) -> bool:
    return f"{part}.weight_packed" in source.names()


def _group(scheme: Scheme, columns: int) -> int:
    return scheme.group or -(-columns // _GROUP_MULTIPLE) * _GROUP_MULTIPLE


def _load_part(
    spec: LinearSpec, source: TensorSource, part: str, rows: int, device: torch.device
) -> Part:
    if _is_plain(source, part):
        return parts.plain_part(spec, part, source, device)
    scheme, columns = scheme_of(source.config, part), spec.in_features
    names = list(_shapes(scheme, source, part, rows, columns))
    if _is_packed(source, part):
        stated = source.read(f"{part}.weight_shape").tolist()
        if stated != [rows, columns]:
            raise Refused(f"the tensor {part}.weight_shape holds {stated}, not {[rows, columns]}")
    index, order = f"{part}.weight_g_idx", None
    if index in names:
        order = order_of(source.read(index), _group(scheme, columns), index)
    packed = ops.pack_grouped(
        _chunks(scheme, source, part, (rows, columns), order),
        (rows, columns),
        order=order,
        exact=spec.exact,
        per_row=scheme.per_token,
        device=device,
    )
    for name in names:
        source.release(name)
    return packed


def _chunks(
    scheme: Scheme, source: TensorSource, part: str, shape: tuple[int, int], order: Tensor | None
) -> Iterator[ops.GroupedCodes]:
    rows, columns = shape
    group, packed = _group(scheme, columns), _is_packed(source, part)
    scale = source.read(f"{part}.weight_scale").float().expand(rows, -(-columns // group))
    zeros = None if scheme.symmetric else _zeros(scheme, source, part, scale.shape)
    stored = source.read(f"{part}.{'weight_packed' if packed else 'weight'}")
    step = max(_CHUNK_ROWS, _CHUNK_VALUES // columns // _CHUNK_ROWS * _CHUNK_ROWS)
    for start in range(0, rows, step):
        chunk = stored[start : start + step]
        codes = unpack_columns(chunk, scheme.bits, columns) if packed else raise_codes(chunk)
        if not packed and scheme.bits < 8:
            # An int8 tensor may hold codes of fewer bits: plus 128, so minus what is too much.
            codes = codes - (128 - (1 << (scheme.bits - 1)))
        if order is not None:
            codes = codes[:, order]
        some = slice(start, start + step)
        zero = None if zeros is None else zeros[some]
        yield grouped(codes, scheme.bits, group, scale[some].contiguous(), zero)


def _zeros(scheme: Scheme, source: TensorSource, part: str, shape: torch.Size) -> Tensor:
    """uint8 [N, G], plus 2 ** (bits - 1)."""
    stored = source.read(f"{part}.weight_zero_point")
    if not _is_packed(source, part):
        return (stored.short() + (1 << (scheme.bits - 1))).to(torch.uint8).expand(shape)
    count = 1 if scheme.strategy == "tensor" else shape[0]
    down = stored.reshape(-1, 1 if count == 1 else shape[1]).t()
    return unpack_columns(down, scheme.bits, count).t().expand(shape)


def _text(scheme: Scheme) -> str:
    size = f"groups of {scheme.group}" if scheme.group else f"a scale per {scheme.strategy}"
    said = [f"{scheme.bits} bits", size]
    if not scheme.symmetric:
        said.append("zero points")
    if scheme.act_order:
        said.append("act-order")
    if scheme.per_token:
        said.append("activations 8 bits per token")
    return ", ".join(said)


def _bias(spec: LinearSpec, source: TensorSource, device: torch.device) -> Tensor:
    biases = []
    for part in spec.parts:
        name = f"{part}.bias"
        if source.dtype(name) not in _FLOATS:
            raise Refused(f"the tensor {name} is of the type {source.dtype(name)}, must be a float")
        biases.append(source.read(name).to(device, spec.dtype, copy=True))
        source.release(name)
    return torch.cat(biases)

"""GPTQ checkpoints of AutoGPTQ, gptqmodel and what writes like them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor

from quantd.kernels import ops
from quantd.plugins import parts
from quantd.plugins.api import Description, LinearSpec, QuantLinear, Refused, TensorSource
from quantd.plugins.gptq.format import (
    Columns,
    Zeros,
    arrange,
    symmetric_version,
    unpack_rows,
    unpack_stream,
    unpack_zeros,
)
from quantd.plugins.gptq.settings import FORMATS, Settings, read_settings
from quantd.plugins.grouped import GroupedLinear, Part

_FORMAT_OF = {version: name for name, version in FORMATS.items()}


class GptqQuantizer:
    """Claims layers of which at least one part is packed; the other parts may be plain."""

    name = "gptq"
    api_version = 1

    def claims(self, spec: LinearSpec, source: TensorSource) -> bool:
        if not parts.all_present(spec, source):
            return False
        method = parts.quantization_config(source.config).get("quant_method")
        if method is None:
            names = source.names()
            packed = [part for part in spec.parts if parts.is_packed(part, source)]
            return all(f"{part}.g_idx" in names for part in packed)
        return bool(method == "gptq")

    def refuses(self, spec: LinearSpec, device: torch.device) -> str | None:
        return parts.why_not(spec, device)

    def tensors(self, spec: LinearSpec, source: TensorSource) -> Mapping[str, tuple[int, ...]]:
        """Raises Refused where config.json and the shapes contradict each other."""
        columns = spec.in_features
        shapes: dict[str, tuple[int, ...]] = {}
        for part, rows in zip(spec.parts, spec.part_rows, strict=True):
            if not parts.is_packed(part, source):
                shapes[f"{part}.weight"] = (rows, columns)
                continue
            absent = _absent(part, source)
            if absent:
                # Named without a shape to compare, so that the checkpoint is said to lack them.
                shapes |= dict.fromkeys(absent, (0,))
                continue
            settings = read_settings(part, columns, rows, source)
            shapes[f"{part}.qweight"] = (columns * settings.bits // 32, rows)
            shapes[f"{part}.qzeros"] = (settings.num_groups, rows * settings.bits // 32)
            shapes[f"{part}.scales"] = (settings.num_groups, rows)
            if f"{part}.g_idx" in source.names():
                shapes[f"{part}.g_idx"] = (columns,)
        shapes |= {name: (rows,) for name, rows in parts.bias_names(spec, source)}
        return shapes

    def dequantize_rows(self, name: str, source: TensorSource, rows: Tensor) -> Tensor:
        raise Refused(f"the tensor {name} cannot be looked up by rows: GPTQ packs along columns")

    def load(self, spec: LinearSpec, source: TensorSource, device: torch.device) -> QuantLinear:
        loaded: list[Part] = []
        for part, rows in zip(spec.parts, spec.part_rows, strict=True):
            if parts.is_packed(part, source):
                loaded.append(_load_part(spec, part, rows, source, device))
            else:
                loaded.append(parts.plain_part(spec, part, source, device))
        return GroupedLinear(loaded, parts.load_bias(spec, source, device))

    def notes(self, spec: LinearSpec, source: TensorSource) -> Collection[str]:
        found = []
        for part, rows in zip(spec.parts, spec.part_rows, strict=True):
            if parts.is_packed(part, source):
                settings = read_settings(part, spec.in_features, rows, source)
                held = _held_version(part, settings, source)
                if held != settings.version:
                    said, read = (_FORMAT_OF[version] for version in (settings.version, held))
                    found.append(
                        f"by quantization_config the zero points are those of {said}, by their "
                        f"values those of {read}, as which they are read"
                    )
        return tuple(dict.fromkeys(found))

    def describe(self, spec: LinearSpec, source: TensorSource, device: torch.device) -> Description:
        texts, nbytes = [], 0
        for part, rows in zip(spec.parts, spec.part_rows, strict=True):
            if not parts.is_packed(part, source):
                text, size = parts.plain_row(spec, part, source, device)
                texts.append(text)
                nbytes += rows * size
                continue
            settings = read_settings(part, spec.in_features, rows, source)
            texts.append(_text(settings, spec.in_features))
            # Four bytes are a scale and an offset of two bytes each, or one that is exact.
            nbytes += rows * (spec.in_features * settings.bits // 8 + 4 * settings.num_groups)
        return Description("; ".join(dict.fromkeys(texts)), nbytes, ops.grouped_route(device))


def _text(settings: Settings, columns: int) -> str:
    whole = settings.group == columns
    groups = "one group per row" if whole else f"groups of {settings.group}"
    kind = "symmetric" if settings.sym else "asymmetric"
    order = ", act-order" if settings.desc_act else ""
    return f"{settings.bits} bits, {groups}, {kind}{order}"


def _held_version(part: str, settings: Settings, source: TensorSource) -> int:
    """The version as which the zero points are read, as `unpack_zeros` decides it."""
    if not settings.sym:
        return settings.version
    name = f"{part}.qzeros"
    parts.check_type(name, source, parts.INTEGERS)
    stored = unpack_stream(parts.take(name, source), settings.bits)
    return symmetric_version(stored, settings.bits) or settings.version


def _absent(part: str, source: TensorSource) -> list[str]:
    names = source.names()
    wanted = [f"{part}.qzeros", f"{part}.scales"]
    return [name for name in wanted if name not in names]


def _load_part(
    spec: LinearSpec, part: str, rows: int, source: TensorSource, device: torch.device
) -> Part:
    settings = read_settings(part, spec.in_features, rows, source)
    parts.check_type(f"{part}.qweight", source, parts.INTEGERS)
    parts.check_type(f"{part}.qzeros", source, parts.INTEGERS)
    parts.check_type(f"{part}.scales", source, parts.FLOATS)
    columns = _columns(part, spec.in_features, settings, source)
    scales = parts.take(f"{part}.scales", source)
    zeros = unpack_zeros(
        parts.take(f"{part}.qzeros", source),
        settings.bits,
        version=settings.version,
        sym=settings.sym,
        carries=settings.carries,
    )
    qweight = source.read(f"{part}.qweight")
    chunks = _chunks(qweight, scales, zeros, columns, settings.bits, spec.in_features)
    shape = rows, spec.in_features
    packed = ops.pack_grouped(chunks, shape, order=columns.order, exact=spec.exact, device=device)
    source.release(f"{part}.qweight")
    return packed


def _chunks(
    qweight: Tensor, scales: Tensor, zeros: Zeros, columns: Columns, bits: int, in_features: int
) -> Iterator[ops.GroupedCodes]:
    for rows in parts.row_chunks(qweight.shape[1], in_features):
        yield unpack_rows(qweight, scales, zeros, columns, bits, rows)


def _columns(part: str, in_features: int, settings: Settings, source: TensorSource) -> Columns:
    name = f"{part}.g_idx"
    in_order = torch.arange(in_features) // settings.group
    if name not in source.names():
        if settings.desc_act:
            raise Refused(f"{_desc_act(part)}, but the tensor {name} is absent")
        return arrange(in_order, settings.num_groups)
    parts.check_type(name, source, parts.INTEGERS)
    g_idx = parts.take(name, source).long()
    lowest, highest = int(g_idx.min()), int(g_idx.max())
    if lowest < 0 or highest >= settings.num_groups:
        raise Refused(
            f"the tensor {name} has numbers from {lowest} to {highest}, "
            f"must be in [0, {settings.num_groups})"
        )
    if highest == 0 and not settings.desc_act:
        # Some tools leave it at zeros where the order of columns is the natural one.
        return arrange(in_order, settings.num_groups)
    return arrange(g_idx, settings.num_groups)


def _desc_act(part: str) -> str:
    return f"{part}: quantization_config.desc_act is true"

"""AWQ checkpoints of AutoAWQ and gptqmodel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quantd.kernels import ops
from quantd.kernels.grouped import GROUP_MULTIPLE
from quantd.plugins import parts
from quantd.plugins.api import Description, LinearSpec, QuantLinear, Refused, TensorSource
from quantd.plugins.awq import format as layout
from quantd.plugins.grouped import GroupedLinear, Part


@dataclass(frozen=True, slots=True)
class Settings:
    """Of one layer."""

    version: str
    group: int
    zeros: bool
    """Zero points are stored."""


class AwqQuantizer:
    """Claims layers of which at least one part is packed; the other parts may be plain."""

    name = "awq"
    api_version = 1

    def claims(self, spec: LinearSpec, source: TensorSource) -> bool:
        method = parts.quantization_config(source.config).get("quant_method")
        return bool(method == "awq") and parts.all_present(spec, source)

    def refuses(self, spec: LinearSpec, device: torch.device) -> str | None:
        return parts.why_not(spec, device)

    def tensors(self, spec: LinearSpec, source: TensorSource) -> Mapping[str, tuple[int, ...]]:
        """Raises Refused for settings that are not known, or that do not fit the layer."""
        shapes: dict[str, tuple[int, ...]] = {}
        for part, rows in zip(spec.parts, spec.part_rows, strict=True):
            if not parts.is_packed(part, source):
                shapes[f"{part}.weight"] = (rows, spec.in_features)
                continue
            settings = _settings(part, rows, spec.in_features, source)
            wanted = layout.shapes(settings.version, rows, spec.in_features, settings.group)
            for leaf, shape in wanted.items():
                if leaf != "qzeros" or settings.zeros:
                    shapes[f"{part}.{leaf}"] = shape
        shapes |= {name: (rows,) for name, rows in parts.bias_names(spec, source)}
        return shapes

    def dequantize_rows(self, name: str, source: TensorSource, rows: Tensor) -> Tensor:
        raise Refused(f"the tensor {name} cannot be looked up by rows: AWQ has no such tables")

    def load(self, spec: LinearSpec, source: TensorSource, device: torch.device) -> QuantLinear:
        loaded: list[Part] = []
        for part, rows in zip(spec.parts, spec.part_rows, strict=True):
            if parts.is_packed(part, source):
                loaded.append(_load_part(spec, part, rows, source, device))
            else:
                loaded.append(parts.plain_part(spec, part, source, device))
        return GroupedLinear(loaded, parts.load_bias(spec, source, device))

    def describe(self, spec: LinearSpec, source: TensorSource, device: torch.device) -> Description:
        texts, nbytes = [], 0
        for part, rows in zip(spec.parts, spec.part_rows, strict=True):
            if not parts.is_packed(part, source):
                text, size = parts.plain_row(spec, part, source, device)
                texts.append(text)
                nbytes += rows * size
                continue
            settings = _settings(part, rows, spec.in_features, source)
            kind = "asymmetric" if settings.zeros else "symmetric"
            texts.append(f"4 bits, groups of {settings.group}, {kind}, {settings.version}")
            nbytes += rows * (spec.in_features // 2 + 4 * spec.in_features // settings.group)
        return Description("; ".join(dict.fromkeys(texts)), nbytes, ops.grouped_route(device))


def _settings(part: str, rows: int, columns: int, source: TensorSource) -> Settings:
    """Raises Refused."""
    config = parts.quantization_config(source.config)
    if config.get("bits", layout.BITS) != layout.BITS:
        raise Refused(f"quantization_config.bits is {config['bits']!r}, must be 4 for AWQ")
    version = config.get("version", config.get("checkpoint_format", "gemm"))
    version = version.lower() if isinstance(version, str) else version
    if version not in layout.VERSIONS:
        known = ", ".join(layout.VERSIONS)
        raise Refused(f"quantization_config.version is {version!r}, must be one of {known}")
    group = config.get("group_size", config.get("q_group_size"))
    if isinstance(group, bool) or not isinstance(group, int) or (group < 1 and group != -1):
        raise Refused(
            f"quantization_config.group_size is {group!r}, must be -1 or a positive number"
        )
    group = columns if group == -1 else group
    _check_multiple(f"{part}: in_features", columns, group, "group_size")
    _check_multiple(f"{part}: in_features", columns, layout.column_multiple(version), version)
    _check_multiple(f"{part}: out_features", rows, layout.row_multiple(version), version)
    _check_multiple("quantization_config.group_size", group, GROUP_MULTIPLE, "awq")
    # Only where config.json says that there are none may they be absent.
    zeros = config.get("zero_point", True) is not False or f"{part}.qzeros" in source.names()
    return Settings(version, group, zeros)


def _check_multiple(what: str, value: int, multiple: int, why: str) -> None:
    if value % multiple:
        raise Refused(f"{what} is {value}, must be a multiple of {multiple} ({why})")


def _load_part(
    spec: LinearSpec, part: str, rows: int, source: TensorSource, device: torch.device
) -> Part:
    settings = _settings(part, rows, spec.in_features, source)
    fast = settings.version == "gemv_fast"
    parts.check_type(f"{part}.qweight", source, parts.SHORTS if fast else parts.INTEGERS)
    parts.check_type(f"{part}.scales", source, parts.FLOATS)
    qzeros = None
    if settings.zeros:
        parts.check_type(f"{part}.qzeros", source, parts.FLOATS if fast else parts.INTEGERS)
        qzeros = parts.take(f"{part}.qzeros", source)
    qweight = source.read(f"{part}.qweight")
    scales = parts.take(f"{part}.scales", source)
    shape = rows, spec.in_features
    packed = ops.pack_grouped(
        _chunks(settings, qweight, qzeros, scales, shape), shape, exact=spec.exact, device=device
    )
    source.release(f"{part}.qweight")
    return packed


def _chunks(
    settings: Settings,
    qweight: Tensor,
    qzeros: Tensor | None,
    scales: Tensor,
    shape: tuple[int, int],
) -> Iterator[ops.GroupedCodes]:
    for rows in parts.row_chunks(*shape):
        yield layout.unpack_rows(settings.version, qweight, qzeros, scales, settings.group, rows)

"""What config.json says of a GPTQ checkpoint, checked against the shapes of its tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quantd.plugins.api import Refused, TensorSource
from quantd.plugins.gptq.format import BITS
from quantd.plugins.parts import quantization_config

FORMATS = {"gptq": 1, "gptq_v2": 2}
"""What config.json calls the versions."""
_WHERE = "quantization_config"


@dataclass(frozen=True, slots=True)
class Settings:
    """Of one part of a layer."""

    bits: int
    group: int
    """Columns of a group as the tools count them; the whole row when they say -1."""
    num_groups: int
    sym: bool
    desc_act: bool
    version: int
    carries: bool
    """The writer is one that adds and subtracts the one of version 1 word by word."""


def read_settings(part: str, in_features: int, rows: int, source: TensorSource) -> Settings:
    """Reads headers only. Raises Refused for what is not GPTQ as we know it."""
    config = quantization_config(source.config)
    said: dict[str, Any] = {**config, **_overrides(part, config)}
    bits = _bits(part, in_features, source)
    _agree(part, "bits", said.get("bits"), bits)
    for what, size in (("in_features", in_features), ("out_features", rows)):
        if size * bits % 32:
            raise Refused(f"{part}: {what} is {size}, which at {bits} bits is no whole words of 32")
    num_groups = source.shape(f"{part}.scales")[0]
    group = _group(part, said.get("group_size"), in_features, num_groups)
    return Settings(
        bits,
        group,
        num_groups,
        sym=_flag(said, "sym"),
        desc_act=_flag(said, "desc_act"),
        version=_version(config),
        carries=_writer(config).startswith("gptqmodel"),
    )


def _bits(part: str, in_features: int, source: TensorSource) -> int:
    shape = source.shape(f"{part}.qweight")
    if len(shape) != 2:
        raise Refused(f"{part}.qweight is {list(shape)}, must have two dimensions")
    bits, rest = divmod(shape[0] * 32, in_features)
    if rest or bits not in BITS:
        raise Refused(
            f"{part}.qweight is {list(shape)}, which for {in_features} columns is "
            f"{shape[0] * 32 / in_features:g} bits, must be one of {', '.join(map(str, BITS))}"
        )
    return bits


def _group(part: str, said: Any, in_features: int, num_groups: int) -> int:
    if said is None:
        if not num_groups or in_features % num_groups:
            raise Refused(f"{part}.scales has {num_groups} groups for {in_features} columns")
        return in_features // num_groups
    if isinstance(said, bool) or not isinstance(said, int) or (said < 1 and said != -1):
        raise Refused(f"{_WHERE}.group_size is {said!r}, must be -1 or a positive number")
    group = in_features if said == -1 else said
    _agree(part, f"group_size {said}, groups", -(-in_features // group), num_groups)
    return group


def _agree(part: str, what: str, said: Any, stored: int) -> None:
    if said is not None and said != stored:
        raise Refused(f"{part}: by {_WHERE} {what} is {said!r}, by the tensors' shapes {stored}")


def _flag(said: Mapping[str, Any], name: str) -> bool:
    value = said.get(name, False)
    if not isinstance(value, bool):
        raise Refused(f"{_WHERE}.{name} is {value!r}, must be true or false")
    return value


def _version(config: Mapping[str, Any]) -> int:
    """AutoGPTQ's files do not say; they are version 1."""
    said = config.get("checkpoint_format", config.get("format")) or "gptq"
    if config.get("is_marlin_format"):
        said = "marlin"
    if not isinstance(said, str) or said not in FORMATS:
        raise Refused(f"{_WHERE}.checkpoint_format is {said!r}, must be gptq or gptq_v2")
    return FORMATS[said]


def _writer(config: Mapping[str, Any]) -> str:
    """The tool that made the file, "" when it does not say."""
    meta = config.get("meta")
    tools = meta.get("quantizer") if isinstance(meta, Mapping) else None
    if isinstance(tools, list) and tools:
        tools = tools[0]
    return tools if isinstance(tools, str) else ""


def _overrides(part: str, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The first rule of `dynamic` that matches: "+:regex" or "regex" changes settings, "-:regex"
    leaves a module alone, which its tensors show."""
    dynamic = config.get("dynamic") or {}
    if not isinstance(dynamic, Mapping):
        raise Refused(f"{_WHERE}.dynamic is {dynamic!r}, must be an object")
    for rule, changes in dynamic.items():
        pattern = rule[2:] if rule.startswith(("+:", "-:")) else rule
        try:
            matches = re.match(pattern, part)
        except re.error as error:
            raise Refused(f"{_WHERE}.dynamic has {rule!r}: {error}") from error
        if matches:
            if rule.startswith("-:"):
                return {}
            if not isinstance(changes, Mapping):
                raise Refused(f"{_WHERE}.dynamic[{rule!r}] is {changes!r}, must be an object")
            return changes
    return {}

"""What quantization_config of a compressed-tensors checkpoint says of one layer.

Supported: integers of 2, 4 or 8 bits for weights, per tensor, channel or group; activations left
alone, or eight bits per token found while it runs. Everything else is refused by its name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quantd.plugins.api import Refused

_FORMATS = frozenset({"pack-quantized", "int-quantized", "naive-quantized", "mixed-precision"})
_PACKED_BITS = (2, 4, 8)
"""Codes of three, five, six and seven bits lie differently in files of different versions."""
_GROUP_MULTIPLE = 16


@dataclass(frozen=True, slots=True)
class Scheme:
    """How the linear layers of one config group are stored."""

    bits: int
    symmetric: bool
    strategy: str
    """tensor, channel or group."""
    group: int | None
    """Columns of a group; None unless the strategy is group."""
    act_order: bool
    """Columns of a group may lie anywhere: there is a weight_g_idx."""
    per_token: bool
    """Activations are rounded to eight bits, with one scale for each token."""


def is_compressed(config: Mapping[str, Any]) -> bool:
    quantization = config.get("quantization_config")
    return (
        isinstance(quantization, Mapping)
        and quantization.get("quant_method") == "compressed-tensors"
    )


def scheme_of(config: Mapping[str, Any], module: str) -> Scheme:
    """Of a module whose tensors are quantized. Raises Refused, naming the field."""
    quantization = config["quantization_config"]
    _check_whole(quantization)
    if any(_matches(module, pattern) for pattern in quantization.get("ignore") or ()):
        raise Refused(f"quantization_config ignores {module}, but its tensors are quantized")
    found = _group_of(quantization, module)
    if found is None:
        raise Refused(f"no target of quantization_config.config_groups matches {module}")
    name, group = found
    at = f"quantization_config.config_groups.{name}"
    if group.get("format") is not None:
        _check_format(f"{at}.format", group["format"])
    if group.get("output_activations") is not None:
        raise Refused(f"{at}.output_activations is set, which is not supported")
    weights = group.get("weights")
    if not isinstance(weights, Mapping):
        raise Refused(f"{at}.weights is {weights!r}, but the tensors of {module} are quantized")
    activations = group.get("input_activations")
    if activations is not None:
        _check_activations(f"{at}.input_activations", activations)
    return _weights(f"{at}.weights", weights, activations is not None)


def _check_whole(quantization: Mapping[str, Any]) -> None:
    at = "quantization_config"
    _check_format(f"{at}.format", quantization.get("format"))
    if quantization.get("kv_cache_scheme") is not None:
        raise Refused(f"{at}.kv_cache_scheme is set, which is not supported")
    for name in ("sparsity_config", "transform_config"):
        value = quantization.get(name)
        if value and not (isinstance(value, Mapping) and value.get("format") == "dense"):
            raise Refused(f"{at}.{name} is set, which is not supported")
    if not isinstance(quantization.get("config_groups"), Mapping):
        raise Refused(f"{at}.config_groups is {quantization.get('config_groups')!r}, no object")


def _check_format(at: str, value: Any) -> None:
    if value not in _FORMATS:
        raise Refused(f"{at} is {value!r}, must be one of {', '.join(sorted(_FORMATS))}")


def _group_of(quantization: Mapping[str, Any], module: str) -> tuple[str, Mapping[str, Any]] | None:
    """The group with the narrowest target: a name, then a regular expression, then a class."""

    def rank(pattern: str) -> int:
        return 2 if pattern == "Linear" else 1 if pattern.startswith("re:") else 0

    found = [
        (rank(target), name)
        for name, group in quantization["config_groups"].items()
        for target in group.get("targets") or ()
        if _matches(module, target)
    ]
    if not found:
        return None
    name = min(found, key=lambda item: item[0])[1]
    return name, quantization["config_groups"][name]


def _matches(module: str, pattern: str) -> bool:
    if pattern.startswith("re:"):
        try:
            return re.match(pattern.removeprefix("re:"), module) is not None
        except re.error as error:
            raise Refused(f"quantization_config: {pattern!r} is no pattern: {error}") from error
    return pattern in (module, "Linear")


def _check_activations(at: str, values: Mapping[str, Any]) -> None:
    if values.get("dynamic") is not True:
        raise Refused(f"{at}.dynamic is {values.get('dynamic')!r}: static scales are not supported")
    wanted = {"type": "int", "num_bits": 8, "symmetric": True, "strategy": "token"}
    for field, value in wanted.items():
        given = values.get(field, value)
        if given != value:
            raise Refused(f"{at}.{field} is {given!r}, must be {value!r}")


def _weights(at: str, values: Mapping[str, Any], per_token: bool) -> Scheme:
    if values.get("type", "int") != "int":
        raise Refused(f"{at}.type is {values['type']!r}, must be 'int'")
    bits = values.get("num_bits", 8)
    if bits not in _PACKED_BITS:
        raise Refused(f"{at}.num_bits is {bits!r}, must be one of {_PACKED_BITS}")
    if values.get("dynamic"):
        raise Refused(f"{at}.dynamic is {values['dynamic']!r}, must be false")
    group = values.get("group_size")
    # An older file need not say its strategy: a group's size means groups.
    strategy = values.get("strategy") or ("group" if group and group > 0 else "tensor")
    if strategy == "group" and group == -1:
        strategy = "channel"
    if strategy not in ("tensor", "channel", "group"):
        raise Refused(f"{at}.strategy is {strategy!r}, must be tensor, channel or group")
    if strategy == "group" and (
        not isinstance(group, int) or group < _GROUP_MULTIPLE or group % _GROUP_MULTIPLE
    ):
        raise Refused(f"{at}.group_size is {group!r}, must be a multiple of {_GROUP_MULTIPLE}")
    act_order = values.get("actorder") in (True, "group", "dynamic") and strategy == "group"
    symmetric = bool(values.get("symmetric", True))
    size = group if strategy == "group" else None
    return Scheme(bits, symmetric, strategy, size, act_order, per_token)

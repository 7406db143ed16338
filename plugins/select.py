"""Which quantizer takes a layer, and why the others did not.

In this order: a rule of the configuration (a glob on the layer's name), what the checkpoint's
tensors are, dense. A rule may name a format that is made from plain weights while they load, but
cannot turn one quantized format into another.

Formats are found by the entry point group `quantd.quantizers` and imported only when a layer needs
an answer from them: a checkpoint of plain weights imports none but dense.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from importlib.metadata import EntryPoint, entry_points
from typing import cast

import torch

from quantd.plugins.api import (
    FromPlain,
    LinearSpec,
    Notes,
    Quantizer,
    Refused,
    TensorSource,
    api_version,
)

GROUP = "quantd.quantizers"
_DENSE = "dense"
_AUTO = "auto"


@dataclass(frozen=True, slots=True)
class Rule:
    """Layers whose name matches `pattern` (a glob) are `quantizer`'s; the first that matches. The
    quantizer "auto" is the one that the checkpoint's tensors ask for."""

    pattern: str
    quantizer: str

    def __str__(self) -> str:
        return f"{self.pattern}={self.quantizer}"


_SPARED = Rule("*.mlp.gate", _AUTO)
"""Before a bare name: layers that pick the experts of a token, by the names that specs have. They
are tiny, and a rounding there changes which weights a token meets at all."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The answer for one layer."""

    layer: str
    quantizer: Quantizer
    reason: str
    refusals: tuple[tuple[str, str], ...] = ()
    """(quantizer, why it did not take the layer), every other one that is installed"""
    stored: str = _DENSE
    """The quantizer whose format the checkpoint's tensors have; a rule may have given the layer to
    another."""


class Registry:
    """The installed formats by name; each is imported once, when it is first asked for.

    `warnings` names those that are broken. A broken format is an error only for the model that a
    rule gives to it, or that nothing else claims.
    """

    def __init__(self, points: Sequence[EntryPoint] | None = None) -> None:
        found = entry_points(group=GROUP) if points is None else points
        self._points = {point.name: point for point in found}
        self._loaded: dict[str, Quantizer] = {}
        self._broken: dict[str, str] = {}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self._points))

    @property
    def warnings(self) -> tuple[str, ...]:
        return tuple(self._broken.values())

    def get(self, name: str) -> Quantizer | None:
        """None when it is not installed or broken; `why_not` has the reason."""
        if name not in self._loaded and name in self._points and name not in self._broken:
            try:
                self._loaded[name] = _instantiate(self._points[name])
            except Exception as error:  # someone else's module may fail in any way
                self._broken[name] = (
                    f"quantizer {name!r} ({self._points[name].value}) could not be loaded: "
                    f"{type(error).__name__}: {error}"
                )
        return self._loaded.get(name)

    def why_not(self, name: str) -> str:
        installed = ", ".join(self.names) or "none"
        return self._broken.get(
            name, f"no quantizer {name!r} is installed (installed: {installed})"
        )


def _instantiate(point: EntryPoint) -> Quantizer:
    quantizer = cast(Quantizer, point.load()())
    if quantizer.api_version != api_version:
        raise TypeError(f"it has api_version {quantizer.api_version}, this is {api_version}")
    if quantizer.name != point.name:
        raise TypeError(f"it calls itself {quantizer.name!r}")
    return quantizer


def parse_rules(text: str) -> tuple[Rule, ...]:
    """ "auto" (no rule), a quantizer's name (all layers but routers), or "glob=name,glob=name"."""
    if text in (_AUTO, ""):
        return ()
    rules = []
    for item in text.split(","):
        pattern, separator, name = item.strip().rpartition("=")
        if not name or (separator and not pattern):
            raise Refused(f"quantization = {text!r}: {item!r} is neither a name nor glob=name")
        if not separator:
            rules.append(_SPARED)
        rules.append(Rule(pattern or "*", name))
    return tuple(rules)


def select(
    spec: LinearSpec,
    source: TensorSource,
    device: torch.device,
    registry: Registry,
    rules: Sequence[Rule] = (),
) -> Choice:
    """Raises Refused, with every reason, when nobody takes the layer."""
    rule = _rule_of(spec, rules)
    if rule is None or rule.quantizer == _AUTO:
        return _by_tensors(spec, source, device, registry)
    return _by_rule(spec, source, device, registry, rule)


def check_rules(
    rules: Sequence[Rule], specs: Collection[LinearSpec], choices: Sequence[Choice]
) -> None:
    """Raises Refused for a rule without effect: a user who wrote it meant something. `choices` has
    one for each of `specs`."""
    taken: dict[Rule, set[str]] = {}
    for spec, choice in zip(specs, choices, strict=True):
        rule = _rule_of(spec, rules)
        if rule is not None:
            taken.setdefault(rule, set()).add(choice.quantizer.name)
    for rule in rules:
        if rule == _SPARED or rule.quantizer in taken.get(rule, ()):
            continue
        if rule in taken and rule.quantizer != _AUTO:
            raise Refused(
                f"quantization: no layer that the rule {rule} is for has tensors of "
                f"{rule.quantizer}, which cannot be made from plain ones"
            )
        if rule not in taken:
            raise Refused(f"quantization: the rule {rule} {_without_layers(rule, specs)}")


def _without_layers(rule: Rule, specs: Collection[LinearSpec]) -> str:
    if any(fnmatchcase(spec.name, rule.pattern) for spec in specs):
        return "is for no layer: rules before it match them all"
    names = sorted({re.sub(r"\b\d+\b", "N", spec.name) for spec in specs})
    return f"matches no layer; the layers are {', '.join(names)}"


def _rule_of(spec: LinearSpec, rules: Sequence[Rule]) -> Rule | None:
    return next((rule for rule in rules if fnmatchcase(spec.name, rule.pattern)), None)


def notes(
    source: TensorSource, specs: Collection[LinearSpec], choices: Sequence[Choice]
) -> tuple[str, ...]:
    """What a user should know of all layers together; `choices` has one for each of `specs`."""
    counts = Counter(
        (choice.quantizer.name, note)
        for spec, choice in zip(specs, choices, strict=True)
        if isinstance(choice.quantizer, Notes)
        for note in choice.quantizer.notes(spec, source)
    )
    total = len(choices)
    found = [f"{name}: {note} ({n} of {total} layers)" for (name, note), n in counts.items()]
    said = _quant_method(source.config)
    if said is not None and all(choice.stored == _DENSE for choice in choices):
        found.append(
            f"config.json says quant_method {said!r} but the tensors of all {total} layers are "
            "plain"
        )
    return tuple(found)


def _by_tensors(
    spec: LinearSpec, source: TensorSource, device: torch.device, registry: Registry
) -> Choice:
    refusals: list[tuple[str, str]] = []
    order = _order(registry)
    for i, name in enumerate(order):
        quantizer = registry.get(name)
        if quantizer is None:
            refusals.append((name, registry.why_not(name)))
            continue
        if not quantizer.claims(spec, source):
            refusals.append((name, "the layer's tensors are not of this format"))
            continue
        reason = quantizer.refuses(spec, device)
        if reason is None:
            why = f"not asked, the layer's tensors are {name}"
            refusals += [(other, why) for other in order[i + 1 :]]
            return Choice(spec.name, quantizer, "the checkpoint's tensors", tuple(refusals), name)
        refusals.append((name, reason))
    said = _quant_method(source.config)
    by = "" if said is None else f", quant_method {said!r} by config.json"
    by_reason: dict[str, list[str]] = {}
    for name, reason in refusals:
        by_reason.setdefault(reason, []).append(name)
    reasons = "; ".join(f"{', '.join(some)}: {reason}" for reason, some in by_reason.items())
    raise Refused(
        f"no quantizer takes the layer {spec.name} ({_held(spec, source)}){by}: {reasons}"
    )


def _held(spec: LinearSpec, source: TensorSource) -> str:
    """What the checkpoint has under the names of a layer's parts: "weight F8_E4M3, bias F32"."""
    parts = frozenset(spec.parts)
    found: dict[str, None] = {}
    for name in source.names():
        part, _, leaf = name.rpartition(".")
        if part in parts:
            found[f"{leaf} {source.dtype(name)}"] = None
    return ", ".join(found) or "no tensors"


def _by_rule(
    spec: LinearSpec,
    source: TensorSource,
    device: torch.device,
    registry: Registry,
    rule: Rule,
) -> Choice:
    why = f"the rule {rule}"
    quantizer = registry.get(rule.quantizer)
    if quantizer is None:
        raise Refused(f"quantization: {why}: {registry.why_not(rule.quantizer)}")
    cannot = f"quantization: {why} cannot hold for the layer {spec.name}"
    stored = rule.quantizer
    if not quantizer.claims(spec, source):
        stored = _stored(spec, source, registry)
        if stored != _DENSE:
            raise Refused(f"{cannot}: it is already {stored}")
        if not isinstance(quantizer, FromPlain):
            plain = _by_tensors(spec, source, device, registry)
            return replace(plain, reason=f"{why}, but the layer's tensors are plain")
    reason = quantizer.refuses(spec, device)
    if reason is not None:
        raise Refused(f"{cannot}: {reason}")
    others = (name for name in _order(registry) if name != rule.quantizer)
    refusals = tuple((name, f"not asked, {why} comes first") for name in others)
    return Choice(spec.name, quantizer, why, refusals, stored)


def _order(registry: Registry) -> tuple[str, ...]:
    """Dense is asked first although it is the last resort: it claims plain weights only, for which
    the answer is certain and need not wait for an import of every other format."""
    return (_DENSE, *(name for name in registry.names if name != _DENSE))


def _stored(spec: LinearSpec, source: TensorSource, registry: Registry) -> str:
    """The first quantizer that claims the layer's tensors. Raises Refused when none does."""
    for name in _order(registry):
        quantizer = registry.get(name)
        if quantizer is not None and quantizer.claims(spec, source):
            return name
    types = {source.dtype(f"{p}.weight") for p in spec.parts if f"{p}.weight" in source.names()}
    kinds = f"of the types {', '.join(sorted(types))}" if types else "no weights"
    raise Refused(
        f"no installed format knows the tensors of the layer {spec.name}, which are {kinds}"
        + "".join(f"; {warning}" for warning in registry.warnings)
    )


def _quant_method(config: Mapping[str, object]) -> str | None:
    quantization = config.get("quantization_config")
    if isinstance(quantization, Mapping) and "quant_method" in quantization:
        return str(quantization["quant_method"])
    return None

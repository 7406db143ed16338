"""Rotary position embedding: every published way to stretch it, and tables by position.

Su et al. 2021 (rotary), Peng et al. 2023 (yarn), Ding et al. 2024 (longrope); "linear", "dynamic"
and "llama3" have no paper. Formulas and spellings of the parameters are those of transformers.

"longrope" and "dynamic" depend on a sequence's length, and keys are stored rotated, so one length
must hold for a sequence from its start. Here it is the model's `max_context`: longrope uses its
long factors if and only if max_context is beyond the original context, dynamic takes its base for
max_context. transformers goes by the length of each call, so it agrees wherever a call is as long
as max_context (or, for longrope, on the same side of the original context). A choice for each
sequence by the length it may reach was rejected: two requests could then not share the blocks of
a common prefix, and max_tokens would change the first token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantd.daemon.worker.models.fields import Fields
from quantd.plugins.api import Refused

_KEYS: dict[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "dynamic": frozenset({"factor", "original_max_position_embeddings"}),
    "yarn": frozenset(
        {
            "factor",
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        }
    ),
    "llama3": frozenset(
        {"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"}
    ),
    "longrope": frozenset(
        {
            "factor",
            "original_max_position_embeddings",
            "attention_factor",
            "short_factor",
            "long_factor",
        }
    ),
}
_ALWAYS = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})
_TABLE_STEP = 1024
"""Positions computed at a time. A fixed size, so that a position's values never depend on when it
was computed: the vectorized and the scalar cosine differ in the last bit."""


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """How positions turn into angles, for the layers that share it."""

    kind: str
    theta: float
    rotary_dim: int
    """Dimensions of a head that rotate, the first ones; even."""
    max_positions: int
    """max_position_embeddings"""
    original: int
    """The context before stretching."""
    factor: float = 1.0
    attention_factor: float | None = None
    """Multiplies cos and sin; None: derived from the factor."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    @property
    def default_context(self) -> int:
        """The context that the checkpoint speaks of. A yarn checkpoint may have kept the
        max_position_embeddings of before the stretch."""
        if self.kind == "yarn":
            return max(self.max_positions, int(self.original * self.factor))
        return self.max_positions

    @property
    def context_limit(self) -> int:
        """The longest context that may be configured."""
        if self.kind in ("linear", "dynamic"):
            return int(self.max_positions * max(self.factor, 1.0))
        return self.default_context


def read_rope(
    fields: Fields, head_dim: int, max_positions: int, original: int | None
) -> RopeConfig:
    """From one flat object of rope parameters, in the old or the new spelling.

    `original` is config.json's own original_max_position_embeddings, which wins where it stands
    (Phi-3).
    """
    spelling = "rope_type" if "rope_type" in fields else "type"
    kind = fields.text(spelling, "default")
    if kind not in _KEYS:
        raise fields.wrong(spelling, "one of " + ", ".join(sorted(_KEYS)))
    for key in sorted(fields.keys() - _KEYS[kind] - _ALWAYS):
        if key in fields:
            raise fields.wrong(key, f"absent, it means nothing to rope_type {kind}")
    known: dict[str, Any] = {}
    for name in ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor"):
        if name in fields:
            known[name] = fields.number(name)
    original = original or fields.integer("original_max_position_embeddings", max_positions)
    rotary_dim = int(head_dim * fields.number("partial_rotary_factor", 1.0))
    if kind == "llama3":
        known["low_freq_factor"] = fields.number("low_freq_factor")
        known["high_freq_factor"] = fields.number("high_freq_factor")
    if kind == "longrope":
        for name in ("short_factor", "long_factor"):
            known[name] = tuple(map(float, fields.items(name)))
            if len(known[name]) != rotary_dim // 2:
                raise fields.wrong(name, f"a list of {rotary_dim // 2} numbers")
    if kind != "default":
        stretched = max_positions / original if kind in ("yarn", "longrope") else None
        known["factor"] = fields.number("factor", stretched)
    theta = fields.number("rope_theta")
    if theta <= 0:
        # Not fields.wrong: it may stand outside of this object.
        raise Refused(f"config.json: rope_theta is {theta}, must be above 0")
    return RopeConfig(
        kind=kind,
        theta=theta,
        rotary_dim=rotary_dim,
        max_positions=max_positions,
        original=original,
        truncate=fields.flag("truncate", True),
        **known,
    )


def frequencies(rope: RopeConfig, max_context: int) -> tuple[Tensor, float]:
    """(fp32 [rotary_dim / 2] of radians per position, the factor on cos and sin)."""
    exponents = torch.arange(0, rope.rotary_dim, 2, dtype=torch.float32) / rope.rotary_dim
    if rope.kind == "longrope":
        return _longrope(rope, exponents, max_context)
    if rope.kind == "dynamic":
        length = max(max_context, rope.max_positions)
        stretch = rope.factor * length / rope.max_positions - (rope.factor - 1)
        base = rope.theta * stretch ** (rope.rotary_dim / (rope.rotary_dim - 2))
        return 1.0 / base**exponents, 1.0
    plain = 1.0 / rope.theta**exponents
    if rope.kind == "linear":
        return plain / rope.factor, 1.0
    if rope.kind == "llama3":
        return _llama3(rope, plain), 1.0
    if rope.kind == "yarn":
        return _yarn(rope, exponents), _yarn_attention_factor(rope)
    return plain, 1.0


def _longrope(rope: RopeConfig, exponents: Tensor, max_context: int) -> tuple[Tensor, float]:
    factors = rope.long_factor if max_context > rope.original else rope.short_factor
    attention = rope.attention_factor
    if attention is None:
        attention = 1.0
        if rope.factor > 1.0:
            attention = math.sqrt(1 + math.log(rope.factor) / math.log(rope.original))
    return 1.0 / (torch.tensor(factors, dtype=torch.float32) * rope.theta**exponents), attention


def _llama3(rope: RopeConfig, plain: Tensor) -> Tensor:
    """Long waves are divided by the factor, short ones stay, those between are blended."""
    low, high = rope.low_freq_factor, rope.high_freq_factor
    wavelength = 2 * math.pi / plain
    smooth = ((rope.original / wavelength - low) / (high - low)).clamp(0, 1)
    return (1 - smooth) * plain / rope.factor + smooth * plain


def _yarn(rope: RopeConfig, exponents: Tensor) -> Tensor:
    half = rope.rotary_dim // 2

    def dimension(rotations: float) -> float:
        """Which dimension turns that many times within the original context."""
        length = math.log(rope.original / (rotations * 2 * math.pi))
        return rope.rotary_dim * length / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.rotary_dim - 1)
    if low == high:
        high += 0.001
    keep = 1 - ((torch.arange(half, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    waves = rope.theta**exponents
    return (1.0 / (rope.factor * waves)) * (1 - keep) + (1.0 / waves) * keep


def _yarn_attention_factor(rope: RopeConfig) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor

    def scale(mscale: float) -> float:
        return 0.1 * mscale * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0

    if rope.mscale and rope.mscale_all_dim:
        return scale(rope.mscale) / scale(rope.mscale_all_dim)
    return scale(1.0)


class RopeTable:
    """cos and sin by position, computed up to the greatest position that was asked for."""

    def __init__(self, rope: RopeConfig, max_context: int, device: torch.device) -> None:
        self._frequencies, self._scale = frequencies(rope, max_context)
        self._max_context = max_context
        self._device = device
        self._cos = torch.empty(0, rope.rotary_dim // 2, device=device)
        self._sin = self._cos

    def at(self, positions: Tensor, stop: int) -> tuple[Tensor, Tensor]:
        """positions int64 [T], all below `stop` -> (cos, sin), each fp32 [T, rotary_dim / 2]."""
        self.reserve(stop)
        return self._cos.index_select(0, positions), self._sin.index_select(0, positions)

    def reserve(self, stop: int) -> None:
        """The tables lie where they are until a position at or above `stop` is asked for."""
        if stop > len(self._cos):
            self._grow(stop)

    def _grow(self, stop: int) -> None:
        # Doubled, so that a sequence that grows by a token copies the tables seldom.
        target = max(stop, min(2 * len(self._cos), self._max_context), 4 * _TABLE_STEP)
        cos, sin = [self._cos], [self._sin]
        for start in range(len(self._cos), target, _TABLE_STEP):
            positions = torch.arange(start, start + _TABLE_STEP, dtype=torch.float32)
            angles = positions[:, None] * self._frequencies
            cos.append((angles.cos() * self._scale).to(self._device))
            sin.append((angles.sin() * self._scale).to(self._device))
        self._cos, self._sin = torch.cat(cos), torch.cat(sin)

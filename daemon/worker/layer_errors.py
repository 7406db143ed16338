"""How far the layers of one model are from those of another that is meant to be the same."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from quantd.daemon.worker.load import Model
from quantd.daemon.worker.models.decoder import Decoder
from quantd.plugins.api import QuantLinear, Refused

_ROWS = 64
"""Rows of a call that are compared, evenly spread: all would double the time."""

_ORDER = ("qkv_proj", "o_proj", "gate", "gate_up_proj", "down_proj")
_SAME = ("hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim")


@dataclass(slots=True)
class _Ratio:
    """sqrt(sum of squared differences / sum of squares) over all that was added."""

    difference: float = 0.0
    reference: float = 0.0

    def add(self, got: Tensor, want: Tensor) -> None:
        want, got = want.float(), got.to(want.device).float()
        self.difference += (got - want).square().sum(dtype=torch.float64).item()
        self.reference += want.square().sum(dtype=torch.float64).item()

    def value(self) -> float | None:
        """None: nothing was added, or it was all zeros."""
        return (self.difference / self.reference) ** 0.5 if self.reference > 0.0 else None


class _Tapped:
    """A layer of A that gives its input to B's layer too."""

    def __init__(self, layer: QuantLinear, other: QuantLinear, dtype: torch.dtype) -> None:
        self._layer = layer
        self._other = other
        self._dtype = dtype
        self.output = _Ratio()
        self.seen: Tensor | None = None
        """Some rows of the last input."""

    @property
    def nbytes(self) -> int:
        return self._layer.nbytes

    def dequantize(self) -> Tensor:
        return self._layer.dequantize()

    def __call__(self, x: Tensor) -> Tensor:
        out = self._layer(x)
        rows = _some(x)
        self.output.add(self._other(rows.to(self._dtype)), _some(out))
        self.seen = rows
        return out

    def weight_error(self) -> float | None:
        """Takes the memory of both layers in fp32."""
        ratio = _Ratio()
        ratio.add(self._other.dequantize(), self._layer.dequantize())
        return ratio.value()


class _Follower:
    """A layer of B whose input is compared with what A's layer has just seen."""

    def __init__(self, layer: QuantLinear, tapped: _Tapped) -> None:
        self._layer = layer
        self._tapped = tapped
        self.input = _Ratio()

    @property
    def nbytes(self) -> int:
        return self._layer.nbytes

    def dequantize(self) -> Tensor:
        return self._layer.dequantize()

    def __call__(self, x: Tensor) -> Tensor:
        assert self._tapped.seen is not None, "A runs a batch before B does"
        self.input.add(_some(x), self._tapped.seen)
        return self._layer(x)


class LayerErrors:
    """Both models again, as `a` and `b`, whose layers compare what they compute: A must run each
    batch before B does. Raises Refused when their linear layers are not the same ones."""

    def __init__(self, a: Model, b: Model) -> None:
        for field in _SAME:
            ours, theirs = getattr(a.config, field), getattr(b.config, field)
            if ours != theirs:
                raise Refused(
                    f"--layers compares like with like, but {field} is {ours} in A and "
                    f"{theirs} in B"
                )
        ours, others = a.weights.linears, b.weights.linears
        if ours.keys() != others.keys():
            raise Refused(
                f"--layers compares like with like, but A has {len(ours)} linear layers and B "
                f"{len(others)}, {len(ours.keys() & others.keys())} of them of the same name"
            )
        dtype = getattr(torch, b.info.dtype)
        names = sorted(ours, key=_place)
        self._tapped = {name: _Tapped(ours[name], others[name], dtype) for name in names}
        self._followers = {
            name: _Follower(others[name], self._tapped[name])
            for name in names
            if name.endswith(".qkv_proj")
        }
        self._last = _Ratio()
        self.a = _with(a, self._tapped)
        self.b = _with(b, others | self._followers)

    def add_last(self, hidden_a: Tensor, hidden_b: Tensor) -> None:
        """The normalized hidden states after the last layer, of the same rows."""
        self._last.add(_some(hidden_b), _some(hidden_a))

    def layers(self) -> list[dict[str, Any]]:
        """Of each linear layer the relative error of its weight, and of its output when it is given
        A's input: None for an expert that no token met."""
        return [
            {"name": name, "weight": tapped.weight_error(), "output": tapped.output.value()}
            for name, tapped in self._tapped.items()
        ]

    def hidden(self) -> list[dict[str, Any]]:
        """The relative error of what enters each decoder layer's attention, and of what leaves the
        last, each model having run by itself: it adds up."""
        entered = [
            {"name": name.removesuffix(".self_attn.qkv_proj"), "error": follower.input.value()}
            for name, follower in self._followers.items()
        ]
        return [*entered, {"name": "model.norm", "error": self._last.value()}]


def _some(x: Tensor) -> Tensor:
    """At most about _ROWS rows, contiguous."""
    return x[:: -(-len(x) // _ROWS) or 1].contiguous()


def _place(name: str) -> tuple[float, int, int]:
    """Layers in the order in which they run, the output layer last."""
    if name == "lm_head":
        return math.inf, 0, 0
    expert = name.partition(".experts.")[2].partition(".")[0]
    return int(name.split(".")[2]), int(expert or -1), _ORDER.index(name.rpartition(".")[2])


def _with(model: Model, linears: Mapping[str, QuantLinear]) -> Model:
    # Without stacks, so that each expert's layers are called.
    weights = replace(model.weights, linears=dict(linears), stacks={})
    dtype = getattr(torch, model.info.dtype)
    decoder = Decoder(model.config, weights, dtype, model.info.max_context)
    return replace(model, decoder=decoder, weights=weights)

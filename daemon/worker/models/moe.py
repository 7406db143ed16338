"""A mixture of experts in the place of a feed-forward part (Shazeer et al. 2017)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from quantd.kernels import ops
from quantd.plugins.api import QuantLinear


@dataclass(frozen=True, slots=True)
class FeedForward:
    """down(activation(gate) * up)."""

    gate_up: QuantLinear
    down: QuantLinear
    activation: ops.Activation

    def __call__(self, x: Tensor) -> Tensor:
        return self.down(ops.act_and_mul(self.gate_up(x), self.activation))


@dataclass(frozen=True, slots=True)
class Experts:
    """The weighted sum of each row's top_k experts."""

    router: QuantLinear
    experts: Sequence[FeedForward]
    top_k: int
    renormalize: bool
    stacked: ops.StackedExperts | None
    """The weights of `experts` in one place, on a GPU. Without it experts are called one after the
    other, and a GPU is waited for to know how many rows each has: to give all rows to all of them
    would not wait, and read and multiply many times as much."""

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, hidden] -> [T, hidden]. An expert's weights are read once for all its rows."""
        weights, ids = ops.route_experts(
            self.router(x), self.top_k, softmax_before=True, renormalize=self.renormalize
        )
        return ops.expert_feed_forward(x, weights, ids, self.experts, self.stacked)

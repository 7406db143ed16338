"""A mixture of experts in the place of a feed-forward part (Shazeer et al. 2017)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
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

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, hidden] -> [T, hidden]. An expert's weights are read once for all its rows."""
        weights, ids = ops.route_experts(
            self.router(x), self.top_k, softmax_before=True, renormalize=self.renormalize
        )
        # Rows in order of expert; stable, so that within an expert they stay in order.
        chosen, order = ids.flatten().sort(stable=True)
        rows = order.div(self.top_k, rounding_mode="floor")
        weights = weights.to(x.dtype).flatten().index_select(0, order)[:, None]
        inputs = x.index_select(0, rows)
        counts = torch.bincount(chosen, minlength=len(self.experts)).tolist()
        out = torch.zeros_like(x)
        start = 0
        for expert, count in zip(self.experts, counts, strict=True):
            if count:
                stop = start + count
                part = expert(inputs[start:stop]).mul_(weights[start:stop])
                # A row meets its experts in order of their ids, whatever else is in the batch.
                out.index_add_(0, rows[start:stop], part)
                start = stop
        return out

"""A layer of experts as `gpu.py` times it: all at once, and one after the other."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from quantd.kernels import ops

_ACTIVATION: ops.Activation = "silu"


class Layer:
    """Weights of all experts. On a CPU nothing is at once, so both are the same."""

    def __init__(
        self,
        gate_up: Sequence[ops.Weight],
        down: Sequence[ops.Weight],
        top_k: int,
        device: torch.device,
    ) -> None:
        self._gate_up, self._down, self._top_k = gate_up, down, top_k
        self._stacked: ops.StackedExperts | None = None
        stacks = [ops.new_expert_stack(len(gate_up), device, torch.bfloat16) for _ in range(2)]
        first, second = stacks
        if first is not None and second is not None:
            for i, (one, two) in enumerate(zip(gate_up, down, strict=True)):
                first.put(i, one)
                second.put(i, two)
            self._stacked = ops.stacked_experts(first, second, _ACTIVATION)

    def at_once(self, x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return self._by(self._stacked, x, logits)

    def one_by_one(self, x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return self._by(None, x, logits)

    def _by(
        self, stacked: ops.StackedExperts | None, x: torch.Tensor, logits: torch.Tensor
    ) -> torch.Tensor:
        weights, ids = ops.route_experts(logits, self._top_k, softmax_before=True, renormalize=True)
        return ops.expert_feed_forward(x, weights, ids, self, stacked)

    def __len__(self) -> int:
        return len(self._gate_up)

    def __getitem__(self, index: int) -> Expert:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return Expert(self._gate_up[index], self._down[index])


class Expert:
    def __init__(self, gate_up: ops.Weight, down: ops.Weight) -> None:
        self._gate_up, self._down = gate_up, down

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        inner = ops.act_and_mul(multiply(x, self._gate_up), _ACTIVATION)
        return multiply(inner, self._down)


def multiply(x: torch.Tensor, weight: ops.Weight) -> torch.Tensor:
    if isinstance(weight, ops.LinearWeight):
        return ops.linear(x, weight, None)
    return ops.grouped_linear(x, weight, None)

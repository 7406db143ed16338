"""Layers of experts whose weights lie in a stack, from which a GPU multiplies by all at once."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from quantd.daemon.worker.models.names import ModelTensors
from quantd.kernels import ops
from quantd.plugins.api import OneWeight, QuantLinear


class StackedLinear:
    """The layer of one expert. The stack is full before it is used."""

    __slots__ = ("_index", "_stack")

    def __init__(self, stack: ops.ExpertStack, index: int) -> None:
        self._stack = stack
        self._index = index

    @property
    def nbytes(self) -> int:
        return self._stack.weight(self._index).nbytes

    def __call__(self, x: Tensor) -> Tensor:
        return self._stack.linear(self._index, x)

    def dequantize(self) -> Tensor:
        return self._stack.unpack(self._index)


class Stacks:
    """All stacks of a model while it loads, empty where the device computes experts one after the
    other."""

    def __init__(self, tensors: ModelTensors, device: torch.device) -> None:
        self._stacks: dict[str, ops.ExpertStack] = {}
        self._places: dict[str, tuple[ops.ExpertStack, int]] = {}
        """By the name of an expert's layer."""
        for name, members in tensors.experts.items():
            dtype = tensors.linears[members[0]].dtype
            stack = ops.new_expert_stack(len(members), device, dtype)
            if stack is not None:
                self._stacks[name] = stack
                self._places |= {member: (stack, i) for i, member in enumerate(members)}

    def take(self, name: str, layer: QuantLinear) -> QuantLinear:
        """The layer as it is kept: with its weight in a stack if it belongs there. From any thread;
        `layer` itself is not used again."""
        if name not in self._places:
            return layer
        stack, index = self._places[name]
        weight = layer.weight if isinstance(layer, OneWeight) else None
        if weight is None:
            stack.leave_out()
            return layer
        stack.put(index, weight)
        return StackedLinear(stack, index)

    def full(self) -> Mapping[str, ops.ExpertStack]:
        """By the names of `ModelTensors.experts`, when all layers are loaded."""
        return self._stacks


def notes(
    tensors: ModelTensors, stacks: Mapping[str, ops.ExpertStack], device: torch.device
) -> Collection[str]:
    """What a user should know of a model's experts."""
    if device.type == "cpu":
        return ()
    slow = {
        name.rpartition(".")[0]
        for name in tensors.experts
        if name not in stacks or stacks[name].together() is None
    }
    if not slow:
        return ()
    return (
        f"the experts of {len(slow)} layers are computed one after the other, and each of these "
        "layers waits for the GPU: no kernel takes all of them at once",
    )

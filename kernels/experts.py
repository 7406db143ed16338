"""The weights of a layer's experts in one place, so that a GPU multiplies by all at once."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quantd.kernels.checked import checked
from quantd.kernels.cpu.grouped import GroupedWeight
from quantd.kernels.cpu.linear import LinearWeight, linear, unpack_linear
from quantd.kernels.cpu.native import DTYPES
from quantd.kernels.grouped_linear import grouped_linear, unpack_grouped
from quantd.kernels.reference import Activation

if TYPE_CHECKING:
    from quantd.kernels.triton.grouped_layout import PackedPart
    from quantd.kernels.triton.w8a8 import BytePart

OPERATION = "expert_feed_forward"

Weight = LinearWeight | GroupedWeight

_SCALES = {torch.float16, torch.float32}


@dataclass(frozen=True, slots=True)
class StackedWeight:
    """A weight of each expert, all of one format and shape."""

    part: LinearWeight | PackedPart | BytePart
    """What one of them is, but that its tensors have one more dimension, in front: the experts."""
    count: int
    """Of the experts."""

    @property
    def rows(self) -> int:
        return self.part.shape[0] if isinstance(self.part, LinearWeight) else self.part.rows


@dataclass(frozen=True, slots=True)
class StackedExperts:
    """down(activation(gate) * up) of each expert."""

    gate_up: StackedWeight
    down: StackedWeight
    activation: Activation


class ExpertStack:
    """One weight of each expert of a layer, filled while a model loads, from any thread, and read
    when it is full. Memory for all is taken with the first; what is put in is copied and may be
    freed, so that no weight is held twice but those on their way.

    Weights that differ in format or shape stand apart, each in memory of its own.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._lock = Lock()
        self._form: Weight | None = None
        """The first weight, with empty tensors."""
        self._tensors: dict[str, Tensor] = {}
        """[count, ...] each"""
        self._filled: set[int] = set()
        self._apart: dict[int, Weight] | None = None

    def put(self, index: int, weight: Weight) -> None:
        """The weight of one expert, each once."""
        with self._lock:
            tensors = _tensors(weight)
            if self._form is None and self._apart is None and tensors:
                self._form = _with(weight, {name: t.new_empty(0) for name, t in tensors.items()})
                self._tensors = {
                    name: tensor.new_empty(self._count, *tensor.shape)
                    for name, tensor in tensors.items()
                }
            if self._apart is None and not self._takes(weight):
                self._part_ways()
            if self._apart is not None:
                self._apart[index] = weight
                return
            for name, tensor in tensors.items():
                # Scales are fp16 where that is exact, which may be so for some of the experts only.
                wide = torch.promote_types(self._tensors[name].dtype, tensor.dtype)
                self._tensors[name] = self._tensors[name].to(wide)
                self._tensors[name][index] = tensor
            self._filled.add(index)

    def leave_out(self) -> None:
        """An expert has no weight to put in, so the others stand apart."""
        with self._lock:
            self._part_ways()

    def together(self) -> StackedWeight | None:
        """None: they stand apart."""
        if self._apart is not None or self._form is None:
            return None
        assert len(self._filled) == self._count
        return StackedWeight(_over(_holder(self._form), self._tensors), self._count)

    def weight(self, index: int) -> Weight:
        """Of one expert: a view of what is here."""
        if self._apart is not None:
            return self._apart[index]
        assert self._form is not None and index in self._filled
        return _with(self._form, {name: t[index] for name, t in self._tensors.items()})

    def linear(self, index: int, x: Tensor) -> Tensor:
        """x [T, K] times the weight of an expert transposed -> [T, N]."""
        weight = self.weight(index)
        if isinstance(weight, LinearWeight):
            return linear(x, weight, None)
        return grouped_linear(x, weight, None)

    def unpack(self, index: int) -> Tensor:
        """The weight [N, K] of an expert, a new tensor."""
        weight = self.weight(index)
        if isinstance(weight, LinearWeight):
            return unpack_linear(weight).clone()
        return unpack_grouped(weight)

    def _takes(self, weight: Weight) -> bool:
        if self._form is None or _marks(weight) != _marks(self._form):
            return False
        tensors, held = _tensors(weight), self._tensors
        return tensors.keys() == held.keys() and all(
            tensor.shape == held[name].shape[1:]
            and (tensor.dtype == held[name].dtype or {tensor.dtype, held[name].dtype} <= _SCALES)
            for name, tensor in tensors.items()
        )

    def _part_ways(self) -> None:
        if self._apart is None:
            self._apart = {index: _copied(self.weight(index)) for index in self._filled}
            self._tensors = {}


def new_expert_stack(count: int, device: torch.device, dtype: torch.dtype) -> ExpertStack | None:
    """For the weights of so many experts, which multiply activations of `dtype` on this device;
    None where experts are computed one after the other: on a CPU, and on a GPU whose check at
    start found that wrong."""
    if device.type != "cuda" or dtype not in DTYPES:
        return None
    return ExpertStack(count) if OPERATION in checked(device, dtype).operations else None


def stacked_experts(
    gate_up: ExpertStack, down: ExpertStack, activation: Activation
) -> StackedExperts | None:
    """Of two full stacks; None where one of them stands apart."""
    first, second = gate_up.together(), down.together()
    if first is None or second is None:
        return None
    return StackedExperts(first, second, activation)


def _holder(weight: Weight) -> LinearWeight | PackedPart | BytePart:
    """What has the weight's tensors."""
    return weight if isinstance(weight, LinearWeight) else weight.gpu_parts[0]


def _tensors(weight: Weight) -> dict[str, Tensor]:
    """By name of the field. Empty for what is not on a GPU, or is several parts."""
    if isinstance(weight, GroupedWeight) and len(weight.gpu_parts) != 1:
        return {}
    if isinstance(weight, LinearWeight) and weight.route != "torch":
        return {}
    holder = _holder(weight)
    values = {field.name: getattr(holder, field.name) for field in fields(holder)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def _marks(weight: Weight) -> tuple[object, ...]:
    """All that experts must agree in, but for the shapes of their tensors."""
    if isinstance(weight, LinearWeight):
        return weight.shape, weight.dtype, weight.route, weight.data.dtype
    if len(weight.gpu_parts) != 1:
        return (weight.route,)
    part = weight.gpu_parts[0]
    values = (getattr(part, field.name) for field in fields(part))
    marks = tuple(value for value in values if not isinstance(value, Tensor))
    return type(part), weight.shape, weight.exact, weight.per_row, *marks


def _with(weight: Weight, tensors: dict[str, Tensor]) -> Weight:
    """The weight over other tensors."""
    held = _over(_holder(weight), tensors)
    if isinstance(weight, GroupedWeight):
        return replace(weight, gpu_parts=(held,), nbytes=held.nbytes)
    dense: LinearWeight = held
    return dense


def _over(holder: Any, tensors: dict[str, Tensor]) -> Any:
    return replace(holder, **tensors)


def _copied(weight: Weight) -> Weight:
    return _with(weight, {name: tensor.clone() for name, tensor in _tensors(weight).items()})

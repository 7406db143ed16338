"""A linear layer over grouped weights: what the quantized formats load into."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quantd.kernels import ops

Part = ops.Weight


class GroupedLinear:
    """The rows of its parts one after the other. A part that the checkpoint left alone is dense."""

    __slots__ = ("_bias", "_parts")

    def __init__(self, parts: Sequence[Part], bias: Tensor | None) -> None:
        self._bias = bias
        grouped = [part for part in parts if isinstance(part, ops.GroupedWeight)]
        self._parts = tuple(parts)
        if len(grouped) == len(parts) > 1:
            self._parts = (ops.join_grouped(grouped),)

    @property
    def nbytes(self) -> int:
        bias = 0 if self._bias is None else self._bias.nbytes
        return bias + sum(part.nbytes for part in self._parts)

    @property
    def weight(self) -> ops.Weight | None:
        return self._parts[0] if len(self._parts) == 1 and self._bias is None else None

    def __call__(self, x: Tensor) -> Tensor:
        if len(self._parts) == 1:
            return _multiply(x, self._parts[0], self._bias)
        row, outputs = 0, []
        for part in self._parts:
            stop = row + part.shape[0]
            outputs.append(_multiply(x, part, None if self._bias is None else self._bias[row:stop]))
            row = stop
        return torch.cat(outputs, dim=1)

    def dequantize(self) -> Tensor:
        return torch.cat([_plain(part) for part in self._parts])


def _multiply(x: Tensor, part: Part, bias: Tensor | None) -> Tensor:
    if isinstance(part, ops.GroupedWeight):
        return ops.grouped_linear(x, part, bias)
    return ops.linear(x, part, bias)


def _plain(part: Part) -> Tensor:
    if isinstance(part, ops.GroupedWeight):
        return ops.unpack_grouped(part)
    return ops.unpack_linear(part).float()

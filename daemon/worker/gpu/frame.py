"""A step's arrays on their way to the device, and what it says on its way back: one copy each.

A name's place in the device's buffer follows from the shapes alone, so that a graph that was
recorded for some shapes finds its inputs where they were.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quantd.daemon.worker.gpu.queue import Queue

_ALIGNMENT = 16
"""Bytes. Triton compiles a kernel again for a pointer that is no multiple of it."""

_FIRST_BYTES = 1 << 16

_DTYPES = {
    np.dtype(np.int32): torch.int32,
    np.dtype(np.int64): torch.int64,
    np.dtype(np.float32): torch.float32,
    np.dtype(np.float64): torch.float64,
}

Field = tuple[torch.dtype, tuple[int, ...]]
"""dtype and shape of one tensor in a buffer."""


class Upward:
    """Arrays that a step needs on the device. Two pinned buffers in turns: while one is read by
    the step under way, the next step's arrays go into the other one."""

    _TURNS = 2

    def __init__(self, queue: Queue, on_move: Callable[[], None]) -> None:
        """on_move: is called when what was uploaded next lies at other addresses."""
        self._queue = queue
        self._on_move = on_move
        self._turn = 0
        self._allocate(_FIRST_BYTES)

    def upload(self, arrays: Mapping[str, NDArray[Any]]) -> dict[str, Tensor]:
        """In the computing stream, in one copy. Not more often than once between two marks that
        are waited for; the tensors are those of this step until the next call's work is done."""
        fields = [(_DTYPES[array.dtype], array.shape) for array in arrays.values()]
        starts, total = _places(fields)
        if total > len(self._device):
            self._allocate(_rounded(total))
            self._on_move()
        self._turn = (self._turn + 1) % self._TURNS
        staging = self._staging[self._turn]
        octets: NDArray[np.uint8] = staging.numpy()
        for start, array in zip(starts, arrays.values(), strict=True):
            octets[start : start + array.nbytes] = array.reshape(-1).view(np.uint8)
        self._queue.upload(staging[:total], self._device[:total])
        return dict(zip(arrays, _views(self._device, starts, fields), strict=True))

    def _allocate(self, num_bytes: int) -> None:
        device = torch.empty(num_bytes, dtype=torch.uint8, device=self._queue.device)
        self._staging = [self._queue.pinned(num_bytes) for _ in range(self._TURNS)]
        self._device = device


@dataclass(frozen=True, slots=True)
class Landing:
    """Places for what a step says."""

    device: list[Tensor]
    """The step's work fills them."""
    host: list[Tensor]
    """The same, to be read when the step's mark is reached, before the next step's `open`."""


class Downward:
    """What steps say. The first field of a step stays on the device for the next one, which reads
    it as `last`."""

    def __init__(self, queue: Queue, on_move: Callable[[], None]) -> None:
        self._queue = queue
        self._on_move = on_move
        self._allocate(_FIRST_BYTES)

    @property
    def last(self) -> Tensor:
        """int64, longer than any first field: what the step before this one put into its first
        field, and whatever else."""
        return self._device.view(torch.int64)

    def open(self, fields: Sequence[Field]) -> Landing:
        """Places for the next step's."""
        starts, total = _places(fields)
        if total > len(self._device):
            self._allocate(_rounded(total))
            self._on_move()
        return Landing(
            list(_views(self._device, starts, fields)), list(_views(self._pinned, starts, fields))
        )

    def download(self, fields: Sequence[Field]) -> None:
        """In the computing stream: what `open` gave for these fields, in one copy."""
        _, total = _places(fields)
        self._queue.download(self._device[:total], self._pinned[:total])

    def _allocate(self, num_bytes: int) -> None:
        device = torch.zeros(num_bytes, dtype=torch.uint8, device=self._queue.device)
        self._pinned = self._queue.pinned(num_bytes)
        self._device = device


def _places(fields: Sequence[Field]) -> tuple[list[int], int]:
    """(where each begins, bytes of all)"""
    starts, stop = [], 0
    for dtype, shape in fields:
        starts.append(stop)
        num_bytes = dtype.itemsize * math.prod(shape)
        stop += -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
    return starts, stop


def _views(buffer: Tensor, starts: Sequence[int], fields: Sequence[Field]) -> list[Tensor]:
    views = []
    for start, (dtype, shape) in zip(starts, fields, strict=True):
        num_bytes = dtype.itemsize * math.prod(shape)
        views.append(buffer[start : start + num_bytes].view(dtype).view(shape))
    return views


def _rounded(num_bytes: int) -> int:
    """Up to a power of two, so that a buffer moves seldom."""
    return 1 << (num_bytes - 1).bit_length()

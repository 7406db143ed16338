"""The host pool: places outside the KV pool to which whole blocks are copied and come back.

A place holds one block's keys and values of all layers in one piece, so that it is also what the
disk tier writes. On a CUDA device the places are pinned and copies run on a stream of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor

from quantd.daemon.types import DiskDone, DiskIndex, LoadModel
from quantd.daemon.worker.disk import DiskTier
from quantd.daemon.worker.memory import KvPools


class HostPool:
    """`num_places` places of `place_bytes` each. On a CPU memory is taken on first touch.

    Copies are complete for whatever the device runs after the call that asked for them, and read
    what was written before it: the copying stream waits for the computing one and the other way
    round. Without the first wait a spill saves a half-written block; without the second the block
    is overwritten while it is being saved.
    """

    def __init__(self, pools: KvPools, num_places: int) -> None:
        self._pools = pools
        first = pools.keys[0]
        self._device = first.device
        layers, half = len(pools.keys), first[0].numel()
        self.place_bytes = pools.block_bytes
        on_cuda = self._device.type == "cuda"
        shape = (num_places, 2 * layers * half)
        self._places = torch.empty(shape, dtype=first.dtype, pin_memory=on_cuda and num_places > 0)
        self._half = half
        self._stream: torch.cuda.Stream | None = None
        if on_cuda and num_places:
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    def spill(self, block: int, place: int) -> None:
        """Copy `block` to `place`."""
        with self._ordered():
            self.save(block, place)
        self._settle()

    def fetch(self, place: int, block: int) -> None:
        """Copy `place` to `block`."""
        with self._ordered():
            self.restore(place, block)
        self._settle()

    def save(self, block: int, place: int) -> None:
        """Spill in the current stream; the caller sees to the order."""
        for part, tensor in self._parts(place):
            part.copy_(tensor[block].reshape(-1), non_blocking=True)

    def restore(self, place: int, block: int) -> None:
        """Fetch in the current stream; the caller sees to the order."""
        for part, tensor in self._parts(place):
            tensor[block].view(-1).copy_(part, non_blocking=True)

    def open_disk(
        self, load: LoadModel, kv_revision: str, send: Callable[[DiskDone | DiskIndex], None]
    ) -> DiskTier | None:
        """Begins to serve the disk tier of these places, if `load` has one; `send` is called from
        its thread."""
        if load.disk_kv_path is None or not len(self._places):
            return None
        folder, budget = Path(load.disk_kv_path), load.disk_kv_bytes
        tier = DiskTier(folder, kv_revision, budget, self.place_bytes, self.bytes_of, send)
        tier.start()
        return tier

    def bytes_of(self, place: int) -> memoryview:
        """A place as the disk reads and writes it; wait for `copied` before."""
        return self._places[place].view(torch.uint8).numpy().data

    def copied(self) -> None:
        """Returns when no copy is under way."""
        if self._stream is not None:
            self._stream.synchronize()

    def _parts(self, place: int) -> list[tuple[Tensor, Tensor]]:
        row, half = self._places[place], self._half
        tensors = (*self._pools.keys, *self._pools.values)
        return [(row[i * half : (i + 1) * half], tensor) for i, tensor in enumerate(tensors)]

    def _ordered(self) -> AbstractContextManager[object]:
        if self._stream is None:
            return nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        return torch.cuda.stream(self._stream)

    def _settle(self) -> None:
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)

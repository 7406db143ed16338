"""The host pool: places outside the KV pool to which whole blocks are copied and come back.

A place holds one block's keys and values of all layers in one piece, so that it is also what the
disk tier writes. For a model on a CUDA device the places are pinned, and `gpu/bounce.py` copies
beside the steps; where steps run one after another anyway, `spill` and `fetch` wait for theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from quantd.daemon.types import DiskDone, DiskIndex, LoadModel
from quantd.daemon.worker.disk import DiskTier
from quantd.daemon.worker.gpu.pinned import pinned
from quantd.daemon.worker.memory import KvPools
from quantd.kernels import ops


class HostPool:
    """`num_places` places of `place_bytes` each. On a CPU memory is taken on first touch."""

    def __init__(self, pools: KvPools, num_places: int) -> None:
        self._pools = pools
        first = pools.keys[0]
        layers, half = len(pools.keys), first[0].numel()
        self.place_bytes = pools.block_bytes
        shape = (num_places, 2 * layers * half)
        if first.is_cuda and num_places > 0:
            room = pinned(num_places * self.place_bytes)
            self.places = room.view(first.dtype).view(shape)
        else:
            self.places = torch.empty(shape, dtype=first.dtype)
        """[places, numbers of one]: a row is what `ops.gather_blocks` makes of a block, from the
        keys of the first layer to the values of the last."""

    def spill(self, block: int, place: int) -> None:
        """Copy `block` to `place`; done when this returns."""
        row = self.places[place : place + 1]
        gathered = row if self._pools.keys[0].is_cpu else self._on_device(row)
        ops.gather_blocks(self._pools.tensors, (block,), gathered)
        if gathered is not row:
            row.copy_(gathered)  # waits for the device: the disk may read the place next

    def fetch(self, place: int, block: int) -> None:
        """Copy `place` to `block`; the place may be written to when this returns."""
        row = self.places[place : place + 1]
        if not self._pools.keys[0].is_cpu:
            row = self._on_device(row).copy_(row)
        ops.scatter_blocks(row, self._pools.tensors, (block,))

    def _on_device(self, row: Tensor) -> Tensor:
        return torch.empty_like(row, device=self._pools.keys[0].device)

    def open_disk(
        self, load: LoadModel, kv_revision: str, send: Callable[[DiskDone | DiskIndex], None]
    ) -> DiskTier | None:
        """Begins to serve the disk tier of these places, if `load` has one; `send` is called from
        its thread."""
        if load.disk_kv_path is None or not len(self.places):
            return None
        folder, budget = Path(load.disk_kv_path), load.disk_kv_bytes
        tier = DiskTier(folder, kv_revision, budget, self.place_bytes, self.bytes_of, send)
        tier.start()
        return tier

    def bytes_of(self, place: int) -> memoryview:
        """A place as the disk reads and writes it, once all copies from and to it are done."""
        return self.places[place].view(torch.uint8).numpy().data

"""The host pool: places outside the KV pool to which whole blocks are copied and come back.

A place holds one block's keys and values of all layers in one piece, so that it is also what the
disk tier writes. For a model on a CUDA device the places are pinned, and `gpu/bounce.py` copies.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from quantd.daemon.types import DiskDone, DiskIndex, LoadModel
from quantd.daemon.worker.disk import DiskTier
from quantd.daemon.worker.memory import KvPools
from quantd.kernels import ops


class HostPool:
    """`num_places` places of `place_bytes` each. On a CPU memory is taken on first touch."""

    def __init__(self, pools: KvPools, num_places: int) -> None:
        self._pools = pools
        first = pools.keys[0]
        layers, half = len(pools.keys), first[0].numel()
        self.place_bytes = pools.block_bytes
        is_pinned = first.is_cuda and num_places > 0
        shape = (num_places, 2 * layers * half)
        self.places = torch.empty(shape, dtype=first.dtype, pin_memory=is_pinned)
        """[places, numbers of one]: a row is what `ops.gather_blocks` makes of a block, from the
        keys of the first layer to the values of the last."""

    def spill(self, block: int, place: int) -> None:
        """Copy `block` to `place`, on a CPU."""
        ops.gather_blocks(self._pools.tensors, (block,), self.places[place : place + 1])

    def fetch(self, place: int, block: int) -> None:
        """Copy `place` to `block`, on a CPU."""
        ops.scatter_blocks(self.places[place : place + 1], self._pools.tensors, (block,))

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

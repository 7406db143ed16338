"""Spills and fetches of a model on a GPU: by way of buffers on the device, so that the computing
stream has copies within the device only, and what goes to the host and back runs beside it.

    spill   computing: block -> buffer         then copying: buffer -> place
    fetch   copying: place -> buffer           then computing: buffer -> block

Both streams have them in the order of the plan, so a block is saved before its next owner writes
it, and a place is read after what was saved there before, in this plan or an earlier one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle

import torch
from torch import Tensor

from quantd.daemon.types import BlockCopy
from quantd.daemon.worker.gpu.queue import Copied, Mark, Queue, Work
from quantd.daemon.worker.host import HostPool
from quantd.daemon.worker.memory import KvPools
from quantd.kernels import ops

BUFFER_BYTES = 16 << 20
"""Of one buffer at most, but for a block that is larger. Not measured."""
_BUFFERS = 2
"""One is copied while the other is gathered into, or scattered from."""


def buffer_blocks(block_bytes: int, num_places: int) -> int:
    """How many blocks a buffer holds. No more than there are places, and none without a host
    tier."""
    return min(max(1, BUFFER_BYTES // block_bytes), num_places)


def bounce_bytes(block_bytes: int, num_places: int) -> int:
    """Of all buffers."""
    return _BUFFERS * buffer_blocks(block_bytes, num_places) * block_bytes


@dataclass(slots=True)
class _Buffer:
    rows: Tensor
    """[blocks, numbers of one], as the host's places."""
    saved: Copied | None = None
    """Behind the last copy out of it to the host: before that nothing is gathered into it."""
    scattered: Mark | None = None
    """Behind the last copy out of it to blocks: before that nothing is copied into it."""


class Bounce:
    """`run` puts work into the computing stream of `queue`; it may do the work twice."""

    def __init__(
        self, queue: Queue, pools: KvPools, host: HostPool, run: Callable[[Work], None]
    ) -> None:
        self._queue, self._host, self._run = queue, host, run
        self._pools = pools.tensors
        self._size = buffer_blocks(pools.block_bytes, len(host.places))
        shape = (self._size, host.places.shape[1])
        dtype = host.places.dtype
        buffers = [
            _Buffer(torch.empty(shape, dtype=dtype, device=queue.device)) for _ in range(_BUFFERS)
        ]
        self._turns = cycle(buffers)
        self.last: Copied | None = None
        """Behind all in the copying stream. None: nothing was ever copied."""

    def copy(self, copies: Sequence[BlockCopy]) -> None:
        """Spills, or fetches, that follow one another in a plan."""
        move = self._spill if copies[0].kind == "spill" else self._fetch
        for start in range(0, len(copies), self._size):
            some = copies[start : start + self._size]
            move(next(self._turns), [one.src for one in some], [one.dst for one in some])

    def _spill(self, buffer: _Buffer, blocks: Sequence[int], places: Sequence[int]) -> None:
        def copy_out() -> None:
            for row, place in zip(buffer.rows[: len(places)], places, strict=True):
                self._host.places[place].copy_(row, non_blocking=True)

        if buffer.saved is not None:
            self._queue.follow(buffer.saved)
        self._run(partial(ops.gather_blocks, self._pools, blocks, buffer.rows))
        buffer.saved = self.last = self._queue.copy(copy_out, self._queue.mark())

    def _fetch(self, buffer: _Buffer, places: Sequence[int], blocks: Sequence[int]) -> None:
        def copy_in() -> None:
            for row, place in zip(buffer.rows[: len(places)], places, strict=True):
                row.copy_(self._host.places[place], non_blocking=True)

        # What was gathered into it was copied out in the same stream.
        self.last = self._queue.copy(copy_in, buffer.scattered)
        self._queue.follow(self.last)
        self._run(partial(ops.scatter_blocks, buffer.rows, self._pools, blocks))
        buffer.scattered = self._queue.mark()

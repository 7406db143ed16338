"""Spills and fetches of a model on a GPU: by way of buffers on the device, so that the computing
stream has copies within the device only, and what goes to the host and back runs beside it.

    spill   computing: block -> buffer         then copying: buffer -> place
    fetch   copying: place -> buffer           then computing: buffer -> block

A block is saved before its next owner writes it, and a place is read after what was saved there
before, in this plan or an earlier one: what touches the same block or place stays in the order of
the plan. What does not is put together, for a full pool gives spills and fetches by turns.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from quantd.daemon.types import BlockCopy
from quantd.daemon.worker.gpu.queue import Copied, Mark, Queue, Work
from quantd.daemon.worker.host import HostPool
from quantd.daemon.worker.memory import KvPools
from quantd.kernels import ops

BUFFER_BYTES = 8 << 20
"""Of one buffer at most, but for a block that is larger. Not measured."""
_TURNS = 2
"""Buffers for each direction: one is copied while the other is gathered into, or scattered from."""


def buffer_blocks(block_bytes: int, num_places: int) -> int:
    """How many blocks a buffer holds. No more than there are places, and none without a host
    tier."""
    return min(max(1, BUFFER_BYTES // block_bytes), num_places)


def bounce_bytes(block_bytes: int, num_places: int) -> int:
    """Of all buffers."""
    return 2 * _TURNS * buffer_blocks(block_bytes, num_places) * block_bytes


@dataclass(slots=True)
class _Out:
    rows: Tensor
    """[blocks, numbers of one], as the host's places."""
    saved: Copied | None = None
    """Behind the last copy out of it: before that nothing is gathered into it."""


@dataclass(slots=True)
class _In:
    rows: Tensor
    """As of `_Out`."""
    scattered: Mark | None = None
    """Behind its last scattering: before that nothing is copied into it."""
    copied: Copied | None = None
    """Behind the last copy into it: before that it is not scattered."""


_Copies = list[BlockCopy]


class Bounce:
    """`run` puts work into the computing stream of `queue`; it may do the work twice."""

    def __init__(
        self, queue: Queue, pools: KvPools, host: HostPool, run: Callable[[Work], None]
    ) -> None:
        self._queue, self._host, self._run = queue, host, run
        self._pools = pools.tensors
        self._size = buffer_blocks(pools.block_bytes, len(host.places))

        def rows() -> Tensor:
            shape = (self._size, host.places.shape[1])
            return torch.empty(shape, dtype=host.places.dtype, device=queue.device)

        self._outs = deque(_Out(rows()) for _ in range(_TURNS))
        self._ins = deque(_In(rows()) for _ in range(_TURNS))
        """The next one to be used is the first."""
        self.last: Copied | None = None
        """Behind all in the copying stream. None: nothing was ever copied."""

    def copy(self, copies: Sequence[BlockCopy]) -> None:
        """Spills and fetches of a plan, as if one after another."""
        for spills, fetches in _groups(copies):
            parts = list(self._parts(fetches))
            places = {copy.dst for copy in spills}
            begun: list[_In] = []
            for part in parts[:_TURNS]:
                if not places.isdisjoint(_sources(part)):
                    break
                # Beside the step under way, which what is spilled has to wait for.
                begun.append(self._copy_in(part))
            for part in self._parts(spills):
                self._spill(part)
            for i, part in enumerate(parts):
                self._scatter(begun[i] if i < len(begun) else self._copy_in(part), part)

    def _parts(self, copies: _Copies) -> Iterator[_Copies]:
        """That fit into a buffer."""
        for start in range(0, len(copies), self._size):
            yield copies[start : start + self._size]

    def _spill(self, copies: _Copies) -> None:
        buffer = self._outs[0]
        self._outs.rotate(-1)

        def copy_out() -> None:
            for row, copy in zip(buffer.rows[: len(copies)], copies, strict=True):
                self._host.places[copy.dst].copy_(row, non_blocking=True)

        if buffer.saved is not None:
            self._queue.follow(buffer.saved)
        self._run(partial(ops.gather_blocks, self._pools, _sources(copies), buffer.rows))
        buffer.saved = self.last = self._queue.copy(copy_out, self._queue.mark())

    def _copy_in(self, copies: _Copies) -> _In:
        buffer = self._ins[0]
        self._ins.rotate(-1)

        def copy_in() -> None:
            for row, copy in zip(buffer.rows[: len(copies)], copies, strict=True):
                row.copy_(self._host.places[copy.src], non_blocking=True)

        buffer.copied = self.last = self._queue.copy(copy_in, buffer.scattered)
        return buffer

    def _scatter(self, buffer: _In, copies: _Copies) -> None:
        assert buffer.copied is not None
        self._queue.follow(buffer.copied)
        targets = [copy.dst for copy in copies]
        self._run(partial(ops.scatter_blocks, buffer.rows, self._pools, targets))
        buffer.scattered = self._queue.mark()


def _sources(copies: _Copies) -> list[int]:
    return [copy.src for copy in copies]


def _groups(copies: Sequence[BlockCopy]) -> Iterator[tuple[_Copies, _Copies]]:
    """Spills and what is fetched after them, which together do what all do one after another. A
    spill goes before fetches that came before it, unless it saves what one of them brings or its
    place is one that they read."""
    spills: _Copies = []
    fetches: _Copies = []
    brought: set[int] = set()
    read: set[int] = set()
    for copy in copies:
        if copy.kind == "fetch":
            fetches.append(copy)
            brought.add(copy.dst)
            read.add(copy.src)
            continue
        if copy.src in brought or copy.dst in read:
            yield spills, fetches
            spills, fetches, brought, read = [], [], set(), set()
        spills.append(copy)
    yield spills, fetches

"""Forward passes of decodes that were recorded once and are replayed, and the sizes they have."""

from __future__ import annotations

import logging
from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray

from quantd.daemon.types import BLOCK_TOKENS
from quantd.daemon.worker.gpu.queue import Graph, NotRecorded, Queue, Work
from quantd.daemon.worker.mirror import Batch

_log = logging.getLogger("quantd.worker.gpu")

Key = tuple[int, int]
"""Rows and columns of the block table, rounded up."""

_MOST_GRAPHS = 64
_FINE_ROWS = 16
_LEAST_WIDTH = 8


class Graphs:
    """Recorded work by its size, least recently used first. What leaves is kept until the steps
    that may be at it have ended."""

    def __init__(self, queue: Queue, most: int = _MOST_GRAPHS) -> None:
        self._queue = queue
        self._most = most
        self._seen: set[Key] = set()
        self._graphs: OrderedDict[Key, Graph] = OrderedDict()
        self._leaving: list[Graph] = []
        self._is_refused = False
        """The device has not recorded something, and is not asked again."""

    def run(self, key: Key, work: Work) -> None:
        """Puts `work` into the computing stream. It is done as it is when its key comes first,
        which also compiles its kernels, and recorded the second time: for one key it must be the
        same work on the same tensors until `drop`."""
        graph = self._graphs.get(key)
        if graph is None:
            graph = self._recorded(work) if key in self._seen else None
            if graph is None:
                self._seen.add(key)
                self._queue.run(work)
                return
            self._graphs[key] = graph
            if len(self._graphs) > self._most:
                gone, oldest = self._graphs.popitem(last=False)
                self._seen.discard(gone)
                self._leaving.append(oldest)
        self._graphs.move_to_end(key)
        graph.replay()

    def _recorded(self, work: Work) -> Graph | None:
        if self._is_refused:
            return None
        try:
            return self._queue.record(work)
        except NotRecorded as error:
            self._is_refused = True
            why = str(error).strip().partition("\n")[0]
            _log.warning("forward passes are not recorded, and are launched one by one: %s", why)
            return None

    def drop(self) -> None:
        """All of them; each is recorded again when it has come twice."""
        self._leaving += self._graphs.values()
        self._graphs.clear()
        self._seen.clear()

    def sweep(self) -> None:
        """Frees what has left. To be called when every step has ended but one that was launched
        after the last `drop`, or that replayed none of what left."""
        self._leaving.clear()


def is_decode(batch: Batch) -> bool:
    """One row for each sequence, and each is sampled: work that a graph may hold."""
    return len(batch.tokens) == len(batch.kv_lens) == len(batch.wanted.sampled)


def padded(batch: Batch, waste_block: int) -> tuple[Key, dict[str, NDArray[np.int32 | np.int64]]]:
    """A batch of decodes as arrays of rounded sizes. The rows behind the batch's own are sequences
    of one token, whose key and value go where nobody reads them: into `waste_block`."""
    count = len(batch.kv_lens)
    key = rows, width = _rows(count), _width(batch.table.shape[1])
    tokens, positions = np.zeros(rows, np.int64), np.zeros(rows, np.int64)
    slots = np.full(rows, waste_block * BLOCK_TOKENS, np.int64)
    kv_lens, table = np.ones(rows, np.int32), np.zeros((rows, width), np.int32)
    tokens[:count], positions[:count], slots[:count] = batch.tokens, batch.positions, batch.slots
    kv_lens[:count], table[count:, 0] = batch.kv_lens, waste_block
    table[:count, : batch.table.shape[1]] = batch.table
    return key, {
        "tokens": tokens,
        "positions": positions,
        "slots": slots,
        "starts": np.arange(rows + 1, dtype=np.int32),
        "kv_lens": kv_lens,
        "table": table,
    }


def _rows(count: int) -> int:
    """A power of two, then multiples of 16: at most twice as many, and few sizes."""
    if count <= _FINE_ROWS:
        return 1 << (count - 1).bit_length()
    return -(-count // _FINE_ROWS) * _FINE_ROWS


def _width(columns: int) -> int:
    """A power of two: a sequence that grows meets few sizes."""
    return max(_LEAST_WIDTH, 1 << (columns - 1).bit_length())

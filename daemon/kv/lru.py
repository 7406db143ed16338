"""Which node is given up next: the least recently used of those that may be."""

from __future__ import annotations

import heapq
from collections.abc import Callable

from quantd.daemon.kv.tree import Node


class LruQueue:
    """Candidates by `last_used`. Whether one may really be given up is asked when its turn comes,
    so nothing has to be taken out when that changes; who may be given up *again* must be added
    again. O(log n) amortized.
    """

    def __init__(self, may_go: Callable[[Node], bool]) -> None:
        self._may_go = may_go
        self._heap: list[tuple[int, int, int, Node]] = []
        self._serial = 0
        self._swept = 64

    def add(self, node: Node) -> None:
        """Of equal age the deeper one goes first."""
        self._serial += 1
        heapq.heappush(self._heap, (node.last_used, -node.depth, self._serial, node))
        if len(self._heap) > self._swept:
            self._sweep()

    def pop(self) -> Node | None:
        """The next to go; it must go, or be added again. None: nobody may."""
        while self._heap:
            last_used, _, _, node = heapq.heappop(self._heap)
            if last_used == node.last_used and self._may_go(node):
                return node
        return None

    def _sweep(self) -> None:
        """Drop the entries that are out of date, and the second ones of a node."""
        entries = {
            id(entry[3]): entry
            for entry in self._heap
            if entry[0] == entry[3].last_used and self._may_go(entry[3])
        }
        self._heap = list(entries.values())
        heapq.heapify(self._heap)
        self._swept = 2 * len(self._heap) + 64

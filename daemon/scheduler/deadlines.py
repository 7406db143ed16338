"""Which requests nobody waits for any more."""

from __future__ import annotations

import heapq

from quantd.daemon.scheduler.sequence import Sequence


class Deadlines:
    """Sequences by the time after which their answer is of no use. O(log n) each."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int]] = []
        self._live: dict[int, Sequence] = {}

    def add(self, seq: Sequence) -> None:
        if seq.request.deadline is not None:
            self._live[seq.id] = seq
            heapq.heappush(self._heap, (seq.request.deadline, seq.id))

    def remove(self, seq: Sequence) -> None:
        """No effect if it has no deadline."""
        self._live.pop(seq.id, None)
        if len(self._heap) > 2 * len(self._live) + 64:
            self._heap = [entry for entry in self._heap if entry[1] in self._live]
            heapq.heapify(self._heap)

    def due(self, now: float) -> list[Sequence]:
        """Those whose time is over; once each."""
        found = []
        while self._heap and self._heap[0][0] <= now:
            seq = self._live.get(heapq.heappop(self._heap)[1])
            if seq is not None:
                found.append(seq)
        return found

"""The sequences that wait for their turn: by caller and the policy, and by age."""

from __future__ import annotations

import heapq

from quantd.daemon.scheduler.policy import Key, Policy
from quantd.daemon.scheduler.sequence import Sequence
from quantd.daemon.scheduler.shares import CallerShares


class ReadyQueue:
    """Waiting sequences, by policy within each caller, and by age.

    A sequence is *overdue* once it has waited `aging_seconds` in all, over every wait it had; the
    overdue ones stand in order of arrival. All calls are O(log n), amortized, and `first` O(callers
    who wait) beside it; none scans the sequences.
    """

    def __init__(self, policy: Policy, aging_seconds: float, shares: CallerShares) -> None:
        self._policy = policy
        self._aging_seconds = aging_seconds
        self.shares = shares
        self._by_caller: dict[str, _Heap] = {}
        self._num_waiting = 0
        self._by_due_time = _Heap()
        self._overdue = _Heap()

    def __len__(self) -> int:
        return self._num_waiting

    def add(self, seq: Sequence) -> None:
        """`seq` waits from `seq.waiting_since` on."""
        own = self._by_caller.setdefault(seq.request.caller, _Heap())
        own.add(seq, self._policy.start_key(seq))
        self._num_waiting += 1
        due = seq.waiting_since + self._aging_seconds - seq.seconds_waited
        self._by_due_time.add(seq, (due, seq.id))

    def remove(self, seq: Sequence) -> None:
        """`seq` must be waiting."""
        own = self._by_caller[seq.request.caller]
        own.remove(seq)
        if not len(own):
            del self._by_caller[seq.request.caller]
        self._num_waiting -= 1
        by_age = self._by_due_time if seq in self._by_due_time else self._overdue
        by_age.remove(seq)

    def first(self) -> Sequence | None:
        """Whose turn it is: by rank, then of the caller who has had least, then by the policy."""
        if not self._num_waiting:
            return None
        heads = [(own.first(), caller) for caller, own in self._by_caller.items()]
        turns = [
            (self._policy.rank(head[1]), self.shares.used(caller), head[0], head[1].id, head[1])
            for head, caller in heads
            if head is not None
        ]
        return min(turns, key=lambda turn: turn[:4])[4] if turns else None

    def first_overdue(self, now: float) -> Sequence | None:
        """The earliest arrival among those that have waited too long."""
        while (entry := self._by_due_time.first()) is not None and entry[0][0] <= now:
            seq = entry[1]
            self._by_due_time.remove(seq)
            self._overdue.add(seq, (seq.request.arrival, seq.id))
        overdue = self._overdue.first()
        return None if overdue is None else overdue[1]

    def check(self) -> None:
        """Recount; AssertionError if a sequence is in one order and not in the other."""
        waiting = [seq for own in self._by_caller.values() for seq in own.ids()]
        due, overdue = self._by_due_time.ids(), self._overdue.ids()
        assert due.isdisjoint(overdue)
        assert len(waiting) == self._num_waiting and set(waiting) == due | overdue


class _Heap:
    """Sequences by a fixed key. Removed ones are skipped later, and swept once they are most."""

    def __init__(self) -> None:
        # The serial number tells apart two stays of one sequence under the same key.
        self._heap: list[tuple[Key, int, Sequence]] = []
        self._live: dict[int, int] = {}
        self._serial = 0

    def __len__(self) -> int:
        return len(self._live)

    def __contains__(self, seq: Sequence) -> bool:
        return seq.id in self._live

    def ids(self) -> set[int]:
        return set(self._live)

    def add(self, seq: Sequence, key: Key) -> None:
        assert seq.id not in self._live
        self._serial += 1
        self._live[seq.id] = self._serial
        heapq.heappush(self._heap, (key, self._serial, seq))

    def remove(self, seq: Sequence) -> None:
        del self._live[seq.id]
        if len(self._heap) > 2 * len(self._live) + 16:
            self._heap = [entry for entry in self._heap if self._is_live(entry)]
            heapq.heapify(self._heap)

    def first(self) -> tuple[Key, Sequence] | None:
        """The smallest key and its sequence, which stays."""
        while self._heap and not self._is_live(self._heap[0]):
            heapq.heappop(self._heap)
        if not self._heap:
            return None
        key, _, seq = self._heap[0]
        return key, seq

    def _is_live(self, entry: tuple[Key, int, Sequence]) -> bool:
        _, serial, seq = entry
        return self._live.get(seq.id) == serial

"""The running sequences."""

from __future__ import annotations

import math
from bisect import insort
from collections import Counter
from collections.abc import Iterator

from quantd.daemon.config import SchedulerSettings
from quantd.daemon.scheduler.policy import Key, Policy
from quantd.daemon.scheduler.sequence import Phase, Sequence

BATCH_PLACES = 1 / 8
"""Of the batch, for lines that have waited too long and may not be displaced."""


class Batch:
    """The running sequences, in the order in which they keep their place: aged ones first, lines of
    batches last, else by `Policy.keep_key`, which is fixed while they run.

    Blocks are given from the front and taken from the back. Changed by the scheduler only.
    """

    def __init__(self, policy: Policy, settings: SchedulerSettings) -> None:
        # Each running sequence needs a token of every step's budget.
        self.max_size = min(settings.max_running, settings.token_budget)
        self._policy = policy
        self._max_aged = math.ceil(policy.aged_share * self.max_size)
        self._max_aged_lines = math.ceil(BATCH_PLACES * self.max_size)
        self._seqs: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._seqs)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._seqs)

    def __reversed__(self) -> Iterator[Sequence]:
        return reversed(self._seqs)

    @property
    def last(self) -> Sequence:
        """Who loses its place first. The batch must not be empty."""
        return self._seqs[-1]

    @property
    def is_full(self) -> bool:
        return len(self._seqs) >= self.max_size

    def room_for_aged(self) -> tuple[bool, bool]:
        """Whether one more that has waited too long may start out of turn: (others, lines)."""
        aged = Counter(seq.request.is_batch for seq in self._seqs if seq.aged)
        return aged[False] < self._max_aged, aged[True] < self._max_aged_lines

    def add(self, seq: Sequence) -> None:
        seq.keep_key = self._policy.keep_key(seq)
        insort(self._seqs, seq, key=_key)

    def pop(self) -> Sequence:
        """Takes out the last."""
        return self._seqs.pop()

    def remove(self, seq: Sequence) -> None:
        """`seq` must be there."""
        self._seqs.remove(seq)

    def sweep(self) -> None:
        """Takes out those that have ended."""
        self._seqs = [seq for seq in self._seqs if seq.phase is Phase.RUNNING]

    def check(self) -> None:
        """AssertionError where the order or the bound does not hold."""
        assert len(self._seqs) <= self.max_size
        keys = [_key(seq) for seq in self._seqs]
        assert keys == sorted(keys), "the batch is out of order"
        assert all(seq.phase is Phase.RUNNING for seq in self._seqs)


def _key(seq: Sequence) -> Key:
    return (not seq.aged, seq.request.is_batch, *seq.keep_key)

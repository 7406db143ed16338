"""Who waits for a place in the batch."""

from __future__ import annotations

from quantd.daemon.config import SchedulerSettings
from quantd.daemon.scheduler.policy import Policy
from quantd.daemon.scheduler.ready import ReadyQueue
from quantd.daemon.scheduler.sequence import Sequence
from quantd.daemon.scheduler.shares import CallerShares


class Queues:
    """Two queues: lines of batches (`Request.is_batch`) go when nobody else waits.

    Each counts what its callers have had, so that a caller's batch does not weigh on its chats.
    Changed by the scheduler only.
    """

    def __init__(self, policy: Policy, settings: SchedulerSettings) -> None:
        self._others, self._lines = (
            ReadyQueue(policy, settings.aging_seconds, CallerShares(settings.caller_weights))
            for _ in range(2)
        )

    def __len__(self) -> int:
        return len(self._others) + len(self._lines)

    @property
    def num_lines(self) -> int:
        return len(self._lines)

    def of(self, seq: Sequence) -> ReadyQueue:
        return self._lines if seq.request.is_batch else self._others

    def first(self) -> Sequence | None:
        """Whose turn it is."""
        return self._others.first() or self._lines.first()

    def first_overdue(self, now: float, *, others: bool, lines: bool) -> Sequence | None:
        """The earliest arrival among those that have waited too long, of the queues that may have
        one more in the batch out of turn."""
        overdue = self._others.first_overdue(now) if others else None
        if overdue is None and lines:
            overdue = self._lines.first_overdue(now)
        return overdue

    def charge(self, seq: Sequence, num_tokens: int) -> None:
        """So many tokens are computed for its caller."""
        self.of(seq).shares.charge(seq.request.caller, num_tokens)

    def had_more(self, seq: Sequence, other: Sequence) -> bool:
        """Its caller has had more than the other's. Both are of one queue."""
        used = self.of(seq).shares.used
        return used(seq.request.caller) > used(other.request.caller)

    def check(self) -> None:
        """Recount; AssertionError where an order lacks one that is in the other."""
        self._others.check()
        self._lines.check()

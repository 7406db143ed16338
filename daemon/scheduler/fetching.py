"""Sequences whose beginning lies on disk: set aside while it is read, so they hold up nobody."""

from __future__ import annotations

from quantd.daemon.kv.cache import KvCache
from quantd.daemon.scheduler.sequence import Sequence
from quantd.daemon.types import BLOCK_TOKENS

PATIENCE_SECONDS = 5.0
"""After which a sequence goes on without what a slow disk has not brought."""


class FetchQueue:
    """New sequences that wait for their blocks, each for one job of `DiskReads`."""

    def __init__(self, kv: KvCache) -> None:
        self._kv = kv
        self._jobs: dict[int, Sequence] = {}
        """In order of their beginning."""
        self._job_of: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._jobs)

    def __contains__(self, seq: Sequence) -> bool:
        return seq.id in self._job_of

    def begin(self, seq: Sequence) -> bool:
        """Set a new sequence aside, if something is worth reading for it."""
        if self._kv.disk is None or seq.request.sampling.prompt_logprobs is not None:
            return False
        assert seq.namespace is not None
        job = self._kv.reads.begin(seq.namespace, seq.key, len(seq.tokens) // BLOCK_TOKENS)
        if job is None:
            return False
        self._jobs[job] = seq
        self._job_of[seq.id] = job
        return True

    def done(self, job: int) -> Sequence | None:
        """Whoever waited for it, and still does."""
        seq = self._jobs.pop(job, None)
        if seq is not None:
            del self._job_of[seq.id]
        return seq

    def remove(self, seq: Sequence) -> bool:
        """False if it is not here. What is read for it is kept all the same."""
        job = self._job_of.pop(seq.id, None)
        if job is None:
            return False
        del self._jobs[job]
        return True

    def next_due(self) -> float | None:
        for seq in self._jobs.values():
            return seq.waiting_since + PATIENCE_SECONDS
        return None

    def overdue(self, now: float) -> list[Sequence]:
        """Those that have waited too long; they are not here any more."""
        found = [seq for seq in self._jobs.values() if seq.waiting_since + PATIENCE_SECONDS <= now]
        for seq in found:
            self.remove(seq)
        return found

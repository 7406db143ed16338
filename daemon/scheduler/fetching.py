"""Sequences whose beginning lies, or may lie, on disk: set aside while it is read or looked for, so
they hold up nobody."""

from __future__ import annotations

import itertools

from quantd.daemon.kv.cache import KvCache
from quantd.daemon.scheduler.sequence import Sequence
from quantd.daemon.types import BLOCK_TOKENS

PATIENCE_SECONDS = 5.0
"""After which a sequence goes on without what a slow disk has not brought."""
LISTING_SECONDS = 1.0
"""After which it does not wait any longer for the worker to say what the folder holds."""


class FetchQueue:
    """New sequences that wait: until it is known what lies on disk, then each for one job of
    `DiskReads`."""

    def __init__(self, kv: KvCache) -> None:
        self._kv = kv
        self._unlisted: dict[int, Sequence] = {}
        """Those that came before the folder was looked through, in order of their coming."""
        self._jobs: dict[int, Sequence] = {}
        """In order of their beginning."""
        self._job_of: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._unlisted) + len(self._jobs)

    @property
    def num_lines(self) -> int:
        """Lines of batches among them."""
        waiting = itertools.chain(self._unlisted.values(), self._jobs.values())
        return sum(seq.request.is_batch for seq in waiting)

    def __contains__(self, seq: Sequence) -> bool:
        return seq.id in self._unlisted or seq.id in self._job_of

    def begin(self, seq: Sequence) -> bool:
        """Set a new sequence aside, if something is worth reading for it, or that is not known."""
        num_blocks = len(seq.tokens) // BLOCK_TOKENS
        disk = self._kv.disk
        if disk is None or not num_blocks or seq.request.sampling.prompt_logprobs is not None:
            return False
        if not disk.is_open:
            self._unlisted[seq.id] = seq
            return True
        assert seq.namespace is not None
        job = self._kv.reads.begin(seq.namespace, seq.key, num_blocks)
        if job is None:
            return False
        self._jobs[job] = seq
        self._job_of[seq.id] = job
        return True

    def listed(self) -> list[Sequence]:
        """The folder was looked through: those that nothing is read for, not here any more."""
        seqs, self._unlisted = list(self._unlisted.values()), {}
        return [seq for seq in seqs if not self.begin(seq)]

    def done(self, job: int) -> Sequence | None:
        """Whoever waited for it, and still does."""
        seq = self._jobs.pop(job, None)
        if seq is not None:
            del self._job_of[seq.id]
        return seq

    def remove(self, seq: Sequence) -> bool:
        """False if it is not here. What is read for it is kept all the same."""
        if self._unlisted.pop(seq.id, None) is not None:
            return True
        job = self._job_of.pop(seq.id, None)
        if job is None:
            return False
        del self._jobs[job]
        return True

    def next_due(self) -> float | None:
        kinds = (self._unlisted, self._jobs)
        oldest = [next(iter(seqs.values())) for seqs in kinds if seqs]
        return min(map(self._due, oldest), default=None)

    def overdue(self, now: float) -> list[Sequence]:
        """Those that have waited too long; they are not here any more."""
        waiting = [*self._unlisted.values(), *self._jobs.values()]
        found = [seq for seq in waiting if self._due(seq) <= now]
        for seq in found:
            self.remove(seq)
        return found

    def _due(self, seq: Sequence) -> float:
        seconds = LISTING_SECONDS if seq.id in self._unlisted else PATIENCE_SECONDS
        return seq.waiting_since + seconds

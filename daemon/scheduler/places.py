"""Whether one that waits fits beside the batch, and who would have to go for it."""

from __future__ import annotations

from collections import Counter

from quantd.daemon.kv.cache import Match
from quantd.daemon.scheduler.batch import Batch
from quantd.daemon.scheduler.policy import Policy
from quantd.daemon.scheduler.queues import Queues
from quantd.daemon.scheduler.sequence import Sequence, blocks_for
from quantd.daemon.scheduler.tables import BlockTables


class Places:
    """Answers about places in the batch; changes nothing.

    A sequence fits if all of its known tokens do beside those of the running ones, with one block
    more for each of these. So only growth by decoding preempts, not prefill, and a preempted
    sequence does not come back just to be preempted again.

    `room`: blocks, as `BlockTables.room` counts them.
    """

    def __init__(self, policy: Policy, queues: Queues, batch: Batch, tables: BlockTables) -> None:
        self._policy = policy
        self._queues = queues
        self._batch = batch
        self._tables = tables

    def fits(self, seq: Sequence, match: Match, room: int, num_gone: int = 0) -> bool:
        """`num_gone`: how many of the batch are taken to be preempted."""
        size = len(self._batch) - num_gone
        return size < self._batch.max_size and room - self._tables.needed(seq, match) >= size

    def kept_for(self, overdue: Sequence | None, room: int) -> int:
        """What of `room` those that displace may not use: it is waited for by an overdue one."""
        if overdue is None or overdue is self._queues.first():
            return 0
        return min(blocks_for(len(overdue.tokens)), max(0, room - len(self._batch)))

    def may_displace(self, seq: Sequence, victim: Sequence) -> bool:
        if victim.aged:
            return False
        if seq.request.is_batch != victim.request.is_batch:
            return victim.request.is_batch
        is_equal = self._policy.rank(seq) == self._policy.rank(victim)
        if is_equal and self._queues.had_more(seq, victim):
            return False
        return self._policy.displaces(seq, victim)

    def num_victims(self, seq: Sequence, match: Match, room: int) -> int:
        """How many of the batch's last, all of which it may displace, have to go for `seq` to fit;
        0 if that would not do."""
        pool = self._tables.kv.pool
        own: set[int] = set()
        seen: Counter[int] = Counter()
        gained = 0
        for count, victim in enumerate(reversed(self._batch), start=1):
            if not self.may_displace(seq, victim):
                break
            if match.node is not None and not own:
                own = {node.block for node in match.node.path()}
            seen.update(victim.blocks)
            # Only what neither another one nor `seq` has too comes free; what it had a claim to
            # does as well.
            owned = (block for block in victim.blocks if seen[block] == pool.num_owners(block))
            lone = [block for block in owned if block not in own]
            gained += len(lone) - pool.given_by(sum(map(pool.is_trimmed, lone)))
            gained += self._tables.num_missing(victim)
            if self.fits(seq, match, room + gained, count):
                return count
        return 0

"""How many tokens each running sequence computes in the next step."""

from __future__ import annotations

from collections.abc import Mapping

from quantd.daemon.scheduler.sequence import Sequence
from quantd.daemon.scheduler.share import BatchShare, share_budget
from quantd.daemon.scheduler.tables import BlockTables

STEP_SECONDS = 0.5
BATCH_STEP_SECONDS = 0.1
"""A step of lines of batches alone is shorter: whoever comes meanwhile waits for it."""
LEAST_TOKENS = 64
"""Of prompts in a step, however slow: fewer rows would mostly read the weights again."""
FIRST_TOKENS = 256
"""In a step, before it is known how long one takes."""


class Division:
    """Divides a step; keeps what lines of batches have a claim to (`BatchShare`)."""

    def __init__(self, tables: BlockTables, token_budget: int, whole: bool) -> None:
        """whole: a prompt is computed in one step or not yet."""
        self._tables = tables
        self._token_budget = token_budget
        self._whole = whole
        self._batch_share = BatchShare()

    def sizes(self, going: Mapping[Sequence, int]) -> dict[Sequence, int]:
        """`going`: who could compute something, in the order of the batch, and how much at most. A
        line, and one that waits for what another computes, may get none."""
        if not going:
            return {}
        lines = [seq for seq in going if seq.request.is_batch]
        others = [seq for seq in going if not seq.request.is_batch]
        budget = self._budget(len(going), STEP_SECONDS if others else BATCH_STEP_SECONDS)
        if self._whole:
            return _whole_prompts(going, budget)
        seen: set[tuple[int, bytes]] = set()
        # In this order: nobody waits for what a line computes, which gets little.
        others, followers = self._led(others, going, seen)
        lines, more = self._led(lines, going, seen)
        sizes = self._batch_share.divide(
            budget, [going[seq] for seq in others], [going[seq] for seq in lines]
        )
        # What is over is the followers': then those before them get through with what is shared.
        free = budget - sum(sizes)
        followers = (followers if others else more)[:free]
        sizes += share_budget(free, [going[seq] for seq in followers])
        led = zip([*others, *lines, *followers], sizes, strict=True)
        return dict.fromkeys(going, 0) | dict(led)

    def _led(
        self, seqs: list[Sequence], left: Mapping[Sequence, int], seen: set[tuple[int, bytes]]
    ) -> tuple[list[Sequence], list[Sequence]]:
        """(who leads, who follows): a follower's next block is that of one before it, which it
        waits for. If a step's tokens were shared out to all, each would compute the same ones.
        `seen`: the blocks of those before; added to."""
        leaders, followers = [], []
        for seq in seqs:
            block = self._tables.next_shared(seq) if left[seq] > 1 else None
            if block in seen and self._tables.may_wait(seq):
                followers.append(seq)
                continue
            leaders.append(seq)
            if block is not None:
                seen.add(block)
        return leaders, followers

    def _budget(self, num_going: int, seconds: float) -> int:
        """Tokens of this step: `token_budget`, or what takes `seconds` where that is less. A
        step cannot be interrupted: it is what those that decode, arrive or leave wait for."""
        token_seconds = self._tables.kv.cost.token_seconds
        fast = FIRST_TOKENS if token_seconds is None else int(seconds / token_seconds)
        return min(self._token_budget, max(fast, num_going + LEAST_TOKENS))


def _whole_prompts(left: Mapping[Sequence, int], budget: int) -> dict[Sequence, int]:
    """All of those from the front that the budget has room for, and of the first in any case."""
    sizes, is_first = dict.fromkeys(left, 0), True
    for seq, size in left.items():
        if size > budget and not is_first:
            break
        is_first = False
        sizes[seq] = size
        budget -= size
    return sizes

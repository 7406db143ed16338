"""Which requests nobody waits for any more."""

from __future__ import annotations

import heapq

from quantd.daemon.scheduler.sequence import Sequence
from quantd.daemon.types import BLOCK_TOKENS


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


def is_hopeless(
    seq: Sequence, num_known_blocks: int, now: float, token_seconds: float | None
) -> bool:
    """Not even its next token can be there in time, by what computing a token has cost so far.
    `num_known_blocks`: what it would start with now."""
    deadline = seq.request.deadline
    if deadline is None or token_seconds is None:
        return False
    num_left = len(seq.tokens) - num_known_blocks * BLOCK_TOKENS
    return now + num_left * token_seconds > deadline


def why_over(seq: Sequence) -> str:
    seconds = seq.request.timeout
    assert seconds is not None
    made = f"{seq.num_output_tokens} of at most {seq.request.sampling.max_tokens} tokens were made"
    doing = made if seq.started_at is not None else "the request was still waiting"
    return f"the timeout of {seconds:g} s is over: {doing}"


def why_hopeless(seq: Sequence) -> str:
    seconds = seq.request.timeout
    assert seconds is not None
    return (
        f"the timeout of {seconds:g} s cannot be met: at the present speed the "
        f"{seq.num_prompt_tokens} tokens of the prompt take longer than what is left of it"
    )

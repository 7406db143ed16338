"""How much work a sequence still is: what shortest-job-first sorts by."""

from __future__ import annotations

from quantd.daemon.scheduler.sequence import Sequence
from quantd.daemon.types import BLOCK_TOKENS

WINDOW = 32
"""An estimate is the plain mean of a caller's first WINDOW outputs, and then forgets the oldest at
this rate, so it follows a caller whose use changes."""


class OutputPredictor:
    """A running mean of output lengths per caller, for one model.

    A caller not seen yet gets the mean of all callers; before anything has finished, a request is
    taken at its word (max_tokens). Memory is one pair of numbers per caller.
    """

    def __init__(self) -> None:
        self._by_caller: dict[str, _Mean] = {}
        self._all = _Mean()

    def observe(self, seq: Sequence) -> None:
        """Learn from a sequence that ended by itself, not by an abort or an error."""
        self._by_caller.setdefault(seq.request.caller, _Mean()).add(seq.num_output_tokens)
        self._all.add(seq.num_output_tokens)

    def output_tokens(self, seq: Sequence) -> float:
        """Predicted length of the whole output, in [1, max_tokens]."""
        max_tokens = seq.request.sampling.max_tokens
        mean = self._by_caller.get(seq.request.caller, self._all)
        return min(mean.value, max_tokens) if mean.count else max_tokens

    def work_left(self, seq: Sequence) -> float:
        """Tokens still to compute: those that no block was known for when it joined the queue and
        that it has not computed since, and the output yet to come.

        A sequence that has outlived its estimate is predicted to end with its next token.
        """
        known = max(seq.num_computed_tokens, seq.num_known_blocks * BLOCK_TOKENS)
        uncomputed = len(seq.tokens) - known
        return uncomputed + max(1.0, self.output_tokens(seq) - seq.num_output_tokens)


class _Mean:
    __slots__ = ("count", "value")

    def __init__(self) -> None:
        self.count = 0
        self.value = 0.0

    def add(self, x: float) -> None:
        self.count += 1
        self.value += (x - self.value) / min(self.count, WINDOW)

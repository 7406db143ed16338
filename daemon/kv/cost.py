"""Is it cheaper to copy spilled blocks back, or to compute them again? As measured here."""

from __future__ import annotations

from quantd.daemon.types import BLOCK_TOKENS

_WEIGHT = 0.1
"""Of the newest measurement in a running mean."""


class CostModel:
    """Two running means: seconds of computing a prompt's token, seconds of copying a block.

    Until both are known copying is taken to be cheaper: a block costs its bytes to copy, and a
    pass over all weights for its tokens to compute.
    """

    def __init__(self) -> None:
        self.token_seconds: float | None = None
        self.fetch_seconds: float | None = None
        """Of one block, from the host."""
        self.read_seconds: float | None = None
        """Of one block, from disk to the host."""

    def computed(self, num_tokens: int, seconds: float) -> None:
        """A step that was mostly prompts took so long."""
        if num_tokens > 0 and seconds > 0:
            self.token_seconds = _mean(self.token_seconds, seconds / num_tokens)

    def copied(self, num_blocks: int, seconds: float) -> None:
        if num_blocks > 0:
            self.fetch_seconds = _mean(self.fetch_seconds, seconds / num_blocks)

    def read(self, seconds: float) -> None:
        self.read_seconds = _mean(self.read_seconds, seconds)

    def fetch_is_cheaper(self) -> bool:
        """From the host."""
        return self._cheaper(self.fetch_seconds)

    def read_is_cheaper(self) -> bool:
        """From disk to the host, and from there."""
        if self.read_seconds is None:
            return True
        return self._cheaper(self.read_seconds + (self.fetch_seconds or 0.0))

    def _cheaper(self, block_seconds: float | None) -> bool:
        if block_seconds is None or self.token_seconds is None:
            return True
        return block_seconds <= self.token_seconds * BLOCK_TOKENS


def _mean(old: float | None, new: float) -> float:
    return new if old is None else old + _WEIGHT * (new - old)

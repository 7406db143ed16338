"""What sliding windows save: the bytes of layers that see only the last tokens."""

from __future__ import annotations

import math
from typing import NamedTuple

from quantd.daemon.types import BLOCK_TOKENS

_AT_WORK = 2
"""Blocks beside the window: the one that is written, and one that the window only reaches into."""


class Window(NamedTuple):
    """`share` of a block's bytes belong to layers in which a row sees at most `tokens` keys.

    A block that no further row sees there can be *trimmed*: these bytes go, the other layers' stay.
    """

    tokens: int
    share: float
    """0: nothing can be trimmed."""

    @property
    def num_blocks(self) -> int:
        """As many, or fewer, does the window reach into before a whole number of blocks."""
        return -(-self.tokens // BLOCK_TOKENS)

    def num_outside(self, num_tokens: int) -> int:
        """Of a sequence's blocks, the first so many are seen by no row from `num_tokens` on."""
        if not self.share:
            return 0
        return max(0, num_tokens - self.tokens + 1) // BLOCK_TOKENS

    def cost(self, num_blocks: int) -> int:
        """Blocks' worth of bytes that so many of one sequence come to, once they are trimmed."""
        whole = self.num_blocks + _AT_WORK
        if not self.share or num_blocks <= whole:
            return num_blocks
        return num_blocks - math.floor(self.share * (num_blocks - whole))

    def most_blocks(self, cost: int) -> int | None:
        """The largest number of blocks of this cost; None: there is no bound."""
        whole = self.num_blocks + _AT_WORK
        if self.share >= 1 and cost >= whole:
            return None
        if not self.share or cost <= whole:
            return cost
        most = whole + int((cost - whole) / (1 - self.share))
        return most if self.cost(most) <= cost else most - 1


NO_WINDOW = Window(0, 0.0)

"""Which KV blocks are in use, and by how many owners. Ids only: no bytes are moved here."""

from __future__ import annotations

import heapq
from collections.abc import Iterable


class BlockPool:
    """The ids [0, num_blocks), each free or held by a number of owners.

    Invariant: `num_free + num_used == num_blocks`, and a block is free exactly when nobody owns it.
    The lowest free ids go out first, so that a pool whose memory is committed on first touch
    stays as small as its load ever was. Called by one owner on the event loop; not thread-safe.
    """

    __slots__ = ("num_blocks", "_num_owners", "_freed")

    def __init__(self, num_blocks: int) -> None:
        assert num_blocks >= 1
        self.num_blocks = num_blocks
        # The ids [0, len) were given out at least once; those from len on are free, and no list
        # of them exists: a pool of a million blocks costs nothing before it is used.
        self._num_owners: list[int] = []
        self._freed: list[int] = []  # a heap

    @property
    def num_free(self) -> int:
        return self.num_blocks - len(self._num_owners) + len(self._freed)

    @property
    def num_used(self) -> int:
        """Blocks with at least one owner."""
        return len(self._num_owners) - len(self._freed)

    def num_owners(self, block: int) -> int:
        """How many owners the block has; 0 if it is free."""
        assert 0 <= block < self.num_blocks
        return self._num_owners[block] if block < len(self._num_owners) else 0

    def allocate(self, n: int) -> list[int] | None:
        """`n` >= 0 free blocks, each with one owner now; or None and nothing has changed.

        O(log(freed)) per block.
        """
        assert n >= 0
        if n > self.num_free:
            return None
        num_freed = min(n, len(self._freed))
        # A freed id is always below a fresh one, so taking these first is lowest-first.
        blocks = [heapq.heappop(self._freed) for _ in range(num_freed)]
        for block in blocks:
            self._num_owners[block] = 1
        num_fresh = n - num_freed
        blocks.extend(range(len(self._num_owners), len(self._num_owners) + num_fresh))
        self._num_owners.extend([1] * num_fresh)
        return blocks

    def retain(self, blocks: Iterable[int]) -> None:
        """One owner more for each of the blocks, all of which must be in use."""
        for block in blocks:
            assert self.num_owners(block) > 0, f"block {block} is free, nobody may retain it"
            self._num_owners[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """One owner less for each of the blocks; those without any are free at once."""
        for block in blocks:
            assert self.num_owners(block) > 0, f"block {block} is released more than it is owned"
            self._num_owners[block] -= 1
            if self._num_owners[block] == 0:
                heapq.heappush(self._freed, block)

    def check(self) -> None:
        """Recount from scratch; AssertionError if the invariant is broken. O(blocks ever used)."""
        assert len(self._num_owners) <= self.num_blocks
        assert all(owners >= 0 for owners in self._num_owners)
        unowned = [block for block, owners in enumerate(self._num_owners) if owners == 0]
        assert sorted(self._freed) == unowned, "the free list is not the list of unowned blocks"
        assert self.num_free + self.num_used == self.num_blocks

"""Which KV blocks are in use, and by how many owners. Ids only: no bytes are moved here."""

from __future__ import annotations

import heapq
from collections.abc import Iterable


class BlockPool:
    """The ids [0, capacity), of which at most `limit` are in use at once.

    A block is *used* when a sequence owns it, *cached* when no sequence does and the prefix tree
    holds it, else free. A used or cached block may be *trimmed*: it then counts only for what it
    has kept of its bytes. Invariant: `num_used + num_cached + num_free - num_given == limit`, where
    num_given is what trimming has given back, and num_free is below zero for a while after the
    limit was lowered. The lowest free ids go out first, so
    that a pool whose memory is committed on first touch stays as small as its load ever was.
    Called by one owner on the event loop; not thread-safe.
    """

    __slots__ = (
        "capacity",
        "limit",
        "num_used",
        "num_cached",
        "_share",
        "_owners",
        "_held",
        "_freed",
        "_trimmed",
        "_num_trimmed_used",
    )

    def __init__(self, limit: int, capacity: int | None = None, trim_share: float = 0.0) -> None:
        """`trim_share`: of its bytes, what a block gives back when it is trimmed."""
        assert limit >= 1
        self.capacity = limit if capacity is None else capacity
        assert self.capacity >= limit
        self.limit = limit
        """Set by `resize` only."""
        self.num_used = 0
        self.num_cached = 0
        self._share = trim_share
        self._trimmed: set[int] = set()
        self._num_trimmed_used = 0
        # The ids [0, len) were given out at least once; those from len on are free, and no list
        # of them exists: a pool of a million blocks costs nothing before it is used.
        self._owners: list[int] = []
        self._held = bytearray()
        self._freed: list[int] = []  # a heap

    @property
    def num_free(self) -> int:
        return self._left(self.num_used + self.num_cached, len(self._trimmed))

    @property
    def num_available(self) -> int:
        """What is free once no block is cached any more."""
        return self._left(self.num_used, self._num_trimmed_used)

    def _left(self, num_blocks: int, num_trimmed: int) -> int:
        """Beside so many blocks, so many of them trimmed."""
        if not num_trimmed:
            return self.limit - num_blocks
        return min(self.limit + self.given_by(num_trimmed), self.capacity) - num_blocks

    @property
    def num_trimmed(self) -> int:
        return len(self._trimmed)

    def given_by(self, num_trimmed: int) -> int:
        """Whole blocks that so many trimmed ones give back."""
        return int(self._share * num_trimmed)

    def is_trimmed(self, block: int) -> bool:
        return block in self._trimmed

    def trim(self, block: int) -> None:
        """A used block gives back a part of its bytes, until it is free."""
        assert self._share and self.num_owners(block) > 0 and block not in self._trimmed
        self._trimmed.add(block)
        self._num_trimmed_used += 1

    def num_owners(self, block: int) -> int:
        """How many sequences own the block."""
        assert 0 <= block < self.capacity
        return self._owners[block] if block < len(self._owners) else 0

    def allocate(self, n: int) -> list[int] | None:
        """`n` >= 0 free blocks, each with one owner now; or None and nothing has changed.

        O(log(freed)) per block.
        """
        assert n >= 0
        if n > self.num_free and n > 0:
            return None
        num_freed = min(n, len(self._freed))
        # A freed id is always below a fresh one, so taking these first is lowest-first.
        blocks = [heapq.heappop(self._freed) for _ in range(num_freed)]
        for block in blocks:
            self._owners[block] = 1
        fresh = n - num_freed
        blocks.extend(range(len(self._owners), len(self._owners) + fresh))
        self._owners.extend([1] * fresh)
        self._held.extend(bytes(fresh))
        self.num_used += n
        return blocks

    def retain(self, blocks: Iterable[int]) -> None:
        """One owner more for each of the blocks, none of which may be free."""
        for block in blocks:
            owners = self.num_owners(block)
            if owners == 0:
                assert self.is_held(block), f"block {block} is free, nobody may retain it"
                self.num_cached -= 1
                self.num_used += 1
                self._num_trimmed_used += block in self._trimmed
            self._owners[block] = owners + 1

    def release(self, blocks: Iterable[int]) -> None:
        """One owner less for each of the blocks; those without any are free at once, or cached."""
        for block in blocks:
            owners = self.num_owners(block)
            assert owners > 0, f"block {block} is released more than it is owned"
            self._owners[block] = owners - 1
            if owners == 1:
                self.num_used -= 1
                self._num_trimmed_used -= block in self._trimmed
                if self._held[block]:
                    self.num_cached += 1
                else:
                    self._free(block)

    def is_held(self, block: int) -> bool:
        return block < len(self._held) and self._held[block] != 0

    def hold(self, block: int) -> None:
        """The tree keeps a used block, also when its owners are gone."""
        assert self.num_owners(block) > 0 and not self._held[block]
        self._held[block] = 1

    def unhold(self, block: int) -> None:
        """The tree lets go of a block; if nobody owns it, it is free at once."""
        assert self._held[block]
        self._held[block] = 0
        if self._owners[block] == 0:
            self.num_cached -= 1
            self._free(block)

    def _free(self, block: int) -> None:
        self._trimmed.discard(block)
        heapq.heappush(self._freed, block)

    def resize(self, limit: int) -> None:
        """How many blocks may be in use from now on. When it is lowered below what is in use,
        num_free is negative and nothing is allocated until enough came back."""
        assert 1 <= limit <= self.capacity
        self.limit = limit

    def free_ranges(self) -> list[tuple[int, int]]:
        """The ids that were in use before and are free now, as half-open ranges."""
        ranges: list[tuple[int, int]] = []
        for block in sorted(self._freed):
            if ranges and ranges[-1][1] == block:
                ranges[-1] = (ranges[-1][0], block + 1)
            else:
                ranges.append((block, block + 1))
        return ranges

    def check_counts(self) -> None:
        """The cheap part of `check`: O(1)."""
        assert self.num_used >= 0 and self.num_cached >= 0
        assert self.num_used + self.num_cached + len(self._freed) == len(self._owners)
        assert len(self._owners) <= self.capacity

    def check(self) -> None:
        """Recount from scratch; AssertionError if the invariant is broken. O(blocks ever used)."""
        self.check_counts()
        assert len(self._held) == len(self._owners)
        assert all(owners >= 0 for owners in self._owners)
        used = sum(owners > 0 for owners in self._owners)
        pairs = list(enumerate(zip(self._owners, self._held, strict=True)))
        unowned = [block for block, (owners, held) in pairs if owners == 0 and not held]
        assert sorted(self._freed) == unowned, "the free list is not the list of unowned blocks"
        assert self._trimmed.isdisjoint(unowned), "a free block is still trimmed"
        assert self._num_trimmed_used == sum(self._owners[block] > 0 for block in self._trimmed)
        cached = sum(owners == 0 and held != 0 for _, (owners, held) in pairs)
        assert (used, cached) == (self.num_used, self.num_cached)

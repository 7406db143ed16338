"""BlockPool against a dictionary of owners."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from quantd.daemon.kv.pool import BlockPool

NUM_BLOCKS = 12


def test_lowest_ids_first() -> None:
    pool = BlockPool(8)
    assert pool.allocate(4) == [0, 1, 2, 3]
    pool.release([2, 0])
    assert pool.allocate(3) == [0, 2, 4]


def test_all_or_nothing() -> None:
    pool = BlockPool(4)
    assert pool.allocate(3) is not None
    assert pool.allocate(2) is None
    assert (pool.num_free, pool.num_used) == (1, 3)
    assert pool.allocate(0) == []
    assert pool.allocate(1) == [3]
    assert pool.allocate(1) is None
    pool.check()


def test_a_shared_block_is_free_only_after_its_last_owner() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(1)
    assert blocks is not None
    pool.retain(blocks)
    pool.release(blocks)
    assert pool.num_owners(blocks[0]) == 1
    assert pool.num_used == 1
    pool.release(blocks)
    assert pool.num_owners(blocks[0]) == 0
    assert pool.num_free == 2


@pytest.mark.parametrize("wrong", [lambda pool: pool.release([0]), lambda pool: pool.retain([0])])
def test_a_free_block_has_no_owner_to_add_or_take(wrong) -> None:  # type: ignore[no-untyped-def]
    pool = BlockPool(2)
    with pytest.raises(AssertionError, match="block 0"):
        wrong(pool)
    blocks = pool.allocate(1)
    assert blocks == [0]
    pool.release(blocks)
    with pytest.raises(AssertionError, match="block 0"):
        wrong(pool)


def test_check_finds_a_lost_block() -> None:
    pool = BlockPool(4)
    pool.allocate(2)
    pool._owners[1] = 0
    with pytest.raises(AssertionError, match="free list"):
        pool.check()


def test_a_huge_pool_costs_nothing_unused() -> None:
    pool = BlockPool(10**12)
    assert pool.allocate(2) == [0, 1]
    assert pool.num_free == 10**12 - 2


def test_what_was_in_use_and_is_free_as_ranges() -> None:
    pool = BlockPool(20)
    assert pool.free_ranges() == []
    pool.allocate(12)
    pool.release([9, 2, 5, 3, 11, 4, 0])
    assert pool.free_ranges() == [(0, 1), (2, 6), (9, 10), (11, 12)]


class PoolMachine(RuleBasedStateMachine):
    """Handles of blocks are allocated, shared and released in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS)
        self.handles: list[list[int]] = []

    def owners(self) -> dict[int, int]:
        owners: dict[int, int] = {}
        for blocks in self.handles:
            for block in blocks:
                owners[block] = owners.get(block, 0) + 1
        return owners

    @rule(n=st.integers(0, NUM_BLOCKS + 1))
    def allocate(self, n: int) -> None:
        free = [block for block in range(NUM_BLOCKS) if block not in self.owners()]
        blocks = self.pool.allocate(n)
        assert blocks == (free[:n] if n <= len(free) else None)
        if blocks is not None:
            self.handles.append(blocks)

    @precondition(lambda self: self.handles)
    @rule(data=st.data())
    def retain(self, data: st.DataObject) -> None:
        blocks = data.draw(st.sampled_from(self.handles))
        self.pool.retain(blocks)
        self.handles.append(list(blocks))

    @precondition(lambda self: self.handles)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.handles) - 1))
        self.pool.release(self.handles.pop(index))

    @invariant()
    def agrees(self) -> None:
        owners = self.owners()
        self.pool.check()
        assert self.pool.num_used == len(owners)
        assert self.pool.num_free == NUM_BLOCKS - len(owners)
        assert all(
            self.pool.num_owners(block) == owners.get(block, 0) for block in range(NUM_BLOCKS)
        )


TestPoolMachine = PoolMachine.TestCase

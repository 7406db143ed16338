"""Spills and fetches by way of buffers, on a queue that does all as late or as early as it may:
what is where at the end, and what was read on the way. Then without each of the waits."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics.fake_queue import FakeQueue, poisoned
from torch import Tensor

from quantd.daemon.types import BlockCopy
from quantd.daemon.worker.gpu import bounce
from quantd.daemon.worker.gpu.bounce import Bounce, bounce_bytes, buffer_blocks
from quantd.daemon.worker.gpu.queue import Copied, Mark, Work
from quantd.daemon.worker.host import HostPool
from quantd.daemon.worker.memory import KvPools
from quantd.kernels import ops

NUM_BLOCKS, NUM_PLACES, BUFFER_BLOCKS = 7, 5, 2
OFFSET = 1000
"""From one pool to the next, so that what lies in the wrong layer is seen."""


class World:
    """Blocks and places that each hold one number in every layer, in tensors and as they ought to
    be."""

    def __init__(self, queue: FakeQueue) -> None:
        shape = (NUM_BLOCKS + 1, 1, 16, 2)
        keys, values = (tuple(torch.zeros(shape) for _ in range(2)) for _ in range(2))
        self.pools = KvPools(keys, values, NUM_BLOCKS, 4 * keys[0][0].nbytes)
        self.host = HostPool(self.pools, NUM_PLACES)
        self.queue = queue
        with poisoned():
            self.bounce = Bounce(queue, self.pools, self.host, queue.run)
        self.blocks, self.places = list(range(NUM_BLOCKS)), [-1 - i for i in range(NUM_PLACES)]
        self._read: list[tuple[Tensor, int]] = []
        for i, tensor in enumerate(self.pools.tensors):
            for block, number in enumerate(self.blocks):
                tensor[block] = number + i * OFFSET
            for place, number in enumerate(self.places):
                self.host.places[place].chunk(4)[i].fill_(number + i * OFFSET)

    def write(self, block: int, number: int) -> None:
        """As a step does."""

        def work() -> None:
            for i, tensor in enumerate(self.pools.tensors):
                tensor[block] = number + i * OFFSET

        self.queue.run(work)
        self.blocks[block] = number

    def read(self, block: int) -> None:
        """As a step does."""
        found = torch.zeros(4)

        def work() -> None:
            found.copy_(torch.stack([tensor[block, 0, 15, 1] for tensor in self.pools.tensors]))

        self.queue.run(work)
        self._read.append((found, self.blocks[block]))

    def copy(self, *copies: BlockCopy) -> None:
        """As the runner does."""
        for is_cow, part in groupby(copies, lambda one: one.kind == "cow"):
            some = tuple(part)
            if is_cow:
                pairs = [(one.src, one.dst) for one in some]
                self.queue.run(partial(ops.copy_blocks, self.pools.tensors, pairs))
            else:
                self.bounce.copy(some)
        for one in copies:
            source = self.places if one.kind == "fetch" else self.blocks
            target = self.places if one.kind == "spill" else self.blocks
            target[one.dst] = source[one.src]

    def is_right(self) -> bool:
        self.queue.settle()
        right = True
        for block, number in enumerate(self.blocks):
            for i, tensor in enumerate(self.pools.tensors):
                right &= bool(torch.all(tensor[block] == number + i * OFFSET))
        for place, number in enumerate(self.places):
            for i, part in enumerate(self.host.places[place].chunk(4)):
                right &= bool(torch.all(part == number + i * OFFSET))
        offsets = torch.arange(4) * OFFSET
        return right and all(torch.equal(found, number + offsets) for found, number in self._read)


@pytest.fixture(autouse=True, scope="module")
def small_buffers() -> Iterator[None]:
    block_bytes = 4 * 16 * 2 * 4
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bounce, "BUFFER_BYTES", BUFFER_BLOCKS * block_bytes + 5)
        yield


def some_steps(world: World, seed: int) -> None:
    """Plans of copies of all kinds, with runs that are longer than both buffers, and steps between
    them that write to blocks which were just saved, and read what was fetched."""
    dice = random.Random(seed)
    for block in range(NUM_BLOCKS):
        world.write(block, 10 + block)
    for step in range(1, 5):
        copies: list[BlockCopy] = []
        for _ in range(dice.randrange(6)):
            kind: Literal["spill", "fetch", "cow"] = dice.choice(("spill", "fetch", "cow"))
            for _ in range(dice.choice((1, 1, 2, 3, 5, 9))):
                source = dice.randrange(NUM_PLACES if kind == "fetch" else NUM_BLOCKS)
                target = dice.randrange(NUM_PLACES if kind == "spill" else NUM_BLOCKS)
                copies.append(BlockCopy(kind, source, target))
        world.copy(*copies)
        for _ in range(dice.randrange(4)):
            world.read(dice.randrange(NUM_BLOCKS))
            world.write(dice.randrange(NUM_BLOCKS), 100 * step + dice.randrange(100))


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    eagerness=st.sampled_from((0.0, 0.1, 0.5, 0.9)),
    prefers_copies=st.booleans(),
)
def test_any_copies_in_any_schedule_are_as_one_after_another(
    seed: int, eagerness: float, prefers_copies: bool
) -> None:
    world = World(FakeQueue(seed, eagerness, prefers_copies=prefers_copies))
    some_steps(world, seed)
    assert world.is_right()


class Deaf(FakeQueue):
    """Leaves out one kind of wait."""

    bounce: Bounce
    left_out = ""
    num_left_out = 0

    def copy(self, work: Work, after: Mark | None) -> Copied:
        if after is not None:
            is_reuse = any(after is buffer.scattered for buffer in self.bounce._ins)
            after = None if self._leaves_out("scattered" if is_reuse else "gathered") else after
        return super().copy(work, after)

    def follow(self, copied: Copied) -> None:
        is_reuse = any(copied is buffer.saved for buffer in self.bounce._outs)
        if not self._leaves_out("saved" if is_reuse else "copied in"):
            super().follow(copied)

    def _leaves_out(self, wait: str) -> bool:
        self.num_left_out += wait == self.left_out
        return wait == self.left_out


WAITS = {
    "gathered": "a place gets what was in the buffer before the block was gathered",
    "saved": "a buffer is gathered into before what was in it has got to its place",
    "copied in": "a block gets what was in the buffer before the place was copied there",
    "scattered": "a buffer is copied into before what was in it has got to its block",
}


def _worlds(change: Callable[[World], None]) -> tuple[int, int]:
    """(How many of some schedules went wrong, how often a wait was left out)."""
    wrong = num_left_out = 0
    for seed in range(30):
        queue = Deaf(seed, (0.0, 0.3)[seed % 2], prefers_copies=seed % 3 == 0)
        world = World(queue)
        queue.bounce = world.bounce
        change(world)
        some_steps(world, seed)
        wrong += not world.is_right()
        num_left_out += queue.num_left_out
    return wrong, num_left_out


@pytest.mark.parametrize("wait", WAITS)
def test_without_one_of_the_waits_it_is_wrong(wait: str) -> None:
    def leave_out(world: World) -> None:
        world.queue.left_out = wait  # type: ignore[attr-defined]

    wrong, num_left_out = _worlds(leave_out)
    assert num_left_out >= 30
    assert wrong >= 3, WAITS[wait]
    assert _worlds(lambda world: None) == (0, 0)


def test_gathered_beside_the_steps_it_is_wrong() -> None:
    """After the block has its next owner, or before its own step has written it."""

    def gather_beside(world: World) -> None:
        world.bounce._run = lambda work: void(world.queue.copy(work, None))

    def void(_: Any) -> None: ...

    assert _worlds(gather_beside)[0] >= 3


def test_put_together_whatever_they_touch_it_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def all_spills_first(copies: Sequence[BlockCopy]) -> Any:
        yield [c for c in copies if c.kind == "spill"], [c for c in copies if c.kind == "fetch"]

    monkeypatch.setattr(bounce, "_groups", all_spills_first)
    assert _worlds(lambda world: None)[0] >= 3


def test_the_computing_stream_waits_for_no_spill() -> None:
    """As many as both buffers hold: what is computed after them is done and no copy is."""
    world = World(FakeQueue(0, 0.0))
    world.copy(*(BlockCopy("spill", i, i) for i in range(2 * BUFFER_BLOCKS)))
    world.write(0, 70)
    world.queue.compute_until(world.queue._num_put)
    assert world.queue.num_copied == 0
    assert world.is_right()


def test_a_fetch_is_copied_beside_the_step_under_way() -> None:
    world = World(FakeQueue(0, 0.0, prefers_copies=True))
    world.write(0, 70)
    world.copy(*(BlockCopy("fetch", i, i) for i in range(2 * BUFFER_BLOCKS)))
    assert (world.queue.num_copied, world.queue.num_computed) == (2, 0)
    assert world.is_right()


def test_spills_and_fetches_by_turns_are_put_together() -> None:
    """As a full pool gives them: each fetch into the block that was just spilled. All is gathered
    at once, and what is fetched is copied beside the step under way, before what is spilled."""
    world = World(FakeQueue(0, 0.0))
    world.write(0, 70)
    world.copy(
        BlockCopy("spill", 0, 3),
        BlockCopy("fetch", 0, 0),
        BlockCopy("spill", 1, 4),
        BlockCopy("fetch", 1, 1),
    )
    assert len(world.queue._copying) == 2
    # The step, gathering, a mark, a wait, scattering, a mark; nothing waits for the copy out.
    assert world.queue._num_put == 6
    world.queue.compute_until(6)
    assert world.queue.num_copied == 1
    assert world.is_right()


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (("fetch", 0, 1), ("spill", 1, 2)),
        (("fetch", 0, 1), ("spill", 2, 0)),
        (("spill", 1, 0), ("fetch", 0, 2)),
        (("spill", 1, 0), ("fetch", 1, 1)),
    ],
    ids=["saves what came", "into a place that was read", "reads what was saved", "into its block"],
)
@pytest.mark.parametrize("prefers_copies", [False, True])
def test_what_touches_the_same_stays_in_order(
    first: Any, second: Any, prefers_copies: bool
) -> None:
    world = World(FakeQueue(0, 0.0, prefers_copies=prefers_copies))
    world.copy(BlockCopy(*first), BlockCopy(*second))
    assert world.is_right()


def test_how_large_buffers_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounce, "BUFFER_BYTES", 16 << 20)
    assert buffer_blocks(2 << 20, 1000) == 8
    assert buffer_blocks(3 << 20, 1000) == 5
    assert buffer_blocks(17 << 20, 1000) == 1, "a block is not cut"
    assert buffer_blocks(2 << 20, 3) == 3, "no more than there are places"
    assert bounce_bytes(3 << 20, 1000) == 4 * 15 << 20
    assert bounce_bytes(2 << 20, 0) == 0, "there is no host tier"


def test_without_a_host_tier_nothing_is_allocated() -> None:
    pool = torch.zeros(3, 1, 16, 2)
    pools = KvPools((pool,), (pool,), 2, 2 * pool[0].nbytes)
    queue = FakeQueue()
    made = Bounce(queue, pools, HostPool(pools, 0), queue.run)
    assert all(buffer.rows.nbytes == 0 for buffer in (*made._outs, *made._ins))

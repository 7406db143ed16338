"""The host pool beside a GPU: pinned places, a second stream, and what goes wrong between two.

A kernel that only waits is put in front of the stream that should be late, so that a race is lost
wherever it is not forbidden; the controls show that it would be. On a CPU the tests' queue is late.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from gpu_harness import DEVICE, MARKS, NEEDS_STREAMS, ON_CPU, need_memory
from gpu_models import write
from gpu_steps import GREEDY, Steps, spills
from numerics.fake_queue import FakeQueue
from numerics.tiny import prompt_of
from torch import Tensor

from quantd.daemon.types import (
    BlockCopy,
    Chunk,
    DiskDone,
    DiskIndex,
    DiskOp,
    NewSequence,
    StepResult,
)
from quantd.daemon.worker.gpu.bounce import Bounce
from quantd.daemon.worker.gpu.cuda import CudaQueue
from quantd.daemon.worker.host import HostPool
from quantd.daemon.worker.memory import KvPools

pytestmark = MARKS

_cuda: Any = torch.cuda
LONG = 400_000_000
"""Cycles: a fifth of a second or more."""
NUM_LAYERS, NUM_BLOCKS, NUM_PLACES = 3, 8, 8
STALE = -1
"""What is in the buffers."""


class Parts:
    """Eight blocks, block b filled with b; eight places of zeros; buffers of `STALE`."""

    def __init__(self) -> None:
        def tensors() -> tuple[Tensor, ...]:
            shape = (NUM_BLOCKS, 2, 16, 64)
            return tuple(
                torch.empty(shape, dtype=torch.float16, device=DEVICE) for _ in range(NUM_LAYERS)
            )

        keys, values = tensors(), tensors()
        block_bytes = 2 * NUM_LAYERS * keys[0][0].nbytes
        self.pools = KvPools(keys, values, NUM_BLOCKS, block_bytes)
        self.host = HostPool(self.pools, NUM_PLACES)
        self.queue: Any = FakeQueue(0, 0.0) if ON_CPU else CudaQueue(DEVICE)
        self.bounce = Bounce(self.queue, self.pools, self.host, self.queue.run)
        # What a first copy and a first fill set up is not part of a test.
        for _ in range(2):
            self.spill(0, 0)
            self.fetch(0, 0)
        for block in range(NUM_BLOCKS):
            self.fill(block, block)
        self.queue.settle()
        self.host.places.zero_()
        for buffer in (*self.bounce._outs, *self.bounce._ins):
            buffer.rows.fill_(STALE)
        self.settle()

    def fill(self, block: int, value: float) -> None:
        """As a step writes a block, on the stream that computes."""

        def work() -> None:
            for tensor in self.pools.tensors:
                tensor[block].fill_(value)

        self.queue.run(work)

    def read(self, block: int) -> list[Tensor]:
        """As a step reads a block."""
        found: list[Tensor] = []
        self.queue.run(lambda: found.extend(tensor[block].clone() for tensor in self.pools.tensors))
        return found

    def spill(self, block: int, place: int) -> None:
        self.bounce.copy([BlockCopy("spill", block, place)])

    def fetch(self, place: int, block: int) -> None:
        self.bounce.copy([BlockCopy("fetch", place, block)])

    def delay_copies(self) -> None:
        if not ON_CPU:
            with _cuda.stream(self.queue._copying):
                _cuda._sleep(LONG)

    def delay_computing(self) -> None:
        if ON_CPU:
            self.queue.prefers_copies = True
        else:
            _cuda._sleep(LONG)

    def settle(self) -> None:
        self.queue.settle()

    def place_holds(self, place: int, value: float) -> bool:
        self.settle()
        return bool(torch.all(self.host.places[place] == value))

    def hold(self, tensors: list[Tensor], value: float) -> bool:
        self.settle()
        return len(tensors) > 0 and all(bool(torch.all(tensor == value)) for tensor in tensors)


@pytest.fixture
def parts() -> Iterator[Parts]:
    if ON_CPU:
        yield Parts()
        return
    with _cuda.stream(_cuda.current_stream(DEVICE)):  # and back to it: a queue sets its own
        yield Parts()


@pytest.fixture
def copies_that_do_not_wait(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    """The copying stream does not wait for the computing one."""
    copy = parts.queue.copy
    monkeypatch.setattr(parts.queue, "copy", lambda work, after: copy(work, None))


@pytest.fixture
def steps_that_do_not_wait(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    """The computing stream does not wait for the copying one."""
    monkeypatch.setattr(parts.queue, "follow", lambda copied: None)


@NEEDS_STREAMS
def test_places_are_pinned_and_nobody_waits_for_a_copy(parts: Parts) -> None:
    assert parts.host.places.is_pinned()
    assert parts.queue._copying != _cuda.current_stream(DEVICE)
    parts.delay_computing()
    parts.spill(1, 1)
    parts.fetch(1, 2)
    assert not parts.queue._copying.query(), "the copies are still to come"
    assert parts.place_holds(1, 1)
    assert parts.hold(parts.read(2), 1)


def test_computing_goes_on_beside_a_spill(parts: Parts) -> None:
    parts.delay_copies()
    parts.spill(1, 1)
    parts.fill(1, 77)
    parts.queue.mark().wait()
    if ON_CPU:
        assert parts.queue._copying
    else:
        assert not parts.queue._copying.query()
    assert parts.place_holds(1, 1)


def test_a_fetch_is_copied_beside_the_step_under_way(parts: Parts) -> None:
    parts.host.places[2].fill_(55)
    parts.delay_computing()
    mark = parts.queue.mark()
    parts.fetch(2, 3)
    if ON_CPU:
        assert not parts.queue._copying
    else:
        parts.queue._copying.synchronize()
    assert not mark.is_reached()
    assert parts.hold(parts.read(3), 55)


def test_a_spill_waits_for_the_step_that_fills_its_block(parts: Parts) -> None:
    parts.delay_computing()
    parts.fill(1, 77)
    parts.spill(1, 1)
    assert parts.place_holds(1, 77)


@pytest.mark.usefixtures("copies_that_do_not_wait")
def test_without_that_wait_it_saves_what_was_in_the_buffer(parts: Parts) -> None:
    parts.delay_computing()
    parts.fill(1, 77)
    parts.spill(1, 1)
    assert parts.place_holds(1, STALE)


def test_a_freed_block_is_not_overwritten_before_its_spill_has_read_it(parts: Parts) -> None:
    parts.delay_copies()
    parts.spill(1, 1)
    parts.fill(1, float("nan"))  # the next owner's keys and values
    assert parts.place_holds(1, 1)


def test_a_step_waits_for_the_fetch_of_what_it_reads(parts: Parts) -> None:
    parts.host.places[2].fill_(55)
    parts.delay_copies()
    parts.fetch(2, 3)
    assert parts.hold(parts.read(3), 55)


@pytest.mark.usefixtures("steps_that_do_not_wait")
def test_without_that_wait_a_step_reads_what_was_in_the_buffer(parts: Parts) -> None:
    parts.host.places[2].fill_(55)
    parts.delay_copies()
    parts.fetch(2, 3)
    assert parts.hold(parts.read(3), STALE)


def test_a_buffer_is_not_gathered_into_before_it_was_saved(parts: Parts) -> None:
    parts.delay_copies()
    for block in (1, 2, 3, 4):
        parts.spill(block, block)
    assert all(parts.place_holds(block, block) for block in (1, 2, 3, 4))


@pytest.mark.usefixtures("steps_that_do_not_wait")
def test_without_that_wait_the_next_block_is_saved_in_its_place(parts: Parts) -> None:
    parts.delay_copies()
    for block in (1, 2, 3, 4):
        parts.spill(block, block)
    assert parts.place_holds(1, 3) and parts.place_holds(2, 4)


def _fetch_three(parts: Parts) -> None:
    for place in (1, 2, 3):
        parts.host.places[place].fill_(50 + place)
    parts.delay_computing()
    for place in (1, 2, 3):
        parts.fetch(place, 3 + place)


def test_a_buffer_is_not_copied_into_before_it_was_scattered(parts: Parts) -> None:
    _fetch_three(parts)
    assert all(parts.hold(parts.read(3 + place), 50 + place) for place in (1, 2, 3))


@pytest.mark.usefixtures("copies_that_do_not_wait")
def test_without_that_wait_the_next_place_comes_in_its_stead(parts: Parts) -> None:
    _fetch_three(parts)
    assert parts.hold(parts.read(4), 53)


def test_copies_are_in_order_also_within_the_pool(parts: Parts) -> None:
    parts.host.places[2].fill_(55)
    parts.delay_copies()
    parts.spill(1, 1)
    parts.fetch(2, 1)
    parts.queue.run(lambda: parts.pools.copy(1, 4))
    parts.spill(5, 2)
    assert parts.place_holds(1, 1) and parts.place_holds(2, 5)
    assert parts.hold(parts.read(1), 55) and parts.hold(parts.read(4), 55)


def test_the_disk_sees_a_place_when_the_copy_has_happened(parts: Parts) -> None:
    parts.delay_copies()
    parts.spill(6, 1)
    parts.queue.follow(parts.bounce.last)
    parts.queue.mark().wait()
    found = torch.frombuffer(parts.host.bytes_of(1), dtype=torch.float16)
    assert bool(torch.all(found == 6))


def test_without_a_queue_a_copy_is_done_when_the_call_returns(parts: Parts) -> None:
    """For models that give vectors, whose disk is told of a place at once."""
    parts.settle()
    parts.host.spill(3, 1)
    assert bool(parts.host.places[1].eq(3).all())
    parts.host.fetch(1, 5)
    parts.host.places.zero_()
    assert all(bool(tensor[5].eq(3).all()) for tensor in parts.pools.tensors)


@NEEDS_STREAMS
def test_blocks_whose_offset_fits_in_no_32_bits(parts: Parts) -> None:
    """In elements, and so in bytes."""
    need_memory(9 << 30)
    shape = (8, 16, 128)
    per_block = 8 * 16 * 128
    count = (1 << 31) // per_block + 100
    keys = torch.zeros((count, *shape), dtype=torch.float16, device=DEVICE)
    values = torch.zeros((count, *shape), dtype=torch.float16, device=DEVICE)
    pools = KvPools((keys,), (values,), count, 2 * keys[0].nbytes)
    bounce = Bounce(parts.queue, pools, HostPool(pools, 4), parts.queue.run)
    last = count - 1
    pattern = (torch.arange(per_block, device=DEVICE) % 1999 + 1).view(shape).half()
    keys[last].copy_(pattern)
    values[last].copy_(-pattern)
    bounce.copy([BlockCopy("spill", last, 3)])
    bounce.copy([BlockCopy("fetch", 3, last - 1)])
    pools.copy(last - 1, last - 2)
    _cuda.synchronize()
    for block in (last, last - 1, last - 2):
        assert torch.equal(keys[block], pattern) and torch.equal(values[block], -pattern)
    assert torch.count_nonzero(keys[: last - 2]) == 0
    assert torch.count_nonzero(values[: last - 2]) == 0


# --- through the runner ---------------------------------------------------------------------------

PROMPT = prompt_of(70)


def through_files(steps: Steps, places: tuple[int, ...]) -> tuple[int, ...]:
    """Writes places to disk and reads them into others."""
    sent: list[DiskDone | DiskIndex] = []
    steps.runner.open_disk(sent.append)

    def run(kind: Literal["write", "read"], at: tuple[int, ...]) -> None:
        before = len([message for message in sent if isinstance(message, DiskDone)])
        keys = [bytes([i]) * 32 for i in range(len(at))]
        ops = tuple(DiskOp(kind, key, place) for key, place in zip(keys, at, strict=True))
        steps.step(disk=ops)
        deadline = time.monotonic() + 240
        while len(done := [m for m in sent if isinstance(m, DiskDone)]) < before + len(at):
            assert time.monotonic() < deadline
            time.sleep(0.002)
        assert all(message.error is None for message in done)

    run("write", places)
    others = tuple(place + len(places) for place in places)
    run("read", others)
    return others


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("disk", [False, True])
def test_what_was_spilled_while_its_blocks_got_a_new_owner_comes_back_the_same(
    tmp_path: Path, dtype: str, disk: bool
) -> None:
    options: dict[str, Any] = {"load_format": "dummy", "dtype": dtype, "host_kv_bytes": 1 << 20}
    if disk:
        options |= {"disk_kv_path": str(tmp_path / "disk"), "disk_kv_bytes": 1 << 24}
    steps = Steps(write(tmp_path / "model"), kv_bytes=1 << 23, **options)

    def last_chunk(*blocks: int) -> StepResult:
        """The same with and without a spill before: sums may depend on the shape of a batch."""
        new = NewSequence(2, PROMPT, 70, GREEDY)
        return steps.step(Chunk(2, 64, 70, blocks, True), add=(new,))

    steps.step(Chunk(1, 0, 64, (3, 1, 7, 5)), add=(NewSequence(1, PROMPT, 70, GREEDY),))
    expected = last_chunk(3, 1, 7, 5, 9)
    # In one plan: the blocks are spilled, and another prompt is computed into them.
    other = NewSequence(3, prompt_of(64, 9), 64, GREEDY)
    chunk = Chunk(3, 0, 64, (3, 1, 7, 5), True)
    steps.put(chunk, add=(other,), drop=(1, 2), copies=spills((3, 1, 7, 5)))
    places = through_files(steps, (0, 1, 2, 3)) if disk else (0, 1, 2, 3)
    fetched = tuple(BlockCopy("fetch", place, 20 + i) for i, place in enumerate(places))
    steps.put(drop=(3,), copies=fetched)
    result = last_chunk(20, 21, 22, 23, 9)
    pairs = zip(result.sampled, expected.sampled, strict=True)
    assert all((a.token, a.logprob) == (b.token, b.logprob) for a, b in pairs)

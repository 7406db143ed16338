"""The host pool beside a GPU: pinned places, a second stream, and what goes wrong between two.

A kernel that only waits is put in front of the stream that should be late, so that a race is lost
wherever it is not forbidden; the controls show that it would be.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from gpu_harness import DEVICE, MARKS, NEEDS_STREAMS
from gpu_models import write
from gpu_steps import GREEDY, Steps, spills
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
from quantd.daemon.worker.host import HostPool
from quantd.daemon.worker.memory import KvPools

pytestmark = MARKS

_cuda: Any = torch.cuda
LONG = 400_000_000
"""Cycles: a fifth of a second or more."""
NUM_LAYERS, NUM_BLOCKS, NUM_PLACES = 3, 8, 8


class Parts:
    """Eight blocks, block b filled with b; eight places of zeros."""

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
        # What a first copy and a first fill set up is not part of a test.
        self.host.spill(0, 0)
        self.host.fetch(0, 0)
        for block in range(NUM_BLOCKS):
            self.fill(block, block)
        _cuda.synchronize()
        self.host._places.zero_()

    def fill(self, block: int, value: float) -> None:
        """As a step writes a block, on the stream that computes."""
        for tensor in (*self.pools.keys, *self.pools.values):
            tensor[block].fill_(value)

    def read(self, block: int) -> list[Tensor]:
        """As a step reads a block."""
        return [tensor[block].clone() for tensor in (*self.pools.keys, *self.pools.values)]

    def delay_copies(self) -> None:
        with _cuda.stream(self.host._stream):
            _cuda._sleep(LONG)

    def place_holds(self, place: int, value: float) -> bool:
        self.host.copied()
        return bool(torch.all(self.host._places[place] == value))


@pytest.fixture
def parts() -> Parts:
    return Parts()


def hold(tensors: list[Tensor], value: float) -> bool:
    _cuda.synchronize()
    return all(bool(torch.all(tensor == value)) for tensor in tensors)


@NEEDS_STREAMS
def test_places_are_pinned_and_nobody_waits_for_a_copy(parts: Parts) -> None:
    assert parts.host._places.is_pinned()
    assert parts.host._stream != _cuda.current_stream(DEVICE)
    _cuda._sleep(LONG)
    started = time.perf_counter()
    parts.host.spill(1, 1)
    parts.host.fetch(1, 2)
    assert time.perf_counter() - started < 0.1
    assert not parts.host._stream.query(), "the copies are still to come"
    assert parts.place_holds(1, 1)
    assert hold(parts.read(2), 1)


@NEEDS_STREAMS
def test_a_spill_waits_for_the_step_that_fills_its_block(parts: Parts) -> None:
    _cuda._sleep(LONG)
    parts.fill(1, 77)
    parts.host.spill(1, 1)
    assert parts.place_holds(1, 77)


@NEEDS_STREAMS
def test_without_that_wait_it_saves_what_was_there_before(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unordered(self: HostPool) -> AbstractContextManager[object]:
        return _cuda.stream(self._stream)

    monkeypatch.setattr(HostPool, "_ordered", unordered)
    _cuda._sleep(LONG)
    parts.fill(1, 77)
    parts.host.spill(1, 1)
    assert parts.place_holds(1, 1)


@NEEDS_STREAMS
def test_a_freed_block_is_not_overwritten_before_its_spill_has_read_it(parts: Parts) -> None:
    parts.delay_copies()
    parts.host.spill(1, 1)
    parts.fill(1, float("nan"))  # the next owner's keys and values
    _cuda.synchronize()
    assert parts.place_holds(1, 1)


@NEEDS_STREAMS
def test_a_step_waits_for_the_fetch_of_what_it_reads(parts: Parts) -> None:
    parts.host._places[2].fill_(55)
    parts.delay_copies()
    parts.host.fetch(2, 3)
    assert hold(parts.read(3), 55)


@pytest.fixture
def unsettled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The computing stream does not wait for copies."""
    monkeypatch.setattr(HostPool, "_settle", lambda self: None)


@NEEDS_STREAMS
@pytest.mark.usefixtures("unsettled")
def test_without_the_other_wait_the_next_owners_bytes_are_saved(parts: Parts) -> None:
    parts.delay_copies()
    parts.host.spill(1, 1)
    parts.fill(1, 99)
    assert parts.place_holds(1, 99)


@NEEDS_STREAMS
@pytest.mark.usefixtures("unsettled")
def test_without_the_other_wait_a_step_reads_what_was_not_fetched_yet(parts: Parts) -> None:
    parts.host._places[2].fill_(55)
    parts.delay_copies()
    parts.host.fetch(2, 3)
    assert hold(parts.read(3), 3)


@NEEDS_STREAMS
def test_copies_are_in_order_also_within_the_pool(parts: Parts) -> None:
    parts.host._places[2].fill_(55)
    parts.delay_copies()
    parts.host.spill(1, 1)
    parts.host.fetch(2, 1)
    parts.pools.copy(1, 4)
    parts.host.spill(5, 2)
    assert parts.place_holds(1, 1) and parts.place_holds(2, 5)
    assert hold(parts.read(1), 55) and hold(parts.read(4), 55)


@NEEDS_STREAMS
def test_the_disk_sees_a_place_when_the_copy_has_happened(parts: Parts) -> None:
    _cuda._sleep(LONG)
    parts.host.spill(6, 1)
    parts.host.copied()
    found = torch.frombuffer(parts.host.bytes_of(1), dtype=torch.float16)
    assert bool(torch.all(found == 6))


@NEEDS_STREAMS
def test_blocks_whose_offset_fits_in_no_32_bits() -> None:
    """In elements, and so in bytes."""
    shape = (8, 16, 128)
    per_block = 8 * 16 * 128
    count = (1 << 31) // per_block + 100
    keys = torch.zeros((count, *shape), dtype=torch.float16, device=DEVICE)
    values = torch.zeros((count, *shape), dtype=torch.float16, device=DEVICE)
    pools = KvPools((keys,), (values,), count, 2 * keys[0].nbytes)
    host = HostPool(pools, 4)
    last = count - 1
    pattern = (torch.arange(per_block, device=DEVICE) % 1999 + 1).view(shape).half()
    keys[last].copy_(pattern)
    values[last].copy_(-pattern)
    host.spill(last, 3)
    host.fetch(3, last - 1)
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
        deadline = time.monotonic() + 30
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

"""KV blocks that leave the pool and come back, or are shared: bit for bit what they were."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from numerics.tiny import Family, make_model, prompt_of

from quantd.daemon.types import (
    BlockCopy,
    Chunk,
    DiskDone,
    DiskIndex,
    DiskOp,
    LoadModel,
    NewSequence,
    Rebind,
    SamplingParams,
    StepPlan,
    StepResult,
)
from quantd.daemon.worker.runner import Runner
from quantd.kernels import ops
from quantd.plugins.api import Refused

SAMPLING = SamplingParams(max_tokens=50, temperature=0.0, logprobs=3)
PROMPT = prompt_of(70)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("llama")
    make_model(Family("llama", {"tie_word_embeddings": True}), made)
    return made


def load(folder: Path, dtype: str = "float32", **fields: Any) -> Runner:
    frame = LoadModel("tiny", str(folder), dtype=dtype, threads=1, host_kv_bytes=1 << 20, **fields)
    return Runner(frame, lambda progress: None)


def step(runner: Runner, *chunks: Chunk, **rest: Any) -> StepResult:
    return runner.execute(StepPlan(1, chunks, **rest))


def new(seq: int, prompt: tuple[int, ...]) -> NewSequence:
    return NewSequence(seq, prompt, len(prompt), SAMPLING)


def alone(runner: Runner, prompt: tuple[int, ...] = PROMPT) -> StepResult:
    """Token and log-probabilities of a prompt computed in blocks 40 and on, in one piece."""
    blocks = tuple(range(40, 40 - (-len(prompt) // 16)))
    result = step(runner, Chunk(99, 0, len(prompt), blocks, True), add=(new(99, prompt),))
    step(runner, drop=(99,))
    return result


def said(result: StepResult) -> list[Any]:
    return [(item.token, item.logprob) for item in result.sampled]


def poison(runner: Runner, *blocks: int) -> None:
    pools = runner._model.pools
    for tensor in (*pools.keys, *pools.values):
        tensor[list(blocks)] = torch.nan


def same(left: StepResult, right: StepResult) -> None:
    """Bits, where the kernels promise them: plain torch sums depend on the shape of a batch."""
    if ops.notes():
        assert [i.token for i in left.sampled] == [i.token for i in right.sampled]
    else:
        assert said(left) == said(right)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_spilled_and_fetched_is_never_spilled(folder: Path, dtype: str) -> None:
    runner = load(folder, dtype)
    expected = alone(runner)
    step(runner, Chunk(1, 0, 64, (3, 1, 7, 5)), add=(new(1, PROMPT),))
    spills = tuple(BlockCopy("spill", block, place) for place, block in enumerate((3, 1, 7, 5)))
    result = step(runner, drop=(1,), copies=spills)
    assert result.copy_seconds > 0
    poison(runner, 3, 1, 7, 5)
    fetches = tuple(BlockCopy("fetch", place, 20 + place) for place in range(4))
    blocks = (20, 21, 22, 23, 24)
    result = step(runner, Chunk(2, 64, 70, blocks, True), add=(new(2, PROMPT),), copies=fetches)
    same(result, expected)


def test_copies_happen_one_after_another(folder: Path) -> None:
    """A block is saved, filled from elsewhere, saved again and copied, all in one plan."""
    runner = load(folder)
    pools = runner._model.pools
    for block in (1, 2, 3):
        for tensor in (*pools.keys, *pools.values):
            tensor[block] = float(block)
    copies = (
        BlockCopy("spill", 1, 0),
        BlockCopy("cow", 2, 1),
        BlockCopy("spill", 1, 1),
        BlockCopy("fetch", 0, 2),
        BlockCopy("fetch", 1, 3),
    )
    step(runner, copies=copies)
    for block, value in ((1, 2.0), (2, 1.0), (3, 2.0)):
        assert all(torch.all(t[block] == value) for t in (*pools.keys, *pools.values))


def test_a_prefix_that_is_computed_in_the_same_step_is_shared(folder: Path) -> None:
    runner = load(folder)
    other = (*PROMPT[:64], *prompt_of(9, 5))
    expected = [alone(runner), alone(runner, other)]
    result = step(
        runner,
        Chunk(1, 0, 70, (2, 4, 6, 8, 9), True),
        Chunk(2, 64, len(other), (2, 4, 6, 8, 10), True),
        add=(new(1, PROMPT), new(2, other)),
    )
    for item, alone_result in zip(result.sampled, expected, strict=True):
        same(StepResult(1, (item,)), alone_result)


def test_a_full_prompt_goes_on_in_a_copy(folder: Path) -> None:
    runner = load(folder)
    prompt = PROMPT[:64]
    expected = alone(runner, prompt)
    step(runner, Chunk(1, 0, 64, (2, 4, 6, 8), True), add=(new(1, prompt),))
    before = [t[8].clone() for t in runner._model.pools.keys]
    result = step(
        runner,
        Chunk(2, 63, 64, (2, 4, 6, 11), True),
        add=(new(2, prompt),),
        copies=(BlockCopy("cow", 8, 11),),
    )
    same(result, expected)
    assert all(torch.equal(a, t[8]) for a, t in zip(before, runner._model.pools.keys, strict=True))


def test_a_rebound_block_is_the_one_that_is_read(folder: Path) -> None:
    runner = load(folder)
    expected = alone(runner)
    step(runner, Chunk(1, 0, 64, (2, 4, 6, 8)), add=(new(1, PROMPT),))
    step(runner, Chunk(2, 0, 64, (12, 14, 16, 18)), add=(new(2, PROMPT),))
    poison(runner, 14)
    result = step(runner, Chunk(2, 64, 70, (19,), True), rebinds=(Rebind(2, 1, 4),))
    same(result, expected)


@pytest.mark.parametrize("size", [1, 7, 16, 17])
def test_cached_is_uncached_at_any_chunk(folder: Path, size: int) -> None:
    runner = load(folder)
    expected = alone(runner)
    step(runner, Chunk(1, 0, 48, (2, 4, 6)), add=(new(1, PROMPT),))
    added: tuple[NewSequence, ...] = (new(2, PROMPT),)
    blocks: tuple[int, ...] = (2, 4, 6, 20, 21)
    for start in range(48, 70, size):
        stop = min(70, start + size)
        needed = -(-stop // 16)
        given, blocks = blocks[:needed], blocks[needed:] if start == 48 else blocks
        if start > 48:
            count = needed - -(-start // 16)
            given, blocks = blocks[:count], blocks[count:]
        result = step(runner, Chunk(2, start, stop, given, stop == 70), add=added)
        added = ()
    same(result, expected)


class Disk:
    """What a runner's disk thread sends."""

    def __init__(self, runner: Runner) -> None:
        self.sent: list[DiskDone | DiskIndex] = []
        runner.open_disk(self.sent.append)

    def wait(self, count: int) -> list[DiskDone | DiskIndex]:
        deadline = time.monotonic() + 240
        while len(self.sent) < count:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        return self.sent


def test_blocks_come_back_from_disk_in_another_process_s_pool(folder: Path, tmp_path: Path) -> None:
    fields = {"disk_kv_path": str(tmp_path / "kv")}
    runner = load(folder, **fields)
    expected = alone(runner)
    disk = Disk(runner)
    step(runner, Chunk(1, 0, 64, (3, 1, 7, 5)), add=(new(1, PROMPT),))
    keys = [bytes([i]) * 32 for i in range(4)]
    step(
        runner,
        copies=tuple(BlockCopy("spill", block, place) for place, block in enumerate((3, 1, 7, 5))),
        disk=tuple(DiskOp("write", key, place) for place, key in enumerate(keys)),
    )
    assert all(done.error is None for done in disk.wait(5)[1:])  # type: ignore[union-attr]
    after = load(folder, **fields)
    again = Disk(after)
    index = again.wait(1)[0]
    assert isinstance(index, DiskIndex) and set(index.keys) == set(keys)
    step(after, disk=tuple(DiskOp("read", key, 7 - i) for i, key in enumerate(keys)))
    assert all(done.error is None for done in again.wait(5)[1:])  # type: ignore[union-attr]
    fetches = tuple(BlockCopy("fetch", 7 - i, 20 + i) for i in range(4))
    blocks = (20, 21, 22, 23, 24)
    result = step(after, Chunk(2, 64, 70, blocks, True), add=(new(2, PROMPT),), copies=fetches)
    same(result, expected)
    other = load(folder, dtype="bfloat16", **fields)
    index = Disk(other).wait(1)[0]
    assert isinstance(index, DiskIndex) and index.keys == ()


def test_what_decides_the_bits_decides_the_revision(folder: Path, tmp_path: Path) -> None:
    first = load(folder).info.kv_revision
    assert load(folder).info.kv_revision == first
    assert load(folder, dtype="bfloat16").info.kv_revision != first
    assert load(folder, quantization="int8").info.kv_revision != first
    copy = tmp_path / "copy"
    make_model(Family("llama", {"tie_word_embeddings": True}), copy)
    assert load(copy).info.kv_revision != first, "another time of change may be other weights"


def test_host_budgets_that_cannot_be(folder: Path) -> None:
    for host_kv_bytes in (1, 1 << 60):
        frame = LoadModel("tiny", str(folder), dtype="float32", host_kv_bytes=host_kv_bytes)
        with pytest.raises(Refused, match=f"host_kv_bytes is {host_kv_bytes}, "):
            Runner(frame, lambda progress: None)


_RELEASE = """
import sys, torch
from quantd.daemon.types import LoadModel
from quantd.daemon.worker.runner import Runner
runner = Runner(LoadModel("t", sys.argv[1], dtype="float32", kv_bytes=64 << 20), lambda p: None)
pools, info = runner._model.pools, runner.info

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

assert info.max_blocks * info.block_bytes > 64 << 20, "room to grow"
for tensor in (*pools.keys, *pools.values):
    tensor[: info.num_blocks] = 1.0
full = resident()
third = info.num_blocks // 3
runner.release_memory(((third, 2 * third),))
freed = full - resident()
assert 0.8 < freed / (third * info.block_bytes) < 1.2, freed
for tensor in (*pools.keys, *pools.values):
    assert torch.all(tensor[:third] == 1) and torch.all(tensor[2 * third : info.num_blocks] == 1)
    tensor[third : 2 * third] = 2.0
    assert torch.all(tensor[third : 2 * third] == 2)
"""


def test_released_memory_goes_back_and_neighbours_stay(folder: Path) -> None:
    command = [sys.executable, "-c", _RELEASE, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr

"""Blocks of which sliding layers have given up their part: not one bit of an answer changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from numerics.tiny import FAMILIES, make_model, prompt_of

from quantd.daemon.types import BlockCopy, Chunk, LoadModel, NewSequence, SamplingParams, StepPlan
from quantd.daemon.worker.runner import Runner

SAMPLING = SamplingParams(max_tokens=50, temperature=0.0, logprobs=3)
PROMPT = prompt_of(70)
BLOCKS = (4, 9, 2, 7, 5)
FULL = 5
"""The layer of the seven that sees everything."""


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    folder = tmp_path_factory.mktemp("gemma3")
    make_model(FAMILIES["gemma3"], folder)
    return Runner(LoadModel("tiny", str(folder), dtype="float32", threads=1), lambda progress: None)


def answer(runner: Runner, *trimmed: int) -> object:
    """What follows PROMPT when these blocks are trimmed before its last six tokens."""
    new = NewSequence(1, PROMPT, len(PROMPT), SAMPLING)
    runner.execute(StepPlan(1, (Chunk(1, 0, 64, BLOCKS[:4]),), add=(new,)))
    trims = tuple(BlockCopy("trim", block, block) for block in trimmed)
    result = runner.execute(StepPlan(2, (Chunk(1, 64, 70, BLOCKS[4:], True),), copies=trims))
    runner.execute(StepPlan(3, (), drop=(1,)))
    return [(item.token, item.logprob) for item in result.sampled]


def test_what_the_worker_says_of_its_windows(runner: Runner) -> None:
    assert (runner.info.window, runner.info.window_share) == (8, 6 / 7)


def test_outside_of_the_window_nothing_is_missed(runner: Runner) -> None:
    whole = answer(runner)
    # Position 64 sees 57 to 64: of the first four blocks only the last.
    assert answer(runner, *BLOCKS[:3]) == whole
    pools = runner._model.pools
    for layer, (keys, values) in enumerate(zip(pools.keys, pools.values, strict=True)):
        for block in BLOCKS[:3]:
            gone = torch.all(keys[block] == 0) and torch.all(values[block] == 0)
            assert gone == (layer != FULL)


def test_inside_of_it_something_is(runner: Runner) -> None:
    """The control: the answer does depend on what is trimmed a block too far."""
    assert answer(runner, BLOCKS[3]) != answer(runner)


def test_a_block_that_fills_no_pages_is_not_trimmed(tmp_path: Path) -> None:
    make_model(FAMILIES["gemma3"], tmp_path)
    frame = LoadModel("tiny", str(tmp_path), dtype="bfloat16", threads=1)
    info = Runner(frame, lambda progress: None).info
    assert (info.window, info.window_share) == (8, 0.0)

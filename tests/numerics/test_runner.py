"""The runner between a plan and its result: the mirror of sequences, and what a load tells."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from numerics.tiny import VOCAB, Driver, Family, make_model, prompt_of, reference

from quantd.daemon.types import (
    BlockCopy,
    Chunk,
    LoadModel,
    ModelInfo,
    NewSequence,
    SamplingParams,
    StepPlan,
    StepResult,
)
from quantd.daemon.worker import main
from quantd.daemon.worker.runner import Runner

GREEDY = SamplingParams(max_tokens=50, temperature=0.0)
WITH_LOGPROBS = SamplingParams(max_tokens=50, temperature=0.0, logprobs=2, prompt_logprobs=2)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("llama")
    return make_model(Family("llama", {"tie_word_embeddings": True}), folder), folder


@pytest.fixture
def runner(made: tuple[Any, Path]) -> Runner:
    return Runner(LoadModel("tiny", str(made[1]), threads=1), lambda progress: None)


def new(seq: int, tokens: tuple[int, ...], num_prompt_tokens: int | None = None) -> NewSequence:
    return NewSequence(seq, tokens, num_prompt_tokens or len(tokens), GREEDY)


def step(runner: Runner, *chunks: Chunk, **rest: Any) -> StepResult:
    return runner.execute(StepPlan(1, chunks, **rest))


def generate(runner: Runner, seq: int, prompt: tuple[int, ...], count: int) -> list[int]:
    """Alone, in blocks 40 and on."""
    blocks = tuple(range(40, 46))
    chunk = Chunk(seq, 0, len(prompt), blocks, True)
    result = step(runner, chunk, add=(new(seq, prompt),))
    tokens = [result.sampled[0].token]
    while len(tokens) < count:
        stop = len(prompt) + len(tokens)
        result = step(runner, Chunk(seq, stop - 1, stop, (), True))
        tokens.append(result.sampled[0].token)
    step(runner, drop=(seq,))
    return tokens


def test_results_are_in_the_order_of_the_plan(runner: Runner) -> None:
    prompts = {5: prompt_of(9, 5), 3: prompt_of(20, 3), 8: prompt_of(4, 8)}
    expected = {seq: generate(runner, seq, prompt, 1) for seq, prompt in prompts.items()}
    result = runner.execute(
        StepPlan(
            77,
            (
                Chunk(5, 0, 9, (1,), True),
                Chunk(3, 0, 18, (2, 3)),
                Chunk(8, 0, 4, (4,), True),
            ),
            add=tuple(new(seq, prompt) for seq, prompt in prompts.items()),
        )
    )
    assert result.step == 77
    assert result.seconds > 0
    assert [(item.seq, [item.token]) for item in result.sampled] == [
        (5, expected[5]),
        (8, expected[8]),
    ]
    # Decodes and the rest of a prompt in one step, in another order.
    result = step(runner, Chunk(3, 18, 20, (), True), Chunk(8, 4, 5, (), True))
    assert [item.seq for item in result.sampled] == [3, 8]
    assert [result.sampled[0].token] == expected[3]


def test_a_plan_without_chunks(runner: Runner) -> None:
    assert step(runner, add=(new(1, (5, 6)),)).sampled == ()
    assert step(runner, drop=(1, 2)).sampled == ()


def test_a_preempted_sequence_goes_on_as_it_would_have(runner: Runner) -> None:
    prompt = prompt_of(21)
    expected = generate(runner, 1, prompt, 8)
    # It comes back with its output so far, other blocks, in the plan that drops it.
    first = generate(runner, 2, prompt, 3)
    step(runner, Chunk(3, 0, 21, (7, 8), True), add=(new(3, prompt),))
    known = prompt + tuple(first)
    result = step(
        runner,
        Chunk(3, 0, len(known), (11, 9), True),
        drop=(3,),
        add=(new(3, known, len(prompt)),),
    )
    tokens = first + [result.sampled[0].token]
    while len(tokens) < 8:
        stop = len(prompt) + len(tokens)
        tokens.append(step(runner, Chunk(3, stop - 1, stop, (), True)).sampled[0].token)
    assert tokens == expected


def test_copied_blocks_hold_what_was_computed(runner: Runner) -> None:
    """A fork shares the full block, and its partial block is a copy."""
    prompt, other = prompt_of(20), prompt_of(20)[:18] + (3, 4)
    expected = generate(runner, 1, other, 4)
    step(runner, Chunk(2, 0, 20, (10, 11), True), add=(new(2, prompt),))
    chunk = Chunk(3, 18, 20, (10, 12), True)
    copies = (BlockCopy("cow", 11, 12),)
    tokens = [step(runner, chunk, add=(new(3, other),), copies=copies).sampled[0].token]
    while len(tokens) < 4:
        stop = 20 + len(tokens)
        tokens.append(step(runner, Chunk(3, stop - 1, stop, (), True)).sampled[0].token)
    assert tokens == expected
    # The first sequence's own block was not touched.
    untouched = step(runner, Chunk(2, 20, 21, (), True)).sampled[0].token
    assert untouched == generate(runner, 4, prompt, 2)[1]


def test_prompt_logprobs(made: tuple[Any, Path], runner: Runner) -> None:
    """One entry for each prompt token but the first, by the chunk that predicts it."""
    model, _ = made
    prompt = prompt_of(20)
    expected = reference(model, prompt)
    add = (NewSequence(1, prompt, 20, WITH_LOGPROBS),)
    first = step(runner, Chunk(1, 0, 7, (0, 1)), add=add)
    second = step(runner, Chunk(1, 7, 19))
    third = step(runner, Chunk(1, 19, 20, (), True))
    assert third.prompt_logprobs == (), "position 19 predicts the first output token"
    items = [*first.prompt_logprobs, *second.prompt_logprobs]
    assert [(item.start, len(item.entries)) for item in items] == [(1, 7), (8, 12)]
    entries = [entry for item in items for entry in item.entries]
    assert [entry.token for entry in entries] == list(prompt[1:])
    for position, entry in enumerate(entries):
        assert entry.logprob == pytest.approx(float(expected[position, entry.token]), abs=1e-4)
        top = expected[position].topk(2)
        assert [token for token, _ in entry.top] == top.indices.tolist()


def test_a_sequence_that_failed_may_still_be_in_the_next_plan(made: tuple[Any, Path]) -> None:
    runner = Runner(LoadModel("tiny", str(made[1]), threads=1), lambda progress: None)
    poison = runner._model.pools.keys[0]
    step(runner, Chunk(1, 0, 16, (3,)), add=(new(1, prompt_of(17)),))
    poison[3] = float("nan")
    result = step(runner, Chunk(1, 16, 17, (4,), True))
    assert "not finite" in str(result.sampled[0].error)
    again = step(runner, Chunk(1, 17, 18, (), True))
    assert again.sampled[0].error is not None


@pytest.mark.parametrize(
    "chunk",
    [
        Chunk(1, 0, 9, (0,)),
        Chunk(1, 5, 5, (0,)),
        Chunk(1, 0, 8),
        Chunk(1, 0, 7, (0,), True),
    ],
)
def test_a_plan_that_cannot_be_is_a_bug(runner: Runner, chunk: Chunk) -> None:
    with pytest.raises(AssertionError):
        step(runner, chunk, add=(new(1, prompt_of(8)),))


def test_info(made: tuple[Any, Path], runner: Runner) -> None:
    model, _ = made
    info = runner.info
    assert isinstance(info, ModelInfo)
    assert info.architecture == "LlamaForCausalLM"
    assert info.num_parameters == sum(p.numel() for p in model.parameters())
    assert info.vocab_size == VOCAB
    assert info.max_context == 512
    assert (info.dtype, info.device) == ("float32", "cpu")
    # 3 layers, keys and values, 2 heads of 16, 16 tokens, 4 bytes.
    assert info.block_bytes == 3 * 2 * 2 * 16 * 16 * 4
    assert info.num_blocks == 8 * 512 // 16
    assert info.quantizers == (("dense", 13),)


def test_padded_ids_are_never_sampled(made: tuple[Any, Path], tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((made[1] / name).read_bytes())
    tokenizer = {
        "model": {"vocab": {"a": 0, "b": 1}, "merges": []},
        "added_tokens": [{"id": 9, "content": "<end>", "special": True}],
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    runner = Runner(LoadModel("tiny", str(tmp_path), threads=1), lambda progress: None)
    assert runner.info.vocab_size == 10
    assert all(token < 10 for token in generate(runner, 1, (1, 2, 3), 12))


def test_dummy_weights_are_the_same_each_time(made: tuple[Any, Path], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((made[1] / "config.json").read_bytes())
    load = LoadModel("tiny", str(tmp_path), load_format="dummy", threads=1)
    one, two = (Runner(load, lambda progress: None) for _ in range(2))
    prompt = prompt_of(12)
    assert generate(one, 1, prompt, 6) == generate(two, 1, prompt, 6)
    assert one.info.num_parameters == Runner(load, lambda progress: None).info.num_parameters


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_dtypes(made: tuple[Any, Path], dtype: str) -> None:
    """Near the fp32 reference; and batched and chunked as alone, bit for bit."""
    model, folder = made
    driver = Driver(folder, dtype=dtype)
    assert driver.runner.info.dtype == dtype
    prompts = [prompt_of(length, length) for length in (30, 3, 17)]
    together = driver.run(prompts, chunk=13, num_decodes=2)
    for prompt, answer in zip(prompts, together, strict=True):
        (alone,) = driver.run([prompt], chunk=len(prompt), num_decodes=2)
        assert torch.equal(alone.logprobs, answer.logprobs)
        expected = reference(model, answer.tokens)[:-1]
        error = (answer.logprobs - expected).square().mean() / expected.square().mean()
        assert float(error) < 1e-3


def test_a_loaded_model_is_no_work_for_pythons_collector(made: tuple[Any, Path]) -> None:
    try:
        runner = main._make_runner(
            LoadModel("tiny", str(made[1]), threads=1), lambda progress: None
        )
        assert runner.info.weight_bytes > 0
        assert gc.isenabled()
        assert gc.get_freeze_count() > 100_000
    finally:
        gc.unfreeze()

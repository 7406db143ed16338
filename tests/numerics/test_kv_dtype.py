"""KV blocks in e4m3. The kernels for GPUs are tested with them in tests/triton; here it is the way
from the setting to the pools, with the specification computing on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from numerics.tiny import Driver, Family, make_model, prompt_of, reference

from quantd.daemon.types import BlockCopy, Chunk, LoadModel, NewSequence, SamplingParams, StepPlan
from quantd.daemon.worker import load as loading
from quantd.daemon.worker.load import choose_kv_dtype, load_model
from quantd.daemon.worker.memory import block_bytes
from quantd.daemon.worker.revision import kv_revision
from quantd.daemon.worker.runner import Runner
from quantd.plugins.api import Refused

CPU = torch.device("cpu")
E4M3 = torch.float8_e4m3fn


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("llama")
    return make_model(Family("llama"), folder), folder


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device does not count."""
    gpu = torch.device("cuda:0")
    monkeypatch.setattr(
        loading, "choose_kv_dtype", lambda wanted, dtype, _: choose_kv_dtype(wanted, dtype, gpu)
    )


def test_which_type(made: tuple[Any, Path]) -> None:
    gpu = torch.device("cuda:0")
    assert choose_kv_dtype("auto", torch.bfloat16, CPU) == torch.bfloat16
    assert choose_kv_dtype("auto", torch.float16, gpu) == torch.float16
    assert choose_kv_dtype("e4m3", torch.bfloat16, gpu) == E4M3
    with pytest.raises(Refused, match="kv_dtype is 'int4', must be auto or e4m3"):
        choose_kv_dtype("int4", torch.bfloat16, gpu)
    with pytest.raises(
        Refused, match='kv_dtype is "e4m3", which the kernels for a CPU do not read'
    ):
        load_model(LoadModel("m", str(made[1]), kv_dtype="e4m3", device="cpu"), lambda _: None)


def test_half_the_bytes_are_twice_the_blocks(made: tuple[Any, Path], as_on_a_gpu: None) -> None:
    def info(kv_dtype: str) -> Any:
        fields = {"dtype": "bfloat16", "device": "cpu", "kv_bytes": 3 << 20}
        load = LoadModel("m", str(made[1]), kv_dtype=kv_dtype, **fields)  # type: ignore[arg-type]
        model = load_model(load, lambda _: None)
        assert model.pools.block_bytes == block_bytes(model.config, model.pools.keys[0].dtype)
        return model.info

    plain, small = info("auto"), info("e4m3")
    assert 2 * small.block_bytes == plain.block_bytes
    assert small.num_blocks == 2 * plain.num_blocks
    assert small.dtype == plain.dtype == "bfloat16"
    assert small.kv_revision != plain.kv_revision, "what lies on disk is not mixed"


def test_the_revision_is_the_settings(made: tuple[Any, Path]) -> None:
    def revision(kv_dtype: str) -> str:
        load = LoadModel("m", str(made[1]), kv_dtype=kv_dtype)
        return kv_revision(load, {}, torch.float32, CPU, 64)

    assert revision("auto") == revision("auto") != revision("e4m3")


def test_answers_are_near(made: tuple[Any, Path], as_on_a_gpu: None) -> None:
    model, folder = made
    driver = Driver(folder, dtype="float32", kv_dtype="e4m3")
    assert driver.runner._model.pools.keys[0].dtype == E4M3
    prompts = [prompt_of(length, length) for length in (40, 7)]
    for answer in driver.run(prompts, chunk=13, num_decodes=3):
        expected = reference(model, answer.tokens)[:-1]
        error = (answer.logprobs - expected).square().mean() / expected.square().mean()
        # Rounding to e4m3 is up to 1/16 of a value; and it is not exact, so it is e4m3 indeed.
        assert 1e-7 < float(error) < (1 / 16) ** 2


def test_blocks_go_to_the_host_and_come_back(made: tuple[Any, Path], as_on_a_gpu: None) -> None:
    fields = {"dtype": "float32", "kv_dtype": "e4m3", "threads": 1, "host_kv_bytes": 1 << 20}
    runner = Runner(LoadModel("m", str(made[1]), **fields), lambda _: None)  # type: ignore[arg-type]
    prompt = prompt_of(33)
    sampling = SamplingParams(max_tokens=9, temperature=0.0, logprobs=3)
    one, two = (NewSequence(seq, prompt, len(prompt), sampling) for seq in (1, 2))
    first = runner.execute(StepPlan(1, (Chunk(1, 0, 33, (0, 1, 2), True),), add=(one,)))
    spills = tuple(BlockCopy("spill", block, block) for block in (0, 1))
    runner.execute(StepPlan(2, (), copies=spills, drop=(1,)))
    pools = runner._model.pools
    for tensor in (*pools.keys, *pools.values):
        tensor[:10].view(torch.uint8).fill_(0x7F)
    fetches = tuple(BlockCopy("fetch", place, 5 + place) for place in (0, 1))
    copies = (*fetches, BlockCopy("cow", 6, 9))
    again = Chunk(2, 32, 33, (5, 9, 7), True)
    second = runner.execute(StepPlan(3, (again,), add=(two,), copies=copies))
    assert second.sampled[0].token == first.sampled[0].token
    assert second.sampled[0].logprob is not None and first.sampled[0].logprob is not None
    assert second.sampled[0].logprob.logprob == pytest.approx(
        first.sampled[0].logprob.logprob, abs=1e-4
    )

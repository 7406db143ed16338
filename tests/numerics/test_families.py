"""Every family against transformers, in fp32: whole, in chunks, batched and decoding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from numerics.tiny import FAMILIES, Driver, Family, make_model, prompt_of, reference

torch.set_num_threads(1)

CLOSE = {"rtol": 0.0, "atol": 1e-4}


@pytest.fixture(scope="module", params=FAMILIES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(the family, transformers' model, a driver of ours)"""
    family = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    model = make_model(family, folder)
    return family, model, Driver(folder, family.max_context)


def test_whole_prompt_and_decode(made: tuple[Family, Any, Driver]) -> None:
    family, model, driver = made
    num_decodes = 6
    prompt = prompt_of(family.length - num_decodes - 1)
    (answer,) = driver.run([prompt], chunk=len(prompt), num_decodes=num_decodes)
    assert len(answer.tokens) == family.length
    expected = reference(model, answer.tokens)[:-1]
    torch.testing.assert_close(answer.logprobs, expected, **CLOSE)
    greedy = expected[len(prompt) - 1 :].argmax(-1).tolist()
    assert answer.tokens[len(prompt) :] == greedy


@pytest.mark.parametrize("chunk", [1, 7, 16, 17])
def test_chunks(made: tuple[Family, Any, Driver], chunk: int) -> None:
    """As in one piece: no operation may depend on where a chunk ends."""
    family, _, driver = made
    prompt = prompt_of(family.length - 1)
    (whole,) = driver.run([prompt], chunk=len(prompt))
    (chunked,) = driver.run([prompt], chunk=chunk)
    _assert_same(family, chunked.logprobs, whole.logprobs)


def test_batched_as_alone(made: tuple[Family, Any, Driver]) -> None:
    family, _, driver = made
    lengths = (5, 16, family.length - 4, 17)
    prompts = [prompt_of(length, seed) for seed, length in enumerate(lengths)]
    batched = driver.run(prompts, chunk=11, num_decodes=3)
    for prompt, together in zip(prompts, batched, strict=True):
        (alone,) = driver.run([prompt], chunk=len(prompt), num_decodes=3)
        assert together.tokens == alone.tokens
        _assert_same(family, together.logprobs, alone.logprobs)


def _assert_same(family: Family, got: torch.Tensor, expected: torch.Tensor) -> None:
    """Bit for bit where the native operations run, that is for heads of 16 times something."""
    if family.config.get("head_dim", 16) % 16 == 0:
        assert torch.equal(got, expected)
    else:
        torch.testing.assert_close(got, expected, rtol=0.0, atol=1e-5)

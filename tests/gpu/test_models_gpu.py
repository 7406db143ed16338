"""Every family on a GPU against the same model on a CPU, in every dtype that it runs in."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
from gpu_harness import MARKS, ON_CPU, sized
from gpu_steps import NAME, Said, Steps
from numerics.tiny import FAMILIES, Driver, make_model, prompt_of

pytest.importorskip("transformers")
pytestmark = MARKS

DECODES = 6
MAX_ERROR = {"float32": 1e-7, "bfloat16": 1e-2, "float16": 2e-4}
"""What a layer that is wrong gives is near 1. A CPU in 16 bits has 2e-3 and 2e-5
at most; a mixture may pick other experts."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: tmp_path_factory.mktemp(name) / "model" for name in FAMILIES}


@functools.cache
def on_a_cpu(name: str, folder: Path) -> tuple[Said, Said]:
    """In fp32: a prompt with some decodes, and all of it as a prompt."""
    family = FAMILIES[name]
    make_model(family, folder)
    driver = Driver(folder, family.max_context, dtype="float32", device="cpu")
    prompt = prompt_of(family.length - DECODES - 1)
    (decoded,) = driver.run([prompt], chunk=len(prompt), num_decodes=DECODES)
    (whole,) = driver.run([decoded.tokens], chunk=len(decoded.tokens))
    return Said(decoded.tokens, decoded.rows), Said(whole.tokens, whole.rows)


@pytest.mark.parametrize("dtype", sized(tuple(MAX_ERROR), ("float32",)))
@pytest.mark.parametrize("name", FAMILIES)
def test_log_probabilities_are_those_of_a_cpu(
    name: str, dtype: str, folders: dict[str, Path]
) -> None:
    family = FAMILIES[name]
    decoded, whole = on_a_cpu(name, folders[name])
    steps = Steps(folders[name], NAME, dtype=dtype, max_context=family.max_context)
    assert steps.runner.info.dtype == dtype
    if not ON_CPU:
        assert steps.runner.info.device.startswith("cuda")
        assert not [note for note in steps.runner.info.notes if "plain torch" in note]
    prompt = decoded.tokens[: family.length - DECODES - 1]
    most = MAX_ERROR[dtype]
    (got,) = steps.run([prompt], decodes=DECODES)
    assert got.error(decoded) <= most
    if dtype == "float32":
        assert got.tokens == decoded.tokens
    # Every position as a prompt, also where a rounding would have made it decode something else.
    (got,) = steps.run([decoded.tokens])
    assert got.error(whole) <= most
    # In chunks, one of them a single row, beside two others.
    others = [prompt_of(9, 5), prompt_of(33, 6)]
    got, *_ = steps.run([decoded.tokens, *others], chunk=7)
    assert got.error(whole) <= most

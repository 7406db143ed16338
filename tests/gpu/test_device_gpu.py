"""What is about the device itself: waits, memory, lost contexts, and steps by dice."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_harness import DEVICE, MARKS, NEEDS_STREAMS, ON_CPU, sized
from gpu_models import PACKED, write
from gpu_steps import GREEDY, WARM, Steps
from msgspec.structs import replace
from numerics.random_plans import BAD_PLACE, TABLE, Dice
from numerics.tiny import prompt_of

from quantd.daemon.types import StepPlan, StepResult

pytestmark = MARKS


@contextmanager
def no_waits() -> Iterator[None]:
    """What waits for the device raises."""
    if ON_CPU:
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("quantization", [None, PACKED], ids=["dense", "packed"])
def test_nothing_in_a_step_waits_for_the_device(
    quantization: dict[str, Any] | None, tmp_path: Path
) -> None:
    """Prompts, chunks, decodes by graphs, every kind of sampling, log-probabilities, copies."""
    steps = Steps(write(tmp_path, quantization), load_format="dummy", host_kv_bytes=1 << 22)
    prompts = [prompt_of(30 + i, i) for i in range(5)]
    each = [GREEDY, WARM, replace(WARM, top_p=0.8), replace(WARM, top_k=5), WARM]
    each[4] = replace(WARM, repetition_penalty=1.3, logit_bias=((5, 3.0),))
    want = steps.run(prompts, 12, chunk=16, sampling=each)  # compiles, records
    with no_waits():
        got = steps.run(prompts, 12, chunk=16, sampling=each)
    assert all(a.same(b) for a, b in zip(got, want, strict=True))


def test_mixtures_do_not_wait_either(tmp_path: Path) -> None:
    moe = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 256,
        "head_dim": 64,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
    if ON_CPU:
        pytest.skip("a CPU computes one expert after the other")
    steps = Steps(write(tmp_path, PACKED, **moe), load_format="dummy")
    prompts = [prompt_of(30 + i, i) for i in range(3)]
    want = steps.run(prompts, 12, chunk=16)
    with no_waits():
        got = steps.run(prompts, 12, chunk=16)
    assert all(a.same(b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("seed", range(sized(12, 3)))
def test_random_plans_ahead_or_one_by_one(seed: int, tmp_path: Path) -> None:
    """Pairs of features by dice: prefixes, forks, spills, preemption, grammars, failures,
    log-probabilities (E30). The plans are those of a scheduler that saw the results one by one."""
    folder = write(tmp_path, PACKED)
    options = {"load_format": "dummy", "dtype": "bfloat16", "host_kv_bytes": 1 << 22}
    results: list[list[StepResult]] = []
    plans: list[StepPlan] = []
    for ahead in (False, True):
        steps = Steps(folder, **options)
        steps.ahead = ahead
        steps.runner.set_tokens(TABLE)
        steps.runner._host.places[BAD_PLACE] = torch.nan
        if not ahead:
            plans = _by_dice(steps, seed, sized(60, 20))
        else:
            for plan in plans:
                _submit(steps, plan)
            _finish(steps)
        results.append(steps.results)
    for one, two in zip(*results, strict=True):
        assert (one.step, one.sampled, one.prompt_logprobs) == (
            two.step,
            two.sampled,
            two.prompt_logprobs,
        )


def _by_dice(steps: Steps, seed: int, count: int) -> list[StepPlan]:
    dice = Dice(seed, 0, len(steps.runner._host.places))
    plans: list[StepPlan] = []
    for _ in range(count):
        plans.append(dice.plan())
        if steps.results:
            dice.told(steps.results[-1])
        _submit(steps, plans[-1])
        _finish(steps)
    plans.append(dice.end())
    _submit(steps, plans[-1])
    _finish(steps)
    return plans


def _submit(steps: Steps, plan: StepPlan) -> None:
    steps.runner.submit(plan, steps.results.append)


def _finish(steps: Steps) -> None:
    while steps.runner.is_under_way:
        steps.runner.poll(steps.results.append)
        if ON_CPU:
            steps.runner._queue.get_on()


def used() -> int:
    if ON_CPU:
        return 0
    gc.collect()
    torch.cuda.synchronize(DEVICE)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(DEVICE)
    return int(total - free)


_FIXED = 400 << 20
"""Workspaces of the vendor's library, compiled kernels, rotary tables."""


def test_memory_is_what_was_said_and_comes_back(tmp_path: Path) -> None:
    """Within five per cent, with the whole pool in use; and all of it is given back."""
    big = sized({"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 8}, {})
    heads = sized({"num_attention_heads": 32, "num_key_value_heads": 8}, {})
    folder = write(tmp_path, None, **big, **heads, torch_dtype="bfloat16")
    warm = Steps(write(tmp_path / "warm"), load_format="dummy")  # context, library, kernels
    warm.run([prompt_of(40)], 3)
    before = used()
    pool = sized(4 << 30, 1 << 22)
    steps = Steps(folder, load_format="dummy", kv_bytes=pool)
    info = steps.runner.info
    empty = used() - before
    steps.pools.ensure(info.num_blocks)
    steps.run([prompt_of(200), prompt_of(100)], 8)
    full = used() - before
    predicted = info.weight_bytes + info.num_blocks * info.block_bytes
    if not ON_CPU:
        assert empty < info.weight_bytes * 1.05 + _FIXED, "the pool costs what is used of it"
        assert full > info.weight_bytes + pool / 2
        assert abs(full - predicted) < 0.05 * predicted + _FIXED
    steps.runner.release_memory([(0, info.num_blocks)])
    if not ON_CPU:
        assert used() - before < info.weight_bytes * 1.05 + _FIXED
    (again,) = steps.run([prompt_of(200)], 4)
    assert len(again.tokens) == 205
    del steps
    if not ON_CPU:
        assert used() - before < _FIXED, "an unloaded model leaves nothing behind"


def test_more_than_the_device_has_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path)
    with pytest.raises(Exception, match="kv_bytes is"):
        Steps(folder, load_format="dummy", kv_bytes=1 << 50)


_LOST = """
import sys
sys.path[:0] = {path!r}
import torch
from pathlib import Path
from gpu_steps import Steps
from msgspec.structs import replace
from numerics.tiny import prompt_of
steps = Steps(Path({folder!r}), load_format="dummy")
steps.run([prompt_of(20)], 3)
bad = torch.tensor([1 << 20], device="cuda")
# An assertion on the device: its context is lost.
torch.zeros(4, device="cuda").index_select(0, bad)
try:
    steps.run([prompt_of(20)], 3)
except Exception as error:
    print("raised", type(error).__name__)
    sys.stdout.flush()
    import os
    os._exit(7)
"""


@NEEDS_STREAMS
def test_a_lost_context_ends_the_worker(tmp_path: Path) -> None:
    """A step raises, which the worker reports as its last word, and does not hang (E28)."""
    folder = str(write(tmp_path))
    script = _LOST.format(path=[p for p in sys.path if p], folder=folder)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=540
    )
    assert done.returncode == 7, done.stderr
    assert "raised" in done.stdout

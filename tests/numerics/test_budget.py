"""Memory by shapes against memory as it is counted, and what is left of a device for KV blocks."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from numerics.counting import peak
from numerics.tiny import FAMILIES, Family, make_model

from quantd.daemon.types import LoadModel, Pooling
from quantd.daemon.worker.gpu import budget
from quantd.daemon.worker.gpu.budget import Costs, Needs, Step, compute, fit, kv_budget
from quantd.daemon.worker.load import largest_step, load_model
from quantd.plugins.api import Refused

GIB = 1 << 30
CPU = torch.device("cpu")

SHAPES = {
    "llama": FAMILIES["llama"],
    "wide": Family("llama", {"intermediate_size": 512}),
    "narrow": Family("llama", {"intermediate_size": 16}),
    "vocabulary": Family("llama", {"vocab_size": 4096}),
    "heads": Family("llama", {"head_dim": 64}),
    "caps": Family("gemma2", FAMILIES["gemma2"].config | {"vocab_size": 4096}),
    **{name: FAMILIES[name] for name in ("qwen3", "olmo2", "granite", "smollm3", "phi3")},
    **{name: FAMILIES[name] for name in ("mixtral", "qwen3-moe")},
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", SHAPES)
def test_a_step_takes_what_its_shapes_say(name: str, dtype: str, tmp_path: Path) -> None:
    make_model(SHAPES[name], tmp_path)
    load = LoadModel("m", str(tmp_path), dtype=dtype, max_context=64, device="cpu", threads=1)
    model = load_model(load, lambda progress: None)
    kind = getattr(torch, dtype)
    costs = Costs(model.config, kind, kind, is_packed=False, on_gpu=False)
    for step in (Step(512, 64, 64), Step(512, 0, 64), Step(48, 48, 64)):
        work = partial(compute, model.decoder, model.pools, step, CPU)
        work()  # makes the tables of positions
        computed, counted = costs.step_bytes(step), peak(work)
        assert counted <= computed
        if step.tokens == 512:
            # Here experts are computed one after another, which takes less.
            assert computed <= counted * (1.2 if model.config.moe is None else 1.55)


def test_a_packed_models_sums_and_partial_attention_count_on_a_gpu(tmp_path: Path) -> None:
    make_model(FAMILIES["llama"], tmp_path)
    load = LoadModel("m", str(tmp_path), dtype="bfloat16", max_context=64, device="cpu", threads=1)
    config = load_model(load, lambda progress: None).config
    big = replace(config, hidden_size=4096, intermediate_size=14336, num_heads=32, head_dim=128)
    step = Step(2048, 64, 131072)
    plain = Costs(big, torch.bfloat16, torch.bfloat16, is_packed=False, on_gpu=False)
    on_gpu, packed = replace(plain, on_gpu=True), replace(plain, on_gpu=True, is_packed=True)
    assert on_gpu.step_bytes(step) > plain.step_bytes(step)
    # In a step of 512 tokens: fourteen spans of all sums of the last product, in fp32.
    sums = packed._sums(512)
    assert sums == 14 * 512 * 4096 * 4
    assert packed.step_bytes(step) >= max(on_gpu.step_bytes(step), sums)
    assert packed._sums(2048) < sums, "which smaller steps need more of"
    assert packed.step_bytes(Step(512, 64, 131072)) > on_gpu.step_bytes(Step(512, 64, 131072))


def test_the_constants_are_the_kernels() -> None:
    pytest.importorskip("triton")
    from quantd.daemon.worker import runner
    from quantd.kernels.triton import attention, grouped, tuned

    assert attention._PARTIAL_BYTES == budget.PARTIAL_BYTES
    assert (attention.SPAN, attention._SPLIT_TOKENS) == (budget.KEY_SPAN, budget.SPLIT_TOKENS)
    assert (grouped.SPAN, tuned.ENOUGH_PROGRAMS) == (budget.SPAN, budget.SUM_PROGRAMS)
    assert max(tile.n * tile.m for tile in tuned.DEFAULT.values()) == budget.TILE
    assert not tuned.MEASURED, "whose tiles count too"
    assert runner._LOGIT_ROWS == budget.LOGIT_ROWS


def test_the_largest_step() -> None:
    load = LoadModel("m", "p", token_budget=100, max_running=7)
    assert largest_step(load, 4096, None) == Step(100, 7, 4096)
    assert largest_step(LoadModel("m", "p", token_budget=5), 4096, None) == Step(5, 5, 4096)
    assert largest_step(load, 4096, Pooling("embed", 8)) == Step(100, 0, 4096)
    assert largest_step(load, 4096, Pooling("embed", 8, whole=True)) == Step(4096, 0, 4096)
    assert largest_step(load, 50, Pooling("rerank", 1, whole=True)) == Step(100, 0, 50)


# --- what is left --------------------------------------------------------------------------------

NEEDS = Needs(weights=10 * GIB, step=2 * GIB, reserve=GIB, tokens=2048)
BLOCK = 1 << 20


@dataclass
class FakeMeter:
    """A device of 32 GiB that says what it is told to."""

    free: int
    needed: int | Exception

    def memory(self) -> tuple[int, int]:
        return self.free, 32 * GIB

    def peak(self, work: Callable[[], None]) -> int:
        work()
        if isinstance(self.needed, Exception):
            raise self.needed
        return self.needed


def fitted(kv_bytes: int | None, free: int, needed: int | Exception) -> Any:
    done: list[int] = []
    try:
        return fit(kv_bytes, BLOCK, NEEDS, FakeMeter(free, needed), lambda: done.append(1), CPU)
    finally:
        assert len(done) <= 1


def test_a_budget_is_what_is_left() -> None:
    # 22 GiB are free beside the weights, of which a step takes 2, the reserve 1, the margin 1.
    assert fitted(None, 22 * GIB, 2 * GIB) == (18 * GIB, ())
    assert fitted(None, 22 * GIB, 7) == (18 * GIB, ()), "less than was computed counts as computed"
    assert fitted(None, 4 * GIB + BLOCK, 0) == (BLOCK, ())
    # What was asked for may have the margin as well.
    assert fitted(19 * GIB, 22 * GIB, 2 * GIB) == (19 * GIB, ())
    assert fitted(BLOCK, 22 * GIB, 2 * GIB) == (BLOCK, ())


def test_a_step_that_takes_more_leaves_less() -> None:
    size, notes = fitted(None, 22 * GIB, 2 * GIB + 5)
    assert size == 18 * GIB - 5
    assert notes == (
        f"a step of 2048 tokens takes {2 * GIB + 5} bytes where {2 * GIB} were computed from its "
        "shapes: there is so much less for KV blocks",
    )
    assert fitted(19 * GIB - 5, 22 * GIB, 2 * GIB + 5)[0] == 19 * GIB - 5


@pytest.mark.parametrize(
    ("kv_bytes", "free", "needed", "error"),
    [
        (19 * GIB + 1, 22 * GIB, 0, Refused),
        (19 * GIB, 22 * GIB, 2 * GIB + 1, Refused),
        (19 * GIB, 22 * GIB - 1, 0, MemoryError),
        (None, 4 * GIB + BLOCK - 1, 0, MemoryError),
        (None, 22 * GIB, 20 * GIB, Refused),
        (None, 12 * GIB, 10 * GIB, MemoryError),
    ],
)
def test_what_does_not_fit_is_said_with_all_numbers(
    kv_bytes: int | None, free: int, needed: int, error: type[Exception]
) -> None:
    with pytest.raises(error) as raised:
        fitted(kv_bytes, free, needed)
    step, margin = max(needed, 2 * GIB), GIB if kv_bytes is None else 0
    left = max(0, free - step - GIB - margin)
    asked = f"one KV block takes {BLOCK}" if kv_bytes is None else f"kv_bytes is {kv_bytes}"
    assert str(raised.value) == (
        f"{asked}, more than the {left} bytes that cpu has left: {free} of its {32 * GIB} are free "
        f"beside weights of {10 * GIB}, a step of 2048 tokens takes {step}, and {GIB + margin} are "
        "kept for graphs, copies, libraries and as a margin"
    )


def test_a_step_that_finds_no_memory_is_an_error_with_numbers() -> None:
    with pytest.raises(
        MemoryError, match=f"{2 * GIB} bytes by its shapes.*{22 * GIB} of its.*full"
    ):
        fitted(None, 22 * GIB, MemoryError("full"))


def test_the_budget_is_checked_before_the_step_is_computed() -> None:
    def never() -> None:
        raise AssertionError

    with pytest.raises(Refused, match="kv_bytes is"):
        fit(20 * GIB, BLOCK, NEEDS, FakeMeter(22 * GIB, 0), never, CPU)
    assert kv_budget(None, BLOCK, NEEDS, (22 * GIB, 32 * GIB), CPU) == 18 * GIB


def test_a_loaded_model_gets_what_its_device_has_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it but the device, which is this test's."""
    make_model(FAMILIES["llama"], tmp_path)
    load = LoadModel("m", str(tmp_path), dtype="float32", max_context=64, device="cpu", threads=1)
    model = load_model(load, lambda progress: None)
    costs = Costs(model.config, torch.float32, torch.float32, is_packed=False, on_gpu=True)
    step = Step(96, 8, 64)
    meter = FakeMeter(22 * GIB, 0)
    meter.peak = peak  # type: ignore[method-assign]
    monkeypatch.setattr(budget, "CudaMeter", lambda device: meter)
    blocks, notes = budget.fitting_blocks(None, costs, step, 10 * GIB, model.decoder, CPU)
    beside = costs.step_bytes(step) + costs.reserve_bytes(step, 32 * GIB) + GIB
    assert blocks == (22 * GIB - beside) // model.info.block_bytes
    assert notes == ()
    copying = replace(costs, bounce=30 << 20)
    assert copying.reserve_bytes(step, GIB) == costs.reserve_bytes(step, GIB) + (30 << 20)


CHILD = """
import sys
from functools import partial
import torch
from quantd.daemon.types import LoadModel
from quantd.daemon.worker.gpu.budget import Costs, Step, compute
from quantd.daemon.worker.load import load_model

def status(name):
    lines = dict(line.split(":") for line in open("/proc/self/status"))
    return int(lines[name].split()[0]) * 1024

def load(path, context):
    frame = LoadModel("m", path, dtype="float32", max_context=context, device="cpu", threads=2)
    return load_model(frame, lambda progress: None)

small = load(sys.argv[1], 64)
compute(small.decoder, small.pools, Step(64, 8, 64), small.device)
before = status("VmRSS")
model, step = load(sys.argv[2], 1024), Step(1024, 64, 1024)
for pool in (*model.pools.keys, *model.pools.values):
    pool[:600] = 1
open("/proc/self/clear_refs", "w").write("5")
compute(model.decoder, model.pools, step, model.device)
costs = Costs(model.config, torch.float32, torch.float32, is_packed=False, on_gpu=False)
print(model.info.weight_bytes, 600 * model.info.block_bytes, costs.step_bytes(step))
print(status("VmHWM") - before)
"""


def test_a_process_takes_what_is_predicted(tmp_path: Path) -> None:
    """Weights, blocks in use and the largest step together, on this machine."""
    small, big = tmp_path / "small", tmp_path / "big"
    sizes = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 2,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "vocab_size": 8192,
        "max_position_embeddings": 1024,
    }
    for folder, config in ((small, {}), (big, sizes)):
        folder.mkdir()
        make_model(Family("llama", config), folder)
    command = [sys.executable, "-c", CHILD, str(small), str(big)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    *parts, taken = map(int, said.split())
    assert sum(parts) == pytest.approx(taken, rel=0.1), (parts, taken)
    assert all(part > 0.1 * taken for part in parts), "each has a say"

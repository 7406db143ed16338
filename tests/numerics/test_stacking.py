"""Experts' weights are stacked while a model loads: what is held meanwhile, and nothing is lost."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from numerics.tiny import Driver, Family, make_model, prompt_of, reference

from quantd.daemon.types import LoadModel
from quantd.daemon.worker.load import Model, load_model
from quantd.daemon.worker.models.names import ModelTensors
from quantd.daemon.worker.stacked import StackedLinear, notes
from quantd.kernels import grouped_linear, ops
from quantd.kernels.cpu import linear

pytest.importorskip("triton")
GPU = torch.device("cuda:0")
NUM_EXPERTS = 8


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("mixtral")
    config = {"num_local_experts": NUM_EXPERTS, "intermediate_size": 256}
    return make_model(Family("mixtral", config), folder), folder


@pytest.fixture(autouse=True)
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are packed for one and stacked; but experts are called one after the other, because
    kernels need the interpreter (tests/triton)."""
    from quantd.kernels.triton import linear as gpu

    monkeypatch.setattr(grouped_linear, "_gpu", lambda device: gpu)
    monkeypatch.setattr(linear, "linear_route", lambda device, dtype: "torch")
    monkeypatch.setattr(ops, "new_expert_stack", lambda count, *_: ops.ExpertStack(count))
    monkeypatch.setattr(ops, "stacked_experts", lambda *_: None)


def live_bytes() -> int:
    """Of all tensors that the collector watches, each memory once."""
    tensors = [value for value in gc.get_objects() if type(value) is torch.Tensor]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def load(folder: Path, quantization: str = "auto") -> Model:
    options = LoadModel(
        "tiny", str(folder), dtype="float32", quantization=quantization, threads=1, max_context=128
    )
    return load_model(options, lambda progress: None)


def is_expert(name: str) -> bool:
    return ".experts." in name


def test_no_more_is_held_than_the_weights_and_one_expert(
    made: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Both sides of a put: the weight that is on its way is still there.
    beyond: list[int] = []
    stacks: list[ops.ExpertStack] = []
    put = ops.ExpertStack.put

    def seen(stack: ops.ExpertStack, index: int, weight: ops.Weight) -> None:
        if stack not in stacks:
            stacks.append(stack)
        put(stack, index, weight)
        stacked = sum(t.nbytes for each in stacks for t in each._tensors.values())
        beyond.append(live_bytes() - stacked)

    monkeypatch.setattr(ops.ExpertStack, "put", seen)
    gc.collect()
    gc.freeze()  # what is alive already is not looked at, which would take seconds each time
    try:
        weights = load(made[1]).weights
    finally:
        gc.unfreeze()
    assert len(stacks) == 2 * 3 and len(beyond) == len(stacks) * NUM_EXPERTS
    experts = {name: each.nbytes for name, each in weights.linears.items() if is_expert(name)}
    others = weights.nbytes - sum(experts.values())
    largest = max(experts.values())
    assert max(beyond) >= largest
    # Which is far less than what a layer's experts hold.
    assert max(beyond) <= others + largest < NUM_EXPERTS * largest
    held = sum(t.nbytes for each in stacks for t in each._tensors.values())
    assert held == sum(experts.values())


@pytest.mark.parametrize("quantization", ["auto", "int4", "w8a8"])
def test_stacked_layers_multiply(made: tuple[Any, Path], quantization: str) -> None:
    model, folder = made
    layers = load(folder, quantization).weights
    assert set(layers.stacks) == {
        f"model.layers.{i}.mlp.experts.{leaf}"
        for i in range(3)
        for leaf in ("gate_up_proj", "down_proj")
    }
    for name, layer in layers.linears.items():
        assert isinstance(layer, StackedLinear) == is_expert(name)
    assert all(stack.together() is not None for stack in layers.stacks.values())
    state = model.state_dict()
    for i in range(NUM_EXPERTS):
        down = layers.linears[f"model.layers.1.mlp.experts.{i}.down_proj"].dequantize()
        want = state["model.layers.1.mlp.experts.down_proj"][i]
        error = (down - want).square().mean() / want.square().mean()
        assert error <= (0.0 if quantization == "auto" else 0.01)
    if quantization == "auto":
        (answer,) = Driver(folder, dtype="float32").run([prompt_of(20)], chunk=20)
        expected = reference(model, answer.tokens)[:-1]
        torch.testing.assert_close(answer.logprobs, expected, rtol=0.0, atol=1e-4)


def test_experts_of_different_formats_are_noted(made: tuple[Any, Path]) -> None:
    loaded = load(made[1], "model.layers.1.mlp.experts.2.down_proj=int8")
    apart = [name for name, stack in loaded.weights.stacks.items() if stack.together() is None]
    assert apart == ["model.layers.1.mlp.experts.down_proj"]
    (note,) = _notes(loaded.weights.stacks)
    assert "the experts of 1 layers" in note and "waits for the GPU" in note
    assert loaded.decoder.waits


def _notes(stacks: Any, device: torch.device = GPU) -> Any:
    leaves = ("gate_up_proj", "down_proj")
    names = [f"model.layers.{i}.mlp.experts.{leaf}" for i in range(3) for leaf in leaves]
    return notes(ModelTensors("", experts=dict.fromkeys(names, ())), stacks, device)


def test_notes() -> None:
    assert _notes({}, torch.device("cpu")) == ()
    (note,) = _notes({})
    assert "the experts of 3 layers" in note

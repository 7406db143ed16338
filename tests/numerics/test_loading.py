"""Checkpoints on disk: how they are read, and what is said of those that are refused."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from numerics.tiny import Driver, Family, make_model, prompt_of, reference
from safetensors.torch import load_file, save_file

from quantd.daemon.types import LoadModel
from quantd.daemon.worker.loader import Refused
from quantd.daemon.worker.runner import Runner
from quantd.daemon.worker.source import SafetensorsSource

Q = "model.layers.1.self_attn.q_proj.weight"
DOWN = "model.layers.2.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("llama")
    return make_model(Family("llama"), folder), folder


@pytest.fixture
def copy(made: tuple[Any, Path], tmp_path: Path) -> Path:
    """A checkpoint to spoil."""
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((made[1] / name).read_bytes())
    return tmp_path


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def shard(folder: Path, count: int) -> None:
    """The one file as several, with an index."""
    tensors = load_file(folder / "model.safetensors")
    weight_map = {}
    for i in range(count):
        name = f"model-{i + 1:05}-of-{count:05}.safetensors"
        part = {key: tensors[key] for key in sorted(tensors)[i::count]}
        save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


def refusal(folder: Path, **options: Any) -> str:
    with pytest.raises(Refused) as refused:
        Runner(LoadModel("tiny", str(folder), threads=1, **options), lambda progress: None)
    return str(refused.value)


def check(model: Any, folder: Path, **options: Any) -> None:
    (answer,) = Driver(folder, **options).run([prompt_of(20)], chunk=20)
    expected = reference(model, answer.tokens)[:-1]
    torch.testing.assert_close(answer.logprobs, expected, rtol=0.0, atol=1e-4)


def test_shards(made: tuple[Any, Path], copy: Path) -> None:
    shard(copy, 3)
    check(made[0], copy)


def test_unaligned_tensors(made: tuple[Any, Path], copy: Path) -> None:
    """The format does not promise that a tensor's bytes lie where its type wants them."""
    path = copy / "model.safetensors"
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = raw[8 : 8 + length].rstrip() + b" "
    header += b" " * (1 - len(header) % 2)
    path.write_bytes(struct.pack("<Q", len(header)) + header + raw[8 + length :])
    check(made[0], copy)


def test_a_stored_output_layer_of_a_tied_model_is_not_read(tmp_path: Path) -> None:
    model = make_model(Family("llama", {"tie_word_embeddings": True}), tmp_path)
    change(tmp_path, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(128, 64)}))
    check(model, tmp_path)


def test_buffers_of_old_checkpoints_are_not_read(made: tuple[Any, Path], copy: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change(copy, lambda tensors: tensors.update({name: torch.zeros(8)}))
    check(made[0], copy)


def test_dtype_of_a_config_that_does_not_say(made: tuple[Any, Path], copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    del config["dtype"]
    (copy / "config.json").write_text(json.dumps(config))
    check(made[0], copy)


def test_source_reads_again_what_was_released(made: tuple[Any, Path]) -> None:
    source = SafetensorsSource(made[1], {})
    stored = load_file(made[1] / "model.safetensors")
    assert set(source.names()) == set(stored)
    view = source.read(Q)
    source.release(Q)
    assert torch.equal(view, stored[Q])
    assert source.shape(Q) == (64, 64)
    assert source.dtype(Q) == "F32"


def test_progress_counts_bytes_to_the_end(made: tuple[Any, Path]) -> None:
    progress = Driver(made[1]).progress
    weights = [item for item in progress if item.stage == "weights"]
    assert weights[0].done_bytes == 0
    assert weights[-1].done_bytes == weights[-1].total_bytes > 0
    done = [item.done_bytes for item in weights]
    assert done == sorted(done)


def test_refuses_a_missing_tensor(copy: Path) -> None:
    change(copy, lambda tensors: [tensors.pop(Q), tensors.pop(DOWN)])
    assert refusal(copy) == f"the checkpoint lacks tensors {Q}, {DOWN}"


def test_refuses_a_missing_norm(copy: Path) -> None:
    change(copy, lambda tensors: tensors.pop("model.norm.weight"))
    assert refusal(copy) == "the checkpoint lacks tensor model.norm.weight"


def test_refuses_a_missing_bias(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text()) | {"attention_bias": True}
    (copy / "config.json").write_text(json.dumps(config))
    assert refusal(copy).startswith(
        "the checkpoint lacks tensors model.layers.0.self_attn.k_proj.b"
    )
    assert "and 8 more" in refusal(copy)


def test_refuses_a_tensor_that_has_no_place(copy: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.bias"
    change(copy, lambda tensors: tensors.update({name: torch.zeros(64)}))
    assert refusal(copy) == f"LlamaForCausalLM has no place for tensor {name}"


def test_refuses_a_wrong_shape(copy: Path) -> None:
    change(copy, lambda tensors: tensors.update({Q: torch.zeros(32, 64)}))
    assert refusal(copy) == (
        f"the checkpoint does not fit its config.json: {Q} is [32, 64], must be [64, 64]"
    )


def test_refuses_weights_of_an_unknown_kind(copy: Path) -> None:
    change(copy, lambda tensors: tensors.update({Q: torch.zeros(64, 64, dtype=torch.int8)}))
    assert refusal(copy).startswith(
        "no quantizer takes the layer model.layers.1.self_attn.qkv_proj"
    )


def test_refuses_a_missing_shard(copy: Path) -> None:
    shard(copy, 3)
    (copy / "model-00002-of-00003.safetensors").unlink()
    assert "lacks the shard model-00002-of-00003.safetensors (of 3" in refusal(copy)


def test_refuses_a_shard_without_what_the_index_promises(copy: Path) -> None:
    shard(copy, 2)
    first = copy / "model-00001-of-00002.safetensors"
    tensors = load_file(first)
    name = min(tensors)
    del tensors[name]
    save_file(tensors, first)
    assert refusal(copy) == f"the tensor {name} is missing: the index has it in {first.name}"


def test_refuses_a_file_that_is_cut_off(copy: Path) -> None:
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    assert "model.safetensors is cut off: the tensor" in refusal(copy)


@pytest.mark.parametrize("content", [b"", b"short", b"\xff" * 64, struct.pack("<Q", 4) + b"nope"])
def test_refuses_what_is_no_safetensors_file(copy: Path, content: bytes) -> None:
    (copy / "model.safetensors").write_bytes(content)
    assert refusal(copy).startswith("model.safetensors")


def test_refuses_a_folder_without_weights(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    assert refusal(copy).endswith("has no safetensors file")
    (copy / "pytorch_model.bin").write_bytes(b"")
    assert "convert them to safetensors" in refusal(copy)


def test_refuses_to_guess_which_of_several_files_is_meant(copy: Path) -> None:
    """One of any name is the model, as AutoGPTQ writes it."""
    (copy / "model.safetensors").rename(copy / "gptq_model-4bit-128g.safetensors")
    SafetensorsSource(copy, {})
    (copy / "other.safetensors").write_bytes(b"")
    assert (
        "has 2 safetensors files (gptq_model-4bit-128g.safetensors, other.safetensors), but no "
        "model.safetensors.index.json that says which belong to the model"
    ) in refusal(copy)


def test_refuses_a_folder_without_config(copy: Path) -> None:
    (copy / "config.json").write_text("{")
    assert "is not JSON" in refusal(copy)
    (copy / "config.json").unlink()
    assert refusal(copy).endswith("has no config.json")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dtype": "int8"}, "dtype is 'int8', must be bfloat16"),
        ({"max_context": 4096}, "max_context = 4096, but the checkpoint ends at 512"),
        ({"quantization": "squeeze"}, "no quantizer 'squeeze' is installed"),
        ({"device": "cuda:77"}, "device = 'cuda:77', but this machine has"),
        ({"device": "tpu"}, "device = 'tpu', must be auto, cpu or cuda:N"),
        ({"device": "meta"}, "device = 'meta', must be auto, cpu or cuda:N"),
    ],
)
def test_refuses_options(made: tuple[Any, Path], options: dict[str, Any], said: str) -> None:
    assert said in refusal(made[1], **options)

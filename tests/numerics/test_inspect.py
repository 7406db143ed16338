"""`inspect` promises from headers what loading then finds, and says what it can of the refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from numerics.tiny import FAMILIES, Family, make_model
from safetensors.torch import load_file, save_file

from quantd.daemon.types import BLOCK_TOKENS, LoadModel
from quantd.daemon.worker.inspect import inspect
from quantd.daemon.worker.load import load_model
from quantd.daemon.worker.loader import Refused
from quantd.kernels import ops
from quantd.plugins import parts
from quantd.plugins.api import LinearSpec, TensorSource
from quantd.plugins.select import GROUP, Registry

torch.set_num_threads(1)

Q = "model.layers.1.self_attn.q_proj.weight"


def look(path: Path, **options: str) -> dict[str, Any]:
    request = {"path": str(path), "dtype": "float32", "quantization": "auto", "device": "cpu"}
    report = inspect(request | options, lambda progress: None)
    assert json.loads(json.dumps(report, allow_nan=False))["path"] == str(path)
    return report


@pytest.mark.parametrize(
    "name", ["llama-mha-biases", "llama-mqa-tied", "phi3", "gemma2", "qwen3-moe"]
)
def test_it_agrees_with_loading(name: str, tmp_path: Path) -> None:
    make_model(FAMILIES[name], tmp_path)
    report = look(tmp_path)
    load = LoadModel("tiny", str(tmp_path), dtype="float32", device="cpu", threads=1)
    model = load_model(load, lambda progress: None)
    assert report["refused"] is None
    assert report["model"]["architecture"] == model.info.architecture
    assert report["model"]["parameters"] == model.info.num_parameters
    assert report["model"]["context"] == model.info.max_context
    assert report["model"]["vocab_size"] == model.info.vocab_size
    assert report["kv_bytes_per_token"] * BLOCK_TOKENS == model.info.block_bytes
    assert (report["dtype"], report["device"]) == (model.info.dtype, model.info.device)
    # Kernels pad rows; these layers are tiny, so that it shows.
    assert report["weight_bytes"] <= model.info.weight_bytes < 1.2 * report["weight_bytes"]
    assert report["weight_bytes_exact"]
    assert {layer["quantizer"] for layer in report["layers"]} == {"dense"}
    assert len(report["layers"]) == sum(count for _, count in model.info.quantizers)


def test_layers_and_the_file(tmp_path: Path) -> None:
    make_model(Family("llama"), tmp_path)
    report = look(tmp_path, dtype="bfloat16")
    tensors = load_file(tmp_path / "model.safetensors")
    assert report["stored"]["tensors"] == len(tensors)
    assert report["stored"]["bytes"] == sum(tensor.nbytes for tensor in tensors.values())
    assert report["stored"]["types"] == {"F32": len(tensors)}
    [layer] = [row for row in report["layers"] if row["name"].endswith("1.self_attn.qkv_proj")]
    assert layer["shape"] == [128, 64]
    assert layer["stored_bytes"] == 4 * 128 * 64 and layer["loaded_bytes"] == 2 * 128 * 64
    assert layer["weights"] == 128 * 64
    assert layer["format"] == "F32 held as bfloat16"
    weight = ops.pack_linear(torch.zeros(128, 64, dtype=torch.bfloat16))
    assert layer["route"] == weight.route
    assert layer["reason"] == "the checkpoint's tensors"
    assert "dense" not in dict(layer["others"])
    assert report["notes"] == list(ops.notes(torch.bfloat16))


def test_a_rule_is_the_reason(tmp_path: Path) -> None:
    make_model(Family("llama"), tmp_path)
    report = look(tmp_path, quantization="dense")
    assert {layer["reason"] for layer in report["layers"]} == {"the rule *=dense"}


def test_a_config_that_says_more_than_the_tensors_is_noted(tmp_path: Path) -> None:
    make_model(Family("llama"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    report = look(tmp_path)
    assert report["refused"] is None and report["said"]["quant_method"] == "gptq"
    assert any("gptq" in note and "plain" in note for note in report["notes"])


def test_every_installed_quantizer_answers_for_each_layer(tmp_path: Path) -> None:
    make_model(Family("llama"), tmp_path)
    for layer in look(tmp_path)["layers"]:
        answers = dict(layer["others"])
        assert {*answers, "dense"} == set(Registry().names)
        assert all(answers.values())


class Rounded:
    """A format made from plain weights that does not describe itself."""

    name = "rounded"
    api_version = 1
    from_plain = True

    def claims(self, spec: LinearSpec, source: TensorSource) -> bool:
        return False

    def refuses(self, spec: LinearSpec, device: torch.device) -> str | None:
        return None

    def tensors(self, spec: LinearSpec, source: TensorSource) -> Mapping[str, tuple[int, ...]]:
        return parts.plain_shapes(spec)


def test_a_format_that_does_not_describe_itself_is_not_taken_for_what_is_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def registry() -> Registry:
        dense = EntryPoint("dense", "quantd.plugins.dense.plugin:DenseQuantizer", GROUP)
        return Registry([dense, EntryPoint("rounded", f"{__name__}:Rounded", GROUP)])

    monkeypatch.setattr("quantd.daemon.worker.inspect.Registry", registry)
    make_model(Family("llama"), tmp_path)
    report = look(tmp_path, quantization="*.mlp.*=rounded")
    assert report["refused"] is None and not report["weight_bytes_exact"]
    formats = {layer["quantizer"]: layer["format"] for layer in report["layers"]}
    assert formats == {"dense": "F32 held as float32", "rounded": "made from F32"}


# --- what is refused -------------------------------------------------------------------------


@pytest.fixture
def spoiled(tmp_path: Path) -> Path:
    make_model(Family("llama"), tmp_path)
    return tmp_path


def assert_refused_as_loading_does(path: Path, report: dict[str, Any], **options: str) -> None:
    load = LoadModel("tiny", str(path), dtype="float32", device="cpu", threads=1, **options)
    with pytest.raises(Refused) as refused:
        load_model(load, lambda progress: None)
    assert report["refused"] == str(refused.value)


def test_a_missing_tensor_leaves_the_layers_and_no_memory(spoiled: Path) -> None:
    tensors = load_file(spoiled / "model.safetensors")
    del tensors[Q]
    save_file(tensors, spoiled / "model.safetensors")
    report = look(spoiled)
    assert_refused_as_loading_does(spoiled, report)
    assert Q in report["refused"]
    taken = {layer["name"]: layer["quantizer"] for layer in report["layers"]}
    assert taken.pop("model.layers.1.self_attn.qkv_proj") is None
    assert set(taken.values()) == {"dense"}
    assert "weight_bytes" not in report and report["kv_bytes_per_token"] == 768


def test_a_wrong_shape(spoiled: Path) -> None:
    tensors = load_file(spoiled / "model.safetensors")
    tensors[Q] = tensors[Q][:32].contiguous()
    save_file(tensors, spoiled / "model.safetensors")
    report = look(spoiled)
    assert_refused_as_loading_does(spoiled, report)
    assert "[32, 64], must be [64, 64]" in report["refused"]


def test_a_type_that_nobody_takes_says_what_each_quantizer_answers(spoiled: Path) -> None:
    tensors = load_file(spoiled / "model.safetensors")
    tensors[Q] = tensors[Q].to(torch.float8_e4m3fn)
    save_file(tensors, spoiled / "model.safetensors")
    report = look(spoiled)
    assert_refused_as_loading_does(spoiled, report)
    [layer] = [row for row in report["layers"] if row["quantizer"] is None]
    assert layer["reason"].startswith("no quantizer takes the layer")
    assert "weight F8_E4M3" in layer["reason"] and "weight F32" in layer["reason"]
    assert layer["reason"].count("the layer's tensors are not of this format") == 1
    assert report["stored"]["types"]["F8_E4M3"] == 1


def test_an_unknown_architecture_still_shows_the_file(spoiled: Path) -> None:
    config = json.loads((spoiled / "config.json").read_text())
    config |= {
        "architectures": ["StrangeForCausalLM"],
        "quantization_config": {"quant_method": "x"},
    }
    (spoiled / "config.json").write_text(json.dumps(config))
    report = look(spoiled)
    assert_refused_as_loading_does(spoiled, report)
    assert report["said"]["architectures"] == ["StrangeForCausalLM"]
    assert report["said"]["quant_method"] == "x"
    assert report["stored"]["tensors"] > 0 and "layers" not in report


def test_a_folder_without_weights_still_shows_its_config(spoiled: Path) -> None:
    (spoiled / "model.safetensors").unlink()
    report = look(spoiled)
    assert_refused_as_loading_does(spoiled, report)
    assert report["said"]["model_type"] == "llama" and "stored" not in report


def test_an_empty_folder(tmp_path: Path) -> None:
    report = look(tmp_path)
    assert report == {
        "path": str(tmp_path),
        "refused": f"{tmp_path} has no config.json",
        "notes": [],
    }


def test_a_rule_that_its_quantizer_refuses_leaves_the_other_layers(spoiled: Path) -> None:
    tensors = load_file(spoiled / "model.safetensors")
    tensors[Q] = tensors[Q].to(torch.float8_e4m3fn)
    save_file(tensors, spoiled / "model.safetensors")
    report = look(spoiled, quantization="int4")
    assert_refused_as_loading_does(spoiled, report, quantization="int4")
    taken = {layer["name"]: layer["quantizer"] for layer in report["layers"]}
    assert taken.pop("model.layers.1.self_attn.qkv_proj") is None
    assert set(taken.values()) == {"int4"}


def test_a_rule_for_what_is_not_installed(spoiled: Path) -> None:
    report = look(spoiled, quantization="nonsense")
    assert "no quantizer 'nonsense' is installed" in report["refused"]
    assert all(layer["quantizer"] is None for layer in report["layers"])


@pytest.mark.parametrize(
    ("quantization", "said"),
    [
        ("nonsense", "quantization: the rule *=nonsense: no quantizer 'nonsense' is installed ("),
        ("*.q_proj=int8", "quantization: the rule *.q_proj=int8 matches no layer; the layers are"),
        ("int8,lm_head=int4", "quantization: the rule lm_head=int4 is for no layer"),
        ("gptq", "quantization: no layer that the rule *=gptq is for has tensors of gptq"),
        ("lm_head=gguf,*=int4", "quantization: no layer that the rule lm_head=gguf is for has"),
        ("*.mlp.*=", "quantization = '*.mlp.*=': '*.mlp.*=' is neither a name nor glob=name"),
    ],
)
def test_a_rule_that_cannot_be_followed_names_the_field(
    spoiled: Path, quantization: str, said: str
) -> None:
    report = look(spoiled, quantization=quantization)
    assert report["refused"].startswith(said)
    assert_refused_as_loading_does(spoiled, report, quantization=quantization)

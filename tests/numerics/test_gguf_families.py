"""Every architecture through a GGUF file, against the model of transformers that it came from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_writer import add_words, every_matrix, write_gguf
from numerics.tiny import FAMILIES, Driver, Family, make_model, prompt_of, reference
from safetensors.torch import load_file, save_file

from quantd.daemon.worker.gguf_source import open_source
from quantd.daemon.worker.models.families import read_config

torch.set_num_threads(1)

_NO_PLACE = {
    "llama-dynamic": "a kind of scaling that GGUF has not",
    "mistral": "a window that the converter leaves out",
    "qwen2-windows": "windows that the converter leaves out",
    "qwen3-moe": "weights that are not normalized, and a layer without experts",
    "smollm3": "an interval of layers without positions that the converter leaves out",
}
"""What of a family cannot be said in a GGUF file."""
_SCALED = {"gemma2", "gemma3"}
"""The scale of scores follows from the size of a head here."""
CASES: dict[str, Family] = {
    **{name: family for name, family in FAMILIES.items() if name not in _NO_PLACE},
    "smollm3": Family("smollm3", {"num_hidden_layers": 5}),
    "llama-tied-yarn": Family(
        "llama",
        {
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
        max_context=64,
    ),
}
for _name in _SCALED:
    CASES[_name] = Family(
        CASES[_name].model_type, CASES[_name].config | {"query_pre_attn_scalar": 32}
    )


def _made(family: Family, folder: Path, **options: Any) -> tuple[Any, Path]:
    model = make_model(family, folder)
    path = folder / "model.gguf"
    write_gguf(folder, path, **options)
    return model, path


@pytest.mark.parametrize("name", CASES)
def test_a_family_computes_what_transformers_does(name: str, tmp_path: Path) -> None:
    family = CASES[name]
    model, path = _made(family, tmp_path)
    driver = Driver(path, family.max_context, dtype="float32")
    prompt = prompt_of(family.length - 1)
    (answer,) = driver.run([prompt], chunk=len(prompt))
    expected = reference(model, answer.tokens)[:-1]
    torch.testing.assert_close(answer.logprobs, expected, rtol=0.0, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_the_configuration_is_that_of_transformers(name: str, tmp_path: Path) -> None:
    make_model(CASES[name], tmp_path)
    write_gguf(tmp_path, tmp_path / "model.gguf")
    source = open_source(tmp_path / "model.gguf")
    theirs = read_config(_json(tmp_path))
    ours = read_config(source.config)
    assert ours.layers == theirs.layers
    assert ours.tied == theirs.tied
    assert ours.scale == pytest.approx(theirs.scale)
    assert ours.moe == theirs.moe
    assert ours.qkv_bias == theirs.qkv_bias
    for field in ("norms", "qk_norm", "activation", "head_dim", "vocab_size", "norm_offset"):
        assert getattr(ours, field) == getattr(theirs, field)
    for field in ("norm_eps", "embedding_scale", "residual_scale", "logits_scale"):
        assert getattr(ours, field) == pytest.approx(getattr(theirs, field))


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "BF16"])
@pytest.mark.parametrize("name", ["llama", "mixtral", "phi3", "qwen2"])
def test_a_quantized_family_computes_with_its_own_weights(
    name: str, kind: str, tmp_path: Path
) -> None:
    """transformers is given the weights that the file stands for."""
    family = CASES[name]
    model, path = _made(family, tmp_path, types=every_matrix(kind))
    _round_weights(model, kind)
    driver = Driver(path, family.max_context, dtype="float32")
    prompt = prompt_of(family.length - 1)
    (answer,) = driver.run([prompt], chunk=len(prompt))
    expected = reference(model, answer.tokens)[:-1]
    torch.testing.assert_close(answer.logprobs, expected, rtol=0.0, atol=1e-3)


@pytest.mark.parametrize("tied", [True, False])
def test_shards_compute_as_one_file_does(tied: bool, tmp_path: Path) -> None:
    """Whether an output layer is absent is a question to all shards; a quantized table of
    embeddings then multiplies too."""
    family = Family("llama", {"tie_word_embeddings": tied})
    make_model(family, tmp_path)
    types = every_matrix("Q8_0")
    write_gguf(tmp_path, tmp_path / "whole.gguf", types)
    write_gguf(tmp_path, tmp_path / "m.gguf", types, split_max_tensors=7)
    shards = sorted(tmp_path.glob("m-*.gguf"))
    assert len(shards) > 3
    names = [tensor.name for shard in shards for tensor in gguf.GGUFReader(shard).tensors]
    assert ("output.weight" in names) is not tied
    prompt = prompt_of(20)
    answers = []
    for path in (tmp_path / "whole.gguf", shards[0]):
        driver = Driver(path, dtype="float32")
        assert dict(driver.runner.info.quantizers) == {"gguf": 13}
        answers += driver.run([prompt], chunk=len(prompt))
    assert torch.equal(answers[0].logprobs, answers[1].logprobs)


def test_padded_rows_of_a_gguf_file_are_never_sampled(tmp_path: Path) -> None:
    """The vocabulary ends before the rows do, and the last rows would always win."""
    make_model(Family("llama", {"tie_word_embeddings": False}), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    rows = tensors["lm_head.weight"].shape[0]
    words = rows - 8
    tensors["model.norm.weight"].fill_(1.0)
    tensors["lm_head.weight"][words::2] *= 1000
    tensors["lm_head.weight"][words + 1 :: 2] = -tensors["lm_head.weight"][words::2]
    save_file(tensors, tmp_path / "model.safetensors")
    write_gguf(tmp_path, tmp_path / "m.gguf", extra=lambda writer: add_words(writer, words))
    driver = Driver(tmp_path / "m.gguf", dtype="float32")
    assert driver.runner.info.vocab_size == words < rows
    prompt = [token % words for token in prompt_of(20)]
    (answer,) = driver.run([prompt], chunk=20, num_decodes=12)
    assert len(answer.tokens) > 30
    assert max(answer.tokens) < words


def _round_weights(model: Any, kind: str) -> None:
    number = gguf.GGMLQuantizationType[kind]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and not name.endswith("gate.weight"):
                blocks = gguf.quants.quantize(parameter.numpy().astype(np.float32), number)
                parameter.copy_(torch.from_numpy(gguf.quants.dequantize(blocks, number)))


def _json(folder: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return value

"""Checkpoints made by the quantization tools, through the running daemon: logits of the weights.

`QUANTD_FIXTURES=FOLDER` runs it over whole checkpoints elsewhere too, too large for the
repository: folders with `oracle.safetensors` that has `ref.input_ids`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from harness import Daemon
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from quantd.daemon.types import LoadModel
from quantd.daemon.worker.load import Model, load_model

HERE = Path(__file__).parents[1] / "fixtures" / "quantized"
ELSEWHERE = os.environ.get("QUANTD_FIXTURES")


def _quantized(config: Path) -> bool:
    return "quantization_config" in json.loads(config.read_text())


def _folders() -> list[Path]:
    roots = [HERE] if ELSEWHERE is None else [HERE, Path(ELSEWHERE)]
    configs = [config for root in roots for config in sorted(root.glob("*/config.json"))]
    return [
        config.parent
        for config in configs
        if _quantized(config) and _weights(config.parent) is not None
    ]


def _weights(folder: Path) -> Path | None:
    found = (p for p in sorted(folder.glob("*.safetensors")) if p.name != "oracle.safetensors")
    return next(found, None)


def _served(folder: Path, made: Path) -> Path:
    """The checkpoint with a tokenizer: one word for each id."""
    copy = made / folder.name
    copy.mkdir()
    for path in folder.iterdir():
        if path.is_file() and not path.name.startswith("tokenizer"):
            (copy / path.name).symlink_to(path)
    (copy / "oracle.safetensors").unlink(missing_ok=True)
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(copy / "tokenizer.json"))
    return copy


def _reference(folder: Path) -> LlamaForCausalLM:
    """transformers' model with the weights that the format defines."""
    model: Model = load_model(
        LoadModel("m", str(folder), max_context=64, threads=1, dtype="float32", device="cpu"),
        lambda p: None,
    )
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config")
    oracle = LlamaForCausalLM(LlamaConfig(**config | {"dtype": "float32"})).float().eval()
    linears, vectors = model.weights.linears, model.weights.vectors
    state: dict[str, Tensor] = {"model.norm.weight": vectors["model.norm"]}
    ids = torch.arange(config["vocab_size"])
    state["model.embed_tokens.weight"] = model.weights.embedding(ids, torch.float32)
    state["lm_head.weight"] = linears["lm_head"].dequantize().float()
    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}."
        layer = oracle.model.layers[i]
        q, k, v = layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj
        qkv = linears[f"{at}self_attn.qkv_proj"].dequantize().float()
        for module, part in zip(
            (q, k, v), qkv.split([m.out_features for m in (q, k, v)]), strict=True
        ):
            module.weight.data.copy_(part)
        gate, up = linears[f"{at}mlp.gate_up_proj"].dequantize().float().chunk(2)
        layer.mlp.gate_proj.weight.data.copy_(gate)
        layer.mlp.up_proj.weight.data.copy_(up)
        layer.mlp.down_proj.weight.data.copy_(linears[f"{at}mlp.down_proj"].dequantize().float())
        layer.self_attn.o_proj.weight.data.copy_(
            linears[f"{at}self_attn.o_proj"].dequantize().float()
        )
        for norm in ("input_layernorm", "post_attention_layernorm"):
            state[f"{at}{norm}.weight"] = vectors[f"{at}{norm}"]
    missing, unexpected = oracle.load_state_dict(state, strict=False)
    assert not unexpected and all("_proj" in name for name in missing)
    return oracle


def _tokens(folder: Path) -> list[int]:
    own = folder / "oracle.safetensors"
    if own.exists():
        return [int(t) for t in load_file(own)["ref.input_ids"].flatten()]
    if not (folder / "oracle").exists():
        return [i * 29 % 500 for i in range(24)]
    stored = load_file(folder / "oracle" / "oracle.safetensors")
    return [int(t) for t in stored["tokens"].flatten()]


def test_echoed_logprobs_are_those_of_transformers(tmp_path: Path) -> None:
    folders = _folders()
    assert len(folders) >= 2
    made = [_served(folder, tmp_path) for folder in folders]
    models = (f"m{i}={path}" for i, path in enumerate(made))
    with Daemon(*models, "--dtype", "float32") as daemon:
        for i, folder in enumerate(folders):
            tokens = _tokens(folder)
            body: dict[str, Any] = {
                "model": f"m{i}",
                "prompt": tokens,
                "max_tokens": 0,
                "echo": True,
                "logprobs": 1,
            }
            answer = daemon.post("/v1/completions", body)
            said = torch.tensor(answer["choices"][0]["logprobs"]["token_logprobs"][1:])
            with torch.no_grad():
                logits = _reference(made[i])(torch.tensor([tokens])).logits[0]
            expected = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(tokens)[1:, None])[:, 0]
            torch.testing.assert_close(said, expected, rtol=0.0, atol=1e-3, msg=folder.name)
        assert daemon.stop() == 0

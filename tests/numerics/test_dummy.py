"""Made-up weights, of quantized formats too: the same on each load, spread as real ones are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from numerics.tiny import _BASE, Driver, prompt_of

from quantd.daemon.types import LoadModel
from quantd.daemon.worker.dummy_packed import _EXPONENT, _HALVES
from quantd.daemon.worker.load import load_model
from quantd.plugins.api import Refused

SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}


def write(folder: Path, quantization: dict[str, Any], **more: Any) -> Path:
    config = _BASE | SIZES | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"} | more
    config |= {"quantization_config": quantization, "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def gptq(**more: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True} | more


def load(folder: Path) -> Any:
    told = LoadModel("m", str(folder), load_format="dummy", dtype="float32", threads=1)
    return load_model(told, lambda progress: None)


def check(folder: Path, quantizer: str) -> None:
    """All layers but the output layer are of this format, and their weights look like weights."""
    model = load(folder)
    counts = dict(model.info.quantizers)
    assert counts[quantizer] >= 8
    for name, linear in model.weights.linears.items():
        weight = linear.dequantize()
        assert weight.isfinite().all(), name
        assert 0.01 < weight.std() < 0.05 and abs(weight.mean()) < 0.01, name
    drivers = [Driver(folder, load_format="dummy", dtype="float32") for _ in range(2)]
    one, two = (driver.run([prompt_of(9)], 9, num_decodes=2)[0] for driver in drivers)
    assert one.tokens == two.tokens and torch.equal(one.logprobs, two.logprobs)
    assert one.logprobs.isfinite().all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    "more", [{}, {"group_size": -1}, {"checkpoint_format": "gptq_v2"}], ids=str
)
def test_gptq(tmp_path: Path, bits: int, more: dict[str, Any]) -> None:
    check(write(tmp_path, gptq(bits=bits, **more)), "gptq")


def test_gptq_with_act_order(tmp_path: Path) -> None:
    check(write(tmp_path, gptq(desc_act=True)), "gptq")


@pytest.mark.parametrize("kind", [*_HALVES, *_EXPONENT])
def test_gguf(tmp_path: Path, kind: str) -> None:
    quantization = {"quant_method": "gguf", "types": {"*.layers.*": kind}}
    check(write(tmp_path, quantization), "gguf")


def test_a_mix_of_types_with_a_quantized_output_layer(tmp_path: Path) -> None:
    types = {"*.1.mlp.down_proj.*": "Q6_K", "*.v_proj.*": "Q6_K", "lm_head.*": "Q6_K", "*": "Q4_K"}
    folder = write(tmp_path, {"quant_method": "gguf", "types": types})
    assert dict(load(folder).info.quantizers) == {"gguf": 9}
    check(folder, "gguf")


def test_a_mixture_keeps_its_router_plain(tmp_path: Path) -> None:
    more = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 128,
        "head_dim": 64,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
    model = load(write(tmp_path, gptq(), **more))
    assert model.weights.linears["model.layers.0.mlp.gate"].dequantize().std() > 0.01
    assert dict(model.info.quantizers) == {"gptq": 20, "dense": 3}


@pytest.mark.parametrize(
    ("quantization", "said"),
    [
        (gptq(bits=5), "bits of 2, 3, 4, 8"),
        (gptq(group_size=0), "group_size"),
        ({"quant_method": "gguf", "types": {"*": "IQ1_S"}}, "'IQ1_S'"),
        ({"quant_method": "gguf", "types": {"*": "Q4_K"}}, "blocks of 256"),
    ],
    ids=["bits", "group", "type", "columns"],
)
def test_what_cannot_be_made_is_refused(
    tmp_path: Path, quantization: dict[str, Any], said: str
) -> None:
    with pytest.raises(Refused, match=said):
        load(write(tmp_path, quantization, intermediate_size=320))

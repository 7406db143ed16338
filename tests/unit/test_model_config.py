"""config.json to ModelConfig: both spellings of transformers, the families' defaults, refusals."""

from __future__ import annotations

from typing import Any

import pytest

from quantd.daemon.worker.models.config import ModelConfig
from quantd.daemon.worker.models.families import read_config
from quantd.plugins.api import Refused

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 256,
}


def read(architecture: str = "LlamaForCausalLM", **changes: Any) -> ModelConfig:
    return read_config(LLAMA | {"architectures": [architecture]} | changes)


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in LLAMA.items() if name != key}


def test_old_and_new_spelling_of_rope_are_one() -> None:
    scaling = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    new = read(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **scaling})
    assert read(rope_theta=5e5, rope_scaling={"rope_type": "llama3", **scaling}) == new
    assert read(rope_theta=5e5, rope_scaling={"type": "llama3", **scaling}) == new
    assert new.ropes[0].theta == 5e5


def test_old_and_new_spelling_of_dtype_are_one() -> None:
    assert read(dtype="bfloat16") == read(torch_dtype="bfloat16")


def test_null_counts_as_absent() -> None:
    assert read(head_dim=None, rope_scaling=None) == read()
    assert read(num_key_value_heads=None).num_kv_heads == 4


def test_gemma3_in_the_old_spelling() -> None:
    new = read(
        "Gemma3ForCausalLM",
        rope_parameters={
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
        sliding_window=512,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )
    old = read(
        "Gemma3ForCausalLM",
        rope_theta=1e6,
        rope_local_base_freq=1e4,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
        sliding_window=512,
        sliding_window_pattern=2,
    )
    assert old == new
    assert [(layer.window, layer.rope) for layer in new.layers] == [(512, 1), (None, 0)] * 2
    assert new.embedding_scale == 8.0


def test_phi3_calls_longrope_su() -> None:
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    config = read("Phi3ForCausalLM", rope_scaling={"type": "su", **factors})
    assert config.ropes[0].kind == "longrope"
    assert config.ropes[0].original == 4096


def test_mistral_window_is_the_familys_only_when_absent() -> None:
    assert read("MistralForCausalLM").layers[0].window == 4096
    assert read("MistralForCausalLM", sliding_window=None).layers[0].window is None
    assert read("MistralForCausalLM", sliding_window=9).layers[3].window == 9


def test_qwen_windows_need_the_switch() -> None:
    off = read("Qwen2ForCausalLM", sliding_window=8, max_window_layers=2)
    assert all(layer.window is None for layer in off.layers)
    on = read("Qwen2ForCausalLM", sliding_window=8, max_window_layers=2, use_sliding_window=True)
    assert [layer.window for layer in on.layers] == [None, None, 8, 8]


def test_smollm3_layers_without_positions() -> None:
    layers = read("SmolLM3ForCausalLM").layers
    assert [layer.rope for layer in layers] == [0, 0, 0, None]


def test_qwen3_moe_layers() -> None:
    config = read("Qwen3MoeForCausalLM", num_experts=8, decoder_sparse_step=2, mlp_only_layers=[3])
    assert [layer.experts for layer in config.layers] == [False, True, False, False]
    assert config.moe is not None and config.moe.num_experts == 8


def test_contexts() -> None:
    assert read().default_context == read().context_limit == 256
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
    assert read(rope_parameters=yarn).default_context == 1024
    dynamic = read(rope_parameters={"rope_type": "dynamic", "factor": 3.0})
    assert (dynamic.default_context, dynamic.context_limit) == (256, 768)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "'GPT2LMHeadModel' is not supported"),
        ({"architectures": []}, "architectures is [], must name one"),
        ({"architectures": None}, "architectures is None, must name one"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "64"}, "hidden_size is '64', must be an integer"),
        ({"hidden_size": True}, "hidden_size is True, must be an integer"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0, must be at least 1"),
        ({"num_key_value_heads": 3}, "num_attention_heads is 4, must be a multiple"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small', must be a number"),
        ({"attention_bias": 1}, "attention_bias is 1, must be true or false"),
        ({"hidden_act": "relu2"}, "hidden_act is 'relu2', must be one of silu"),
        ({"rope_scaling": {"type": "warp"}}, "rope_scaling.type is 'warp', must be one of"),
        (
            {"rope_scaling": {"rope_type": "warp"}},
            "rope_scaling.rope_type is 'warp', must be one of",
        ),
        ({"rope_scaling": {"type": "linear"}}, "factor is missing"),
        ({"rope_scaling": [1]}, "rope_scaling is [1], must be an object"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2, "mrope_section": [1]}},
            "mrope_section is [1], must be absent",
        ),
        (
            {
                "rope_scaling": {
                    "type": "longrope",
                    "short_factor": [1.0],
                    "long_factor": [1.0] * 8,
                }
            },
            "short_factor is [1.0], must be a list of 8 numbers",
        ),
        (
            {
                "architectures": ["Gemma2ForCausalLM"],
                "layer_types": ["chunked_attention"] * 4,
            },
            "layer_types is",
        ),
        (
            {"architectures": ["Gemma2ForCausalLM"], "use_bidirectional_attention": True},
            "use_bidirectional_attention is True, must be false",
        ),
        ({"architectures": ["Phi3ForCausalLM"], "attention_bias": True}, "attention_bias is True"),
        ({"rope_theta": 0}, "rope_theta is 0.0, must be above 0"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": -1.0}},
            "rope_theta is -1.0, must be above 0",
        ),
    ],
)
def test_refusals_name_the_field(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(Refused) as refusal:
        read_config(LLAMA | changes)
    assert said in str(refusal.value)

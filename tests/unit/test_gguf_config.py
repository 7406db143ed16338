"""What a GGUF file's metadata means, and the names of its tensors."""

from __future__ import annotations

import re
from array import array
from pathlib import Path
from typing import Any

import gguf
import pytest

from quantd.daemon.gguf.config import model_config
from quantd.daemon.gguf.names import BLOCKS, INTERLEAVED, to_gguf, to_hf
from quantd.daemon.gguf.reader import GgufError, GgufModel, GgufTensor

BASE: dict[str, object] = {
    "block_count": 2,
    "context_length": 512,
    "embedding_length": 64,
    "feed_forward_length": 96,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
}
NAMES = {
    "gemma2": "Gemma2ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
    "granite": "GraniteForCausalLM",
    "llama": "LlamaForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3moe": "Qwen3MoeForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
}
EXPERTS = {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 32}


def model(
    architecture: object = "llama",
    changes: dict[str, object] | None = None,
    tensors: tuple[GgufTensor, ...] = (),
) -> GgufModel:
    """A change to None takes the key away."""
    keys = BASE | (EXPERTS if architecture == "qwen3moe" else {}) | (changes or {})
    metadata = {f"{architecture}.{key}": v for key, v in keys.items() if v is not None}
    table = matrix("token_embd.weight", 100, 64)
    every = {t.name: t for t in (table, *tensors)}
    return GgufModel(Path("m.gguf"), (), {"general.architecture": architecture, **metadata}, every)


def matrix(name: str, *dims: int, type_name: str = "Q4_0", path: str = "m.gguf") -> GgufTensor:
    return GgufTensor(name, type_name, dims, 0, 0, Path(path))


def factors(name: str, values: list[float], folder: Path) -> GgufTensor:
    path = folder / name
    path.write_bytes(b"head" + array("f", values).tobytes())
    return GgufTensor(name, "F32", (len(values),), 4, 4 * len(values), path)


def test_the_keys_are_those_of_config_json() -> None:
    assert model_config(model()) == {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 100,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        "dtype": "bfloat16",
    }


@pytest.mark.parametrize("architecture", NAMES)
def test_an_architecture_has_its_class_in_transformers(architecture: str) -> None:
    assert model_config(model(architecture))["architectures"] == [NAMES[architecture]]


def test_every_architecture_has_names() -> None:
    assert BLOCKS.keys() == NAMES.keys()
    assert INTERLEAVED < BLOCKS.keys()


@pytest.mark.parametrize("architecture", ["mamba", None, 7])
def test_another_architecture_is_refused_with_those_that_are_supported(architecture: Any) -> None:
    with pytest.raises(GgufError, match=f"{architecture!r}.*"):
        model_config(model(architecture))
    with pytest.raises(GgufError, match="'mamba' is not supported .supported: gemma2, .* smollm3"):
        model_config(model("mamba"))


def test_what_the_tensors_say() -> None:
    extra = ("output.weight", "blk.0.attn_output.bias", "blk.0.ffn_down.bias")
    config = model_config(model(tensors=tuple(matrix(name, 4, 4) for name in extra)))
    assert not config["tie_word_embeddings"]
    assert config["attention_bias"] and config["mlp_bias"]


@pytest.mark.parametrize(
    ("types", "dtype"),
    [(["F32"], "float32"), (["F16", "F32"], "float16"), (["F16", "Q8_0"], "bfloat16")],
)
def test_activations_are_as_the_weights_where_these_are_plain(types: list[str], dtype: str) -> None:
    tensors = [matrix("token_embd.weight", 100, 64, type_name=types[0])]
    tensors += [matrix(f"blk.{i}.ffn_up.weight", 4, 4, type_name=t) for i, t in enumerate(types)]
    assert model_config(model(tensors=tuple(tensors)))["dtype"] == dtype


@pytest.mark.parametrize(
    ("changes", "rope"),
    [
        ({"rope.freq_base": 5e5}, {"rope_theta": 5e5, "rope_type": "default"}),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, {"rope_type": "default"}),
        ({"rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"rope.scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        ({"rope.scaling.factor": 0.0}, {"rope_type": "default"}),
        (
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 4.0,
                "rope.scaling.original_context_length": 128,
                "rope.scaling.yarn_beta_fast": 16.0,
            },
            {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 128,
                "beta_fast": 16.0,
            },
        ),
    ],
)
def test_scaling_of_positions(changes: dict[str, object], rope: dict[str, object]) -> None:
    assert model_config(model(changes=changes))["rope_parameters"] == {"rope_theta": 1e4} | rope


def test_divisors_of_frequencies_are_read_from_their_tensor(tmp_path: Path) -> None:
    values = [1.0, 1.0, 1.5, 2.0, 8.0, 8.0, 8.0, 8.0]
    config = model_config(model(tensors=(factors("rope_freqs.weight", values, tmp_path),)))
    rope = config["rope_parameters"]
    assert rope["rope_type"] == "longrope"
    assert rope["long_factor"] == rope["short_factor"] == values
    assert rope["attention_factor"] == 1.0


def test_phi3_has_two_lists_of_divisors(tmp_path: Path) -> None:
    long = factors("rope_factors_long.weight", [2.0] * 4, tmp_path)
    short = factors("rope_factors_short.weight", [1.5] * 4, tmp_path)
    changes: dict[str, object] = {
        "rope.scaling.original_context_length": 128,
        "rope.scaling.attn_factor": 1.25,
        "rope.dimension_count": 8,
    }
    config = model_config(model("phi3", changes, (long, short)))
    assert config["original_max_position_embeddings"] == 128
    assert config["rope_parameters"] == {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.5,
        "long_factor": [2.0] * 4,
        "short_factor": [1.5] * 4,
        "attention_factor": 1.25,
    }
    with pytest.raises(GgufError, match="only one of"):
        model_config(model("phi3", changes, (long,)))


@pytest.mark.parametrize(
    ("pattern", "sliding"),
    [(None, [1, 1, 0, 1, 1, 0]), (2, [1, 0] * 3), ([True] * 5 + [False], [1, 1, 1, 1, 1, 0])],
)
def test_gemma3_says_which_layers_slide(pattern: object, sliding: list[int]) -> None:
    changes: dict[str, object] = {
        "block_count": 6,
        "attention.sliding_window": 8,
        "attention.sliding_window_pattern": 3 if pattern is None else pattern,
    }
    config = model_config(model("gemma3", changes))
    kinds = {1: "sliding_attention", 0: "full_attention"}
    assert config["layer_types"] == [kinds[i] for i in sliding]
    assert config["sliding_window"] == 8


@pytest.mark.parametrize(("architecture", "layers"), [("gemma2", 46), ("gemma3", 62)])
def test_the_27b_models_of_gemma_scale_by_the_hidden_size(architecture: str, layers: int) -> None:
    changes: dict[str, object] = {"attention.key_length": 32, "attention.value_length": 32}
    small = model_config(model(architecture, changes))
    large = model_config(model(architecture, changes | {"block_count": layers}))
    assert small["query_pre_attn_scalar"] == 32
    assert large["query_pre_attn_scalar"] == 64 // 4


def test_llama_with_experts_is_mixtral_and_with_a_window_mistral() -> None:
    config = model_config(model(changes=EXPERTS))
    assert config["architectures"] == ["MixtralForCausalLM"]
    assert (config["num_local_experts"], config["num_experts_per_tok"]) == (4, 2)
    config = model_config(model(changes={"attention.sliding_window": 64}))
    assert (config["architectures"], config["sliding_window"]) == (["MistralForCausalLM"], 64)


def test_one_number_for_each_layer_is_read_if_they_are_the_same() -> None:
    config = model_config(model(changes={"attention.head_count_kv": array("I", [2, 2])}))
    assert config["num_key_value_heads"] == 2
    with pytest.raises(GgufError, match="head_count_kv .* must be the same for all layers"):
        model_config(model(changes={"attention.head_count_kv": array("I", [2, 1])}))


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        ("llama", {"block_count": None}, "llama.block_count is None"),
        ("llama", {"block_count": 1 << 31}, "must be at most 4096"),
        ("llama", {"block_count": "two"}, "llama.block_count is 'two', must be a whole number"),
        ("llama", {"block_count": -1}, "must be a whole number"),
        ("llama", {"attention.head_count": 0}, "head_count is 0, must be at least 1"),
        ("llama", {"expert_count": 1 << 31}, "expert_count is 2147483648, must be at most"),
        ("llama", {"attention.layer_norm_rms_epsilon": float("nan")}, "must be finite"),
        ("llama", {"attention.layer_norm_rms_epsilon": True}, "must be a number"),
        ("llama", {"attention.value_length": 8}, "value_length is 8, must be as"),
        ("llama", {"rope.dimension_count": 8}, "dimension_count is 8, must be the size of a head"),
        ("llama", {"rope.scaling.type": 5}, "scaling.type is 5, must be a string"),
        (
            "llama",
            {"rope.scaling.type": "ntk", "rope.scaling.factor": 2.0},
            "'ntk', must be none, linear, yarn or longrope",
        ),
        (
            "qwen2",
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 2.0,
                "rope.scaling.yarn_ext_factor": 0.5,
            },
            "yarn_ext_factor is 0.5",
        ),
        ("olmo2", {"attention.sliding_window": 8}, "OLMo 3 is not supported"),
        ("granite", {"rope.scaling.finetuned": False}, "finetuned is False"),
        (
            "gemma3",
            {"attention.sliding_window": 8, "attention.sliding_window_pattern": [True]},
            "must be one for each of 2 layers",
        ),
        ("qwen3moe", {"expert_used_count": None}, "expert_used_count is None"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(
    architecture: str, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(GgufError, match=message):
        model_config(model(architecture, changes))


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (matrix("rope_freqs.weight", 8), "is Q4_0 .8., must be F32 .8."),
        (matrix("rope_freqs.weight", 7, type_name="F32"), "is F32 .7., must be F32 .8."),
        (matrix("token_embd.weight", 100), "has no matrix token_embd.weight"),
    ],
)
def test_a_wrong_tensor_is_refused_by_name(tensor: GgufTensor, message: str) -> None:
    with pytest.raises(GgufError, match=message):
        model_config(model(tensors=(tensor,)))


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_a_divisor_must_be_above_0(value: float, tmp_path: Path) -> None:
    tensor = factors("rope_freqs.weight", [1.0] * 7 + [value], tmp_path)
    with pytest.raises(GgufError, match="not above 0"):
        model_config(model(tensors=(tensor,)))


@pytest.mark.parametrize("architecture", BLOCKS)
def test_names_are_those_of_the_gguf_package(architecture: str) -> None:
    """All that the package has in a block of an architecture has a name of ours, which the package
    maps back to the same."""
    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    theirs = gguf.get_tensor_name_map(numbers[architecture], 3)
    every = {name for _, name in theirs.mapping.values() if name.startswith("blk.2.")}
    checked = 0
    for name in every:
        hf = to_hf(architecture, f"{name}.weight")
        assert hf is not None, name
        key = hf.removesuffix(".weight").replace(".{}", "")
        # The package takes merged experts of Mixtral under the name of another release.
        key = key.replace(
            "model.layers.2.block_sparse_moe.experts", "layers.2.feed_forward.experts"
        )
        if "rotary_emb" not in key:  # which has another leaf in transformers
            assert theirs.get_name(key) == name
            checked += 1
    assert checked >= 9


@pytest.mark.parametrize("architecture", BLOCKS)
def test_names_go_there_and_back(architecture: str) -> None:
    names = [f"blk.11.{stem}.weight" for stem in BLOCKS[architecture]]
    names += ["token_embd.weight", "output_norm.weight", "output.weight", "blk.0.attn_q.bias"]
    for name in names:
        hf = to_hf(architecture, name)
        assert hf is not None
        expert = 5 if "{}" in hf else None
        assert to_gguf(architecture, hf.format(5)) == (name, expert)
    assert len({to_hf(architecture, name) for name in names}) == len(names)


@pytest.mark.parametrize(
    "name", ["blk.0.ssm_in.weight", "blk.x.attn_q.weight", "output", "{}.weight", "blk.0.attn_q.{}"]
)
def test_a_name_that_transformers_has_not(name: str) -> None:
    assert to_hf("llama", name) is None
    assert to_gguf("llama", re.sub("blk", "model.layers", name)) is None

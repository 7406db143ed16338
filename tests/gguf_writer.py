"""A model of transformers to GGUF, with the conventions of llama.cpp's converter.

The names are those that the gguf package maps, so that ours are tested against another's.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

Array = NDArray[Any]
Types = Callable[[str, tuple[int, ...]], str]
"""(GGUF's name of a tensor, its shape) to its type: "Q8_0"."""

_ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "MixtralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3moe",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3",
    "Phi3ForCausalLM": "phi3",
    "GraniteForCausalLM": "granite",
    "Olmo2ForCausalLM": "olmo2",
    "SmolLM3ForCausalLM": "smollm3",
}
_INTERLEAVED = ("llama", "granite", "smollm3")
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(.*)")


def plain(name: str, shape: tuple[int, ...]) -> str:
    return "F32"


def every_matrix(kind: str) -> Types:
    """As llama.cpp does: vectors and the routers of experts stay F32."""

    def types(name: str, shape: tuple[int, ...]) -> str:
        return "F32" if len(shape) == 1 or "ffn_gate_inp" in name else kind

    return types


def write_gguf(
    folder: Path,
    path: Path,
    types: Types = plain,
    extra: Callable[[gguf.GGUFWriter], None] | None = None,
    split_max_tensors: int = 0,
) -> None:
    """`folder` is as save_pretrained left it. `extra` adds the vocabulary and what else is wanted;
    without it each id is a word of its own."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder).to_dict()
    architecture = _ARCHITECTURES[config["architectures"][0]]
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=split_max_tensors)
    _add_metadata(writer, architecture, config)
    if extra is None:
        add_words(writer, config["vocab_size"])
    else:
        extra(writer)
    for name, tensor in _tensors(folder, architecture, config):
        add_tensor(writer, name, tensor, types(name, tensor.shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_words(writer: gguf.GGUFWriter, count: int) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"word{i}" for i in range(count)])
    writer.add_token_types([gguf.TokenType.NORMAL] * count)
    writer.add_token_merges([])


def add_tensor(writer: gguf.GGUFWriter, name: str, tensor: Array, kind: str) -> None:
    number = gguf.GGMLQuantizationType[kind]
    data = gguf.quants.quantize(np.ascontiguousarray(tensor, np.float32), number)
    writer.add_tensor(name, data, raw_dtype=number)


def _add_metadata(w: gguf.GGUFWriter, architecture: str, c: Mapping[str, Any]) -> None:
    head_dim = _head_dim(c)
    w.add_block_count(c["num_hidden_layers"])
    w.add_context_length(c["max_position_embeddings"])
    w.add_embedding_length(c["hidden_size"])
    w.add_feed_forward_length(c["intermediate_size"])
    w.add_head_count(c["num_attention_heads"])
    w.add_head_count_kv(c["num_key_value_heads"])
    w.add_layer_norm_rms_eps(c["rms_norm_eps"])
    if architecture in _INTERLEAVED:
        w.add_vocab_size(c["vocab_size"])
        w.add_rope_dimension_count(head_dim)
    if c.get("head_dim") is not None and architecture != "granite":
        w.add_key_length(head_dim)
        w.add_value_length(head_dim)
    _add_rope(w, architecture, c)
    experts = c.get("num_local_experts") or c.get("num_experts")
    if experts:
        w.add_expert_count(experts)
        w.add_expert_used_count(c["num_experts_per_tok"])
    if architecture == "qwen3moe":
        w.add_expert_feed_forward_length(c["moe_intermediate_size"])
    if architecture in ("gemma2", "gemma3"):
        w.add_sliding_window(c["sliding_window"])
    if architecture == "gemma2":
        w.add_attn_logit_softcapping(c["attn_logit_softcapping"])
    if c.get("final_logit_softcapping"):
        w.add_final_logit_softcapping(c["final_logit_softcapping"])
    if architecture == "granite":
        w.add_attention_scale(c["attention_multiplier"])
        w.add_embedding_scale(c["embedding_multiplier"])
        w.add_residual_scale(c["residual_multiplier"])
        w.add_logit_scale(c["logits_scaling"])


def _add_rope(w: gguf.GGUFWriter, architecture: str, c: Mapping[str, Any]) -> None:
    every = c["rope_parameters"]
    rope = every.get("full_attention", every)
    if architecture != "gemma2":  # whose converter leaves it out
        w.add_rope_freq_base(rope["rope_theta"])
    if "sliding_attention" in every:
        w.add_rope_freq_base_swa(every["sliding_attention"]["rope_theta"])
    kind = rope.get("rope_type", "default")
    if kind == "linear":
        w.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        w.add_rope_scaling_factor(rope["factor"])
    elif kind == "yarn":
        w.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        w.add_rope_scaling_factor(rope["factor"])
        w.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if architecture != "phi3":
        return
    original = rope.get("original_max_position_embeddings", c["max_position_embeddings"])
    w.add_rope_scaling_orig_ctx_len(original)
    w.add_rope_dimension_count(int(_head_dim(c) * rope.get("partial_rotary_factor", 1.0)))
    w.add_sliding_window(c["sliding_window"] or 0)
    if kind == "longrope":
        scale = c["max_position_embeddings"] / original
        factor = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
        w.add_rope_scaling_attn_factors(factor)


def _tensors(folder: Path, architecture: str, c: Mapping[str, Any]) -> Iterator[tuple[str, Array]]:
    number = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    names = gguf.get_tensor_name_map(number, c["num_hidden_layers"])
    experts: dict[str, dict[int, Array]] = defaultdict(dict)
    for name, tensor in load_file(folder / "model.safetensors").items():
        match = _EXPERT.fullmatch(name)
        if match is not None:
            before = (
                match[1]
                .replace("model.layers", "layers")
                .replace("block_sparse_moe", "feed_forward")
            )
            merged = f"{before}.{match[3]}" if "block_sparse" in name else f"{match[1]}.{match[3]}"
            experts[merged][int(match[2])] = tensor
            continue
        yield _mapped(names, name), _converted(architecture, name, tensor, c)
    for name, parts in experts.items():
        yield _mapped(names, name), np.stack([parts[i] for i in range(len(parts))])
    yield from _rope_tensors(c)


def _mapped(names: gguf.TensorNameMap, name: str) -> str:
    mapped = names.get_name(name, try_suffixes=(".weight", ".bias"))
    assert mapped is not None, name
    return mapped


def _converted(architecture: str, name: str, tensor: Array, c: Mapping[str, Any]) -> Array:
    if architecture.startswith("gemma") and name.endswith("norm.weight"):
        return tensor + 1
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
    leaf = name.split(".")[-2]
    if architecture in _INTERLEAVED and leaf in heads:
        apart = tensor.reshape(c[heads[leaf]], 2, -1, *tensor.shape[1:])
        return apart.swapaxes(1, 2).reshape(tensor.shape)
    return tensor


def _rope_tensors(c: Mapping[str, Any]) -> Iterator[tuple[str, Array]]:
    rope = c["rope_parameters"]
    if rope.get("rope_type") == "longrope":
        for kind in ("long", "short"):
            yield f"rope_factors_{kind}.weight", np.array(rope[f"{kind}_factor"], np.float32)
    if rope.get("rope_type") == "llama3":
        dim = _head_dim(c)
        waves = 2 * math.pi * rope["rope_theta"] ** (np.arange(0, dim, 2) / dim)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        smooth = (rope["original_max_position_embeddings"] / waves - low) / (high - low)
        smooth = smooth.clip(0, 1)
        yield "rope_freqs.weight", (1 / ((1 - smooth) / rope["factor"] + smooth)).astype(np.float32)


def _head_dim(c: Mapping[str, Any]) -> int:
    return int(c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"])

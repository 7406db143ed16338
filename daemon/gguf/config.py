"""A GGUF file's metadata as the config.json that transformers would have for the same model.

Keys and defaults: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. What the metadata does
not say is read off the tensors: the vocabulary's size, biases, a tied output layer, and factors of
rotary frequencies.
"""

from __future__ import annotations

import math
import sys
from array import array
from collections.abc import Callable
from typing import Any

from quantd.daemon.gguf.reader import GgufError, GgufModel, GgufTensor

_MAX_FACTORS = 4096
_MAX_LAYERS = 4096
_MAX_EXPERTS = 65536
_GEMMA_27B_LAYERS = {"gemma2": 46, "gemma3": 62}
"""The only models of the two families whose scores are not scaled by the size of a head; the file
does not say so."""


def model_config(model: GgufModel) -> dict[str, Any]:
    """Raises GgufError for an architecture or a setting that is not supported."""
    architecture = model.metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise GgufError(f"{model.path.name}: general.architecture is {architecture!r}, no name")
    if architecture not in _READERS:
        known = ", ".join(sorted(_READERS))
        raise GgufError(
            f"{model.path.name}: the architecture {architecture!r} is not supported "
            f"(supported: {known})"
        )
    fields = _Fields(model, architecture)
    return _base(fields) | _READERS[architecture](fields)


class _Fields:
    """Typed access to the keys of one architecture."""

    def __init__(self, model: GgufModel, architecture: str) -> None:
        self.model = model
        self.architecture = architecture

    def integer(self, key: str, default: int | None = None, most: int | None = None) -> int:
        """Also where a file has one number for each layer, if they are all the same."""
        value = self._uniform(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise self.wrong(key, "a whole number")
        if most is not None and value > most:
            raise self.wrong(key, f"at most {most}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._uniform(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.wrong(key, "a number")
        if not math.isfinite(value):
            raise self.wrong(key, "finite")
        return float(value)

    def text(self, key: str, default: str) -> str:
        value = self.raw(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.wrong(key, "a string")
        return value

    def raw(self, key: str) -> object:
        return self.model.metadata.get(f"{self.architecture}.{key}")

    def has(self, tensor: str) -> bool:
        return tensor in self.model.tensors

    def wrong(self, key: str, expected: str) -> GgufError:
        return GgufError(
            f"{self.model.path.name}: {self.architecture}.{key} is {self.raw(key)!r}, must be "
            f"{expected}"
        )

    def _uniform(self, key: str) -> object:
        value = self.raw(key)
        if not isinstance(value, array | list):
            return value
        if len(set(value)) != 1:
            raise self.wrong(key, "the same for all layers")
        return value[0]


def _base(f: _Fields) -> dict[str, Any]:
    """What all architectures share."""
    table = f.model.tensors.get("token_embd.weight")
    if table is None or len(table.dims) != 2:
        raise GgufError(f"{f.model.path.name} has no matrix token_embd.weight")
    heads = f.integer("attention.head_count")
    if heads < 1:
        raise f.wrong("attention.head_count", "at least 1")
    return {
        "vocab_size": table.dims[0],
        "hidden_size": f.integer("embedding_length"),
        "intermediate_size": f.integer("feed_forward_length"),
        "num_hidden_layers": f.integer("block_count", most=_MAX_LAYERS),
        "num_attention_heads": heads,
        "num_key_value_heads": f.integer("attention.head_count_kv", heads),
        "head_dim": _head_dim(f),
        "max_position_embeddings": f.integer("context_length"),
        "rms_norm_eps": f.number("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": not f.has("output.weight"),
        "attention_bias": f.has("blk.0.attn_output.bias"),
        "mlp_bias": f.has("blk.0.ffn_down.bias"),
        "rope_parameters": _rope(f),
        "dtype": _dtype(f),
    }


def _dtype(f: _Fields) -> str:
    """Of activations: that of the weights where they are plain, else what any machine can do."""
    types = {t.type_name for t in f.model.tensors.values() if len(t.dims) > 1}
    if types <= {"F32"}:
        return "float32"
    return "float16" if types <= {"F32", "F16"} else "bfloat16"


def _head_dim(f: _Fields) -> int:
    heads = f.integer("attention.head_count")
    head_dim = f.integer("attention.key_length", f.integer("embedding_length") // max(heads, 1))
    if f.integer("attention.value_length", head_dim) != head_dim:
        raise f.wrong("attention.value_length", f"as attention.key_length, {head_dim}")
    return head_dim


def _rope(f: _Fields) -> dict[str, Any]:
    """Of the layers with full attention."""
    rope: dict[str, Any] = {"rope_theta": f.number("rope.freq_base", 1e4), "rope_type": "default"}
    head_dim = _head_dim(f)
    rotary_dim = f.integer("rope.dimension_count", head_dim)
    if rotary_dim != head_dim:
        rope["partial_rotary_factor"] = rotary_dim / head_dim
        if f.architecture != "phi3" or int(head_dim * rope["partial_rotary_factor"]) != rotary_dim:
            raise f.wrong("rope.dimension_count", f"the size of a head, {head_dim}")
    freqs = f.model.tensors.get("rope_freqs.weight")
    if freqs is not None:
        # Llama 3.1's stretch, which the file has as one divisor for each frequency and no more.
        factors = _factors(f, freqs, rotary_dim)
        rope |= {"rope_type": "longrope", "short_factor": factors, "long_factor": factors}
        return rope | {"attention_factor": 1.0, "factor": 1.0}
    return rope | _scaling(f)


def _scaling(f: _Fields) -> dict[str, Any]:
    kind = f.text("rope.scaling.type", "linear")
    factor = f.number("rope.scaling.factor", f.number("rope.scale_linear", 0.0))
    if kind in ("none", "longrope") or factor in (0.0, 1.0):
        return {}
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind != "yarn":
        raise f.wrong("rope.scaling.type", "none, linear, yarn or longrope")
    for key, only in (("yarn_ext_factor", 1.0), ("yarn_log_multiplier", 0.0)):
        if f.number(f"rope.scaling.{key}", only) != only:
            raise f.wrong(f"rope.scaling.{key}", f"{only} or absent")
    yarn: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": f.integer(
            "rope.scaling.original_context_length", f.integer("context_length")
        ),
    }
    for key, name in (
        ("yarn_attn_factor", "attention_factor"),
        ("yarn_beta_fast", "beta_fast"),
        ("yarn_beta_slow", "beta_slow"),
    ):
        if f.raw(f"rope.scaling.{key}") is not None:
            yarn[name] = f.number(f"rope.scaling.{key}")
    return yarn


def _factors(f: _Fields, tensor: GgufTensor, rotary_dim: int) -> list[float]:
    """A tensor of one fp32 number for each frequency."""
    wanted = (rotary_dim // 2,)
    if tensor.type_name != "F32" or tensor.dims != wanted or rotary_dim > 2 * _MAX_FACTORS:
        raise GgufError(
            f"{tensor.path.name}: the tensor {tensor.name} is {tensor.type_name} "
            f"{list(tensor.dims)}, must be F32 {list(wanted)}"
        )
    factors = array("f")
    with tensor.path.open("rb") as file:
        file.seek(tensor.offset)
        factors.frombytes(file.read(tensor.nbytes))
    if sys.byteorder == "big":
        factors.byteswap()
    if not all(0 < factor < float("inf") for factor in factors):
        raise GgufError(f"{tensor.path.name}: the tensor {tensor.name} has a factor not above 0")
    return factors.tolist()


def _llama(f: _Fields) -> dict[str, Any]:
    experts = f.integer("expert_count", 0, _MAX_EXPERTS)
    if experts:
        return {
            "architectures": ["MixtralForCausalLM"],
            "num_local_experts": experts,
            "num_experts_per_tok": f.integer("expert_used_count"),
        }
    window = f.integer("attention.sliding_window", 0)
    if window:
        return {"architectures": ["MistralForCausalLM"], "sliding_window": window}
    return {"architectures": ["LlamaForCausalLM"]}


def _qwen3moe(f: _Fields) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_experts": f.integer("expert_count", most=_MAX_EXPERTS),
        "num_experts_per_tok": f.integer("expert_used_count"),
        "moe_intermediate_size": f.integer("expert_feed_forward_length"),
        "norm_topk_prob": True,
    }


def _gemma2(f: _Fields) -> dict[str, Any]:
    return _gemma(f, "Gemma2ForCausalLM", 2) | {
        "attn_logit_softcapping": f.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": f.number("final_logit_softcapping", 30.0),
    }


def _gemma3(f: _Fields) -> dict[str, Any]:
    cap = f.number("final_logit_softcapping", 0.0)
    sliding = {"rope_type": "default", "rope_theta": f.number("rope.freq_base_swa", 1e4)}
    return _gemma(f, "Gemma3ForCausalLM", 6) | {
        "final_logit_softcapping": cap or None,
        "rope_parameters": {"full_attention": _rope(f), "sliding_attention": sliding},
    }


def _gemma(f: _Fields, name: str, period: int) -> dict[str, Any]:
    """One layer in `period` sees everything, the others a window."""
    num_layers = f.integer("block_count")
    scale = _head_dim(f)
    if num_layers == _GEMMA_27B_LAYERS[f.architecture]:
        scale = f.integer("embedding_length") // f.integer("attention.head_count")
    window = f.integer("attention.sliding_window", 4096 if f.architecture == "gemma2" else 0)
    sliding = _sliding(f, period, num_layers) if window else [False] * num_layers
    return {
        "architectures": [name],
        "query_pre_attn_scalar": scale,
        "sliding_window": window or None,
        "layer_types": ["sliding_attention" if s else "full_attention" for s in sliding],
    }


def _sliding(f: _Fields, period: int, num_layers: int) -> list[bool]:
    key = "attention.sliding_window_pattern"
    pattern = f.raw(key)
    if isinstance(pattern, array | list):
        if len(pattern) != num_layers:
            raise f.wrong(key, f"one for each of {num_layers} layers")
        return [bool(sliding) for sliding in pattern]
    period = f.integer(key, period)
    return [not period or i % period < period - 1 for i in range(num_layers)]


def _phi3(f: _Fields) -> dict[str, Any]:
    config: dict[str, Any] = {
        "architectures": ["Phi3ForCausalLM"],
        "original_max_position_embeddings": f.integer(
            "rope.scaling.original_context_length", f.integer("context_length")
        ),
        "sliding_window": f.integer("attention.sliding_window", 0) or None,
    }
    tensors = f.model.tensors
    long, short = (tensors.get(f"rope_factors_{kind}.weight") for kind in ("long", "short"))
    if long is None or short is None:
        if long is not short:
            raise GgufError(f"{f.model.path.name} has only one of rope_factors_long and _short")
        return config
    rotary_dim = f.integer("rope.dimension_count", _head_dim(f))
    rope = _rope(f) | {
        "rope_type": "longrope",
        "long_factor": _factors(f, long, rotary_dim),
        "short_factor": _factors(f, short, rotary_dim),
        "attention_factor": f.number("rope.scaling.attn_factor", 1.0),
    }
    return config | {"rope_parameters": rope}


def _granite(f: _Fields) -> dict[str, Any]:
    if f.raw("rope.scaling.finetuned") is False:
        raise f.wrong("rope.scaling.finetuned", "true or absent")
    head_dim = _head_dim(f)
    return {
        "architectures": ["GraniteForCausalLM"],
        "attention_multiplier": f.number("attention.scale", head_dim**-0.5) or head_dim**-0.5,
        "embedding_multiplier": f.number("embedding_scale", 1.0) or 1.0,
        "residual_multiplier": f.number("residual_scale", 1.0) or 1.0,
        "logits_scaling": f.number("logit_scale", 1.0) or 1.0,
    }


def _olmo2(f: _Fields) -> dict[str, Any]:
    if f.integer("attention.sliding_window", 0):
        raise f.wrong("attention.sliding_window", "absent: OLMo 3 is not supported")
    return {"architectures": ["Olmo2ForCausalLM"]}


def _plain(name: str) -> Callable[[_Fields], dict[str, Any]]:
    return lambda f: {"architectures": [name]}


_READERS: dict[str, Callable[[_Fields], dict[str, Any]]] = {
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "granite": _granite,
    "llama": _llama,
    "olmo2": _olmo2,
    "phi3": _phi3,
    "qwen2": _plain("Qwen2ForCausalLM"),
    "qwen3": _plain("Qwen3ForCausalLM"),
    "qwen3moe": _qwen3moe,
    "smollm3": _plain("SmolLM3ForCausalLM"),
}

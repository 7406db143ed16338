"""config.json to ModelConfig, one reader per architecture.

What a reader does not understand is refused, by name. The defaults are those of transformers, and
part of the format: it omits fields that equal them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from quantd.daemon.worker.models.config import LayerConfig, ModelConfig, MoeConfig
from quantd.daemon.worker.models.fields import Fields
from quantd.daemon.worker.models.rope import RopeConfig, read_rope
from quantd.kernels.ops import Activation
from quantd.plugins.api import Refused

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}


def read_config(raw: Mapping[str, Any]) -> ModelConfig:
    """Raises Refused for what is not understood."""
    architectures = raw.get("architectures")
    if not isinstance(architectures, list) or len(architectures) != 1:
        raise Refused(f"config.json: architectures is {architectures!r}, must name one")
    name = str(architectures[0])
    if name.endswith("Model") and (whole := f"{name.removesuffix('Model')}ForCausalLM") in _READERS:
        name = whole  # saved without its output layer
    if name not in _READERS:
        known = ", ".join(sorted(_READERS))
        raise Refused(f"the architecture {name!r} is not supported (supported: {known})")
    return _READERS[name](name, raw)


def _base(name: str, raw: Mapping[str, Any], **defaults: Any) -> tuple[Fields, ModelConfig]:
    """What all families share, with full attention in each layer."""
    f = Fields(raw, {"rms_norm_eps": 1e-6, "hidden_act": "silu", "rope_theta": 1e4} | defaults)
    hidden, heads = f.integer("hidden_size"), f.integer("num_attention_heads")
    kv_heads = f.integer("num_key_value_heads", heads)
    if heads % kv_heads:
        raise f.wrong("num_attention_heads", f"a multiple of num_key_value_heads, {kv_heads}")
    head_dim = f.integer("head_dim", hidden // heads)
    return f, ModelConfig(
        architecture=name,
        vocab_size=f.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=f.integer("intermediate_size"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        layers=(LayerConfig(),) * f.integer("num_hidden_layers"),
        ropes=(_rope(f, head_dim),),
        norm_eps=f.number("rms_norm_eps"),
        activation=read_activation(f, "hidden_act"),
        scale=head_dim**-0.5,
        tied=f.flag("tie_word_embeddings", False),
        dtype=f.value("dtype", f.value("torch_dtype")),
    )


def read_activation(f: Fields, key: str) -> Activation:
    try:
        return _ACTIVATIONS[f.text(key)]
    except KeyError:
        raise f.wrong(key, "one of " + ", ".join(_ACTIVATIONS)) from None


def _rope(f: Fields, head_dim: int) -> RopeConfig:
    """From rope_parameters (transformers 5), or rope_theta and rope_scaling (before)."""
    outer = {
        key: f.value(key)
        for key in ("rope_theta", "partial_rotary_factor")
        if f.value(key) is not None
    }
    key, theirs = _rope_object(f)
    if any(isinstance(value, Mapping) for value in theirs.values()):
        raise f.wrong(key, "one object for all layers in this architecture")
    return read_rope(
        Fields(theirs, outer, f"{key}."),
        head_dim,
        f.integer("max_position_embeddings"),
        f.value("original_max_position_embeddings"),
    )


def _rope_object(f: Fields) -> tuple[str, Mapping[str, Any]]:
    """Under which key it stands, and what does."""
    for key in ("rope_parameters", "rope_scaling"):
        value = f.value(key)
        if value is not None:
            if not isinstance(value, Mapping):
                raise f.wrong(key, "an object")
            return key, value
    return "rope_parameters", {}


def _llama(name: str, raw: Mapping[str, Any]) -> ModelConfig:
    f, base = _base(name, raw, max_position_embeddings=2048)
    bias = f.flag("attention_bias", False)
    return replace(base, qkv_bias=bias, o_bias=bias, mlp_bias=f.flag("mlp_bias", False))


def _mistral(name: str, raw: Mapping[str, Any]) -> ModelConfig:
    f, base = _base(name, raw, num_key_value_heads=8, max_position_embeddings=131072)
    # Null is no window; only where the key is absent the family's default holds.
    return _windowed(f, base) if "sliding_window" in f.keys() else _windowed(f, base, 4096)


def _windowed(f: Fields, base: ModelConfig, default: int | None = None) -> ModelConfig:
    """A sliding window in every layer, if there is one."""
    if "sliding_window" not in f and default is None:
        return base
    window = f.integer("sliding_window", default)
    return replace(base, layers=(LayerConfig(window),) * len(base.layers))


def _qwen2(name: str, raw: Mapping[str, Any]) -> ModelConfig:
    f, base = _base(name, raw, max_position_embeddings=32768)
    return replace(base, qkv_bias=True, layers=_qwen_layers(f, base))


def _qwen3(name: str, raw: Mapping[str, Any]) -> ModelConfig:
    f, base = _base(name, raw, head_dim=128, max_position_embeddings=32768)
    bias = f.flag("attention_bias", False)
    return replace(base, qkv_bias=bias, o_bias=bias, qk_norm="head", layers=_qwen_layers(f, base))


def _qwen_layers(f: Fields, base: ModelConfig) -> tuple[LayerConfig, ...]:
    if not f.flag("use_sliding_window", False):
        return base.layers
    first = f.value("max_window_layers", 28)
    pattern = [
        "sliding_attention" if i >= first else "full_attention" for i in range(len(base.layers))
    ]
    return _sliding_layers(f, len(base.layers), pattern)


def _sliding_layers(
    f: Fields, num_layers: int, pattern: list[str], sliding_rope: int = 0
) -> tuple[LayerConfig, ...]:
    """By layer_types, or by the family's pattern where config.json has none."""
    types = f.items("layer_types", pattern)
    if len(types) != num_layers:
        raise f.wrong("layer_types", f"a list of {num_layers}")
    layers = []
    for kind in types:
        if kind == "sliding_attention":
            layers.append(LayerConfig(f.integer("sliding_window"), sliding_rope))
        elif kind == "full_attention":
            layers.append(LayerConfig())
        else:
            raise f.wrong("layer_types", "of full_attention and sliding_attention only")
    return tuple(layers)


def _gemma(name: str, raw: Mapping[str, Any], **defaults: Any) -> tuple[Fields, ModelConfig]:
    """What Gemma 2 and 3 share."""
    family = {
        "head_dim": 256,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
        "sliding_window": 4096,
    }
    f, base = _base(name, raw, **(family | defaults))
    if f.flag("use_bidirectional_attention", False):
        raise f.wrong("use_bidirectional_attention", "false")
    bias = f.flag("attention_bias", False)
    return f, replace(
        base,
        activation=read_activation(f, "hidden_activation"),
        scale=f.number("query_pre_attn_scalar", 256) ** -0.5,
        norms="both",
        norm_offset=1.0,
        embedding_scale=base.hidden_size**0.5,
        qkv_bias=bias,
        o_bias=bias,
    )


def _gemma2(name: str, raw: Mapping[str, Any]) -> ModelConfig:
    f, base = _gemma(name, raw, max_position_embeddings=8192)
    pattern = ["full_attention" if i % 2 else "sliding_attention" for i in range(len(base.layers))]
    return replace(
        base,
        layers=_sliding_layers(f, len(base.layers), pattern),
        attention_softcap=_cap(f, "attn_logit_softcapping", 50.0),
        logits_softcap=_cap(f, "final_logit_softcapping", 30.0),
    )


def _cap(f: Fields, key: str, default: float | None) -> float | None:
    """Null means none where the key stands, and the family's default where it does not."""
    return f.number(key, default) if key in f or key not in f.keys() and default else None


def _gemma3(name: str, raw: Mapping[str, Any]) -> ModelConfig:
    theirs = raw.get("rope_parameters")
    flat = {key: value for key, value in raw.items() if key != "rope_parameters"}
    f, base = _gemma(name, flat, max_position_embeddings=131072, rope_theta=1e6)
    sliding = replace(
        base.ropes[0], kind="default", theta=f.number("rope_local_base_freq", 1e4), factor=1.0
    )
    ropes: tuple[RopeConfig, ...] = (base.ropes[0], sliding)
    if theirs is not None:
        both = Fields({"rope_parameters": theirs}).object("rope_parameters")
        ropes = tuple(
            read_rope(
                both.object(kind, {"rope_theta": theta}),
                base.head_dim,
                base.ropes[0].max_positions,
                None,
            )
            for kind, theta in (("full_attention", 1e6), ("sliding_attention", 1e4))
        )
    every = f.integer("sliding_window_pattern", f.value("_sliding_window_pattern", 6))
    pattern = [
        "sliding_attention" if (i + 1) % every else "full_attention"
        for i in range(len(base.layers))
    ]
    return replace(
        base,
        layers=_sliding_layers(f, len(base.layers), pattern, sliding_rope=1),
        ropes=ropes,
        qk_norm="head",
        attention_softcap=_cap(f, "attn_logit_softcapping", None),
        logits_softcap=_cap(f, "final_logit_softcapping", None),
    )


def _gemma3_multimodal(name: str, raw: Mapping[str, Any]) -> ModelConfig:
    """The text part; its layer sizes are the family's defaults where they are absent."""
    text = dict(Fields(raw).value("text_config", {}))
    defaults = {"vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216}
    text = defaults | {"num_hidden_layers": 26} | text
    outer = raw.get("dtype", raw.get("torch_dtype"))
    return _gemma3(name, {"dtype": outer} | text)


def _phi3(name: str, raw: Mapping[str, Any]) -> ModelConfig:
    f, base = _base(name, raw, rms_norm_eps=1e-5, max_position_embeddings=4096)
    if f.flag("attention_bias", False):
        raise f.wrong("attention_bias", "false")
    return _windowed(f, base)


def _phi3_spelling(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """Early Phi-3 checkpoints call longrope "su" or "yarn"."""
    fixed = dict(raw)
    for key in ("rope_parameters", "rope_scaling"):
        rope = fixed.get(key)
        if isinstance(rope, Mapping) and rope.get("rope_type", rope.get("type")) in ("su", "yarn"):
            fixed[key] = {**rope, "rope_type": "longrope"}
    fixed.setdefault("original_max_position_embeddings", 4096)
    return fixed


def _granite(name: str, raw: Mapping[str, Any]) -> ModelConfig:
    f, base = _base(name, raw, max_position_embeddings=2048)
    bias = f.flag("attention_bias", False)
    return replace(
        base,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=f.flag("mlp_bias", False),
        scale=f.number("attention_multiplier", 1.0),
        embedding_scale=f.number("embedding_multiplier", 1.0),
        residual_scale=f.number("residual_multiplier", 1.0),
        logits_scale=1.0 / f.number("logits_scaling", 1.0),
    )


def _olmo2(name: str, raw: Mapping[str, Any]) -> ModelConfig:
    f, base = _base(name, raw, rms_norm_eps=1e-5, max_position_embeddings=2048)
    bias = f.flag("attention_bias", False)
    return replace(base, norms="after", qk_norm="projection", qkv_bias=bias, o_bias=bias)


def _smollm3(name: str, raw: Mapping[str, Any]) -> ModelConfig:
    f, base = _base(
        name,
        raw,
        num_key_value_heads=4,
        rope_theta=2e6,
        tie_word_embeddings=True,
        max_position_embeddings=32768,
    )
    num_layers = len(base.layers)
    every = f.integer("no_rope_layer_interval", 4)
    uses_rope = f.items("no_rope_layers", [int((i + 1) % every != 0) for i in range(num_layers)])
    if len(uses_rope) < num_layers:
        raise f.wrong("no_rope_layers", f"a list of at least {num_layers}")
    layers = base.layers
    if f.flag("use_sliding_window", False) and "sliding_window" in f:
        pattern = ["full_attention" if used else "sliding_attention" for used in uses_rope]
        layers = _sliding_layers(f, num_layers, pattern[:num_layers])
    layers = tuple(
        layer if used else replace(layer, rope=None)
        for layer, used in zip(layers, uses_rope, strict=False)
    )
    bias = f.flag("attention_bias", False)
    mlp_bias = f.flag("mlp_bias", False)
    return replace(base, layers=layers, qkv_bias=bias, o_bias=bias, mlp_bias=mlp_bias)


def _mixtral(name: str, raw: Mapping[str, Any]) -> ModelConfig:
    f, base = _base(
        name,
        raw,
        num_key_value_heads=8,
        rms_norm_eps=1e-5,
        rope_theta=1e6,
        max_position_embeddings=131072,
    )
    base = _windowed(f, base)
    moe = MoeConfig(
        num_experts=f.integer("num_local_experts", 8),
        top_k=f.integer("num_experts_per_tok", 2),
        intermediate_size=base.intermediate_size,
        renormalize=True,
    )
    layers = tuple(replace(layer, experts=True) for layer in base.layers)
    return replace(base, layers=layers, moe=moe)


def _qwen3_moe(name: str, raw: Mapping[str, Any]) -> ModelConfig:
    f, base = _base(name, raw, num_key_value_heads=4, max_position_embeddings=32768)
    bias = f.flag("attention_bias", False)
    if f.flag("use_sliding_window", False):
        base = _windowed(f, base)
    moe = MoeConfig(
        num_experts=f.integer("num_experts", f.value("num_local_experts", 128)),
        top_k=f.integer("num_experts_per_tok", 8),
        intermediate_size=f.integer("moe_intermediate_size", 768),
        renormalize=f.flag("norm_topk_prob", False),
    )
    dense = set(f.items("mlp_only_layers", []))
    step = f.integer("decoder_sparse_step", 1)
    layers = tuple(
        replace(layer, experts=i not in dense and (i + 1) % step == 0)
        for i, layer in enumerate(base.layers)
    )
    return replace(base, layers=layers, qk_norm="head", qkv_bias=bias, o_bias=bias, moe=moe)


_READERS: dict[str, Callable[[str, Mapping[str, Any]], ModelConfig]] = {
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": _mistral,
    "Qwen2ForCausalLM": _qwen2,
    "Qwen3ForCausalLM": _qwen3,
    "Gemma2ForCausalLM": _gemma2,
    "Gemma3ForCausalLM": _gemma3,
    "Gemma3ForConditionalGeneration": _gemma3_multimodal,
    "Phi3ForCausalLM": lambda name, raw: _phi3(name, _phi3_spelling(raw)),
    "GraniteForCausalLM": _granite,
    "Olmo2ForCausalLM": _olmo2,
    "SmolLM3ForCausalLM": _smollm3,
    "MixtralForCausalLM": _mixtral,
    "Qwen3MoeForCausalLM": _qwen3_moe,
}

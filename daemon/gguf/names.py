"""Names of tensors: GGUF's and those of transformers, in both directions, by architecture.

GGUF merges the experts of a layer into one tensor. Its name becomes a pattern with "{}" where an
expert's number stands: blk.0.ffn_up_exps.weight is model.layers.0.mlp.experts.{}.up_proj.weight.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_OUTER: Mapping[str, str] = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_ATTENTION: Mapping[str, str] = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_rot_embd": "self_attn.rotary_emb",
}
_DENSE: Mapping[str, str] = {
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NORMS_BEFORE: Mapping[str, str] = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_NORMS_AFTER: Mapping[str, str] = {
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_NORMS_BOTH: Mapping[str, str] = {
    **_NORMS_AFTER,
    "attn_norm": "input_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
}
_MIXTRAL: Mapping[str, str] = {
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
    "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
    "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
}
_QWEN_MOE: Mapping[str, str] = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{}.gate_proj",
    "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
}
_PLAIN: Mapping[str, str] = {**_ATTENTION, **_DENSE, **_NORMS_BEFORE}
_GEMMA: Mapping[str, str] = {**_ATTENTION, **_DENSE, **_NORMS_BOTH}

BLOCKS: Mapping[str, Mapping[str, str]] = {
    "gemma2": _GEMMA,
    "gemma3": _GEMMA,
    "granite": _PLAIN,
    "llama": {**_PLAIN, **_MIXTRAL},
    "olmo2": {**_ATTENTION, **_DENSE, **_NORMS_AFTER},
    # Gate and up are one tensor here, gate first.
    "phi3": {**_PLAIN, "ffn_up": "mlp.gate_up_proj"},
    "qwen2": _PLAIN,
    "qwen3": _PLAIN,
    "qwen3moe": {**_ATTENTION, **_NORMS_BEFORE, **_QWEN_MOE},
    "smollm3": _PLAIN,
}
"""What is in a block, by architecture as GGUF spells it: GGUF's stem to that of transformers."""

INTERLEAVED = frozenset({"granite", "llama", "smollm3"})
"""Architectures that rotate neighbours, (2i, 2i + 1), where transformers rotates (i, i + d / 2):
within each head of queries and keys the rows are in another order."""

_BLOCK = re.compile(r"blk\.(?P<block>\d+)\.(?P<stem>[a-z_0-9]+)(?P<leaf>\.[a-z_]+)")
_OTHER = re.compile(r"(?P<stem>[a-z_0-9]+)(?P<leaf>\.[a-z_]+)")
_LAYER = re.compile(r"model\.layers\.(?P<block>\d+)\.(?P<rest>.+)(?P<leaf>\.[a-z_]+)")
_EXPERT = re.compile(r"(?P<before>.*\.experts)\.(?P<expert>\d+)(?P<after>\..+)")


def to_hf(architecture: str, name: str) -> str | None:
    """The name that transformers has for a tensor of GGUF, None where there is none."""
    match = _BLOCK.fullmatch(name)
    if match is not None:
        stem = BLOCKS[architecture].get(match["stem"])
        return None if stem is None else f"model.layers.{match['block']}.{stem}{match['leaf']}"
    match = _OTHER.fullmatch(name)
    if match is None or match["stem"] not in _OUTER:
        return None
    return f"{_OUTER[match['stem']]}{match['leaf']}"


def to_gguf(architecture: str, name: str) -> tuple[str, int | None] | None:
    """(GGUF's name, which expert of the merged tensor) for a tensor of transformers, None where
    there is none."""
    match = _LAYER.fullmatch(name)
    if match is None:
        outer = {hf: gguf for gguf, hf in _OUTER.items()}
        stem, _, leaf = name.rpartition(".")
        return (f"{outer[stem]}.{leaf}", None) if stem in outer else None
    rest, number = match["rest"], None
    expert = _EXPERT.fullmatch(rest)
    if expert is not None:
        rest, number = f"{expert['before']}.{{}}{expert['after']}", int(expert["expert"])
    for gguf, hf in BLOCKS[architecture].items():
        if hf == rest:
            return f"blk.{match['block']}.{gguf}{match['leaf']}", number
    return None

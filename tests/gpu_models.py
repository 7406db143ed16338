"""Folders of made-up models for the tests of GPUs: a config.json, no weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from numerics.tiny import VOCAB

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 131072,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "float16",
}
PACKED = {"quant_method": "gguf", "types": {"*.down_proj.*": "Q6_K", "*": "Q4_K"}}
"""All layers, the output layer too."""


def write(folder: Path, quantization: dict[str, Any] | None = None, **more: Any) -> Path:
    said = {} if quantization is None else {"quantization_config": quantization}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(LLAMA | more | said))
    return folder

"""Models of real shapes with random weights: speed and memory only, no quality.

    python benchmarks/shapes.py M models/M          # safetensors, bf16
    python benchmarks/shapes.py M models/M --gguf   # models/M/model.gguf too, for llama.cpp

quantd itself needs no weights for this (`load_format = "dummy"`), its peers do.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    # Llama-3.2-1B: 1.24 B parameters.
    "M": {
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 8192,
        "vocab_size": 128256,
        "head_dim": 64,
        "rope_theta": 500000.0,
    },
    # Tiny.
    "T": {
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "intermediate_size": 512,
        "vocab_size": 8192,
        "head_dim": 32,
        "rope_theta": 10000.0,
    },
    # SmolLM2-360M: 0.36 B parameters.
    "S": {
        "hidden_size": 960,
        "num_hidden_layers": 32,
        "num_attention_heads": 15,
        "num_key_value_heads": 5,
        "intermediate_size": 2560,
        "vocab_size": 49152,
        "head_dim": 64,
        "rope_theta": 100000.0,
    },
}

_MERGE = ("Ġ", "w")


def write_config(shape: str, folder: Path) -> dict[str, Any]:
    """config.json and a tokenizer of the shape's vocabulary; returns the configuration."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "torch_dtype": "bfloat16",
        **SHAPES[shape],
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    _write_tokenizer(config["vocab_size"], folder)
    return config


def write_tiny(folder: Path) -> None:
    """A model too small to matter, with a chat template: for measuring what is around a model."""
    write_config("T", folder)
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    settings = {"eos_token": "<|endoftext|>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def _write_tokenizer(vocab_size: int, folder: Path) -> None:
    """Bytes, then words no text holds: enough to detokenize random ids as a real model would."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocab = {"<|endoftext|>": 0}
    for character in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab[character] = len(vocab)
    vocab["".join(_MERGE)] = len(vocab)  # a file without any merge is not accepted everywhere
    while len(vocab) < vocab_size:
        vocab[f"Ġword{len(vocab)}"] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[_MERGE]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def tensors(config: dict[str, Any]) -> dict[str, Any]:
    """Random bf16 weights under their HF names: N(0, 0.02), norms 1."""
    import torch

    generator = torch.Generator().manual_seed(1234)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        values = torch.randn(rows, columns, generator=generator)
        return values.mul_(0.02).to(torch.bfloat16)

    hidden, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries = config["num_attention_heads"] * head
    keys = config["num_key_value_heads"] * head
    norm = torch.ones(hidden, dtype=torch.bfloat16)
    result = {
        "model.embed_tokens.weight": matrix(config["vocab_size"], hidden),
        "model.norm.weight": norm.clone(),
    }
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}."
        result |= {
            layer + "self_attn.q_proj.weight": matrix(queries, hidden),
            layer + "self_attn.k_proj.weight": matrix(keys, hidden),
            layer + "self_attn.v_proj.weight": matrix(keys, hidden),
            layer + "self_attn.o_proj.weight": matrix(hidden, queries),
            layer + "mlp.gate_proj.weight": matrix(inner, hidden),
            layer + "mlp.up_proj.weight": matrix(inner, hidden),
            layer + "mlp.down_proj.weight": matrix(hidden, inner),
            layer + "input_layernorm.weight": norm.clone(),
            layer + "post_attention_layernorm.weight": norm.clone(),
        }
    return result


_GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def gguf_name(name: str) -> str:
    """llama.cpp's name of a tensor."""
    if name == "model.embed_tokens.weight":
        return "token_embd.weight"
    if name == "model.norm.weight":
        return "output_norm.weight"
    _, _, index, rest = name.split(".", 3)
    return f"blk.{index}.{_GGUF_NAMES[rest.removesuffix('.weight')]}.weight"


def gguf_writer(config: dict[str, Any], tokenizer: Path, path: Path) -> Any:
    """A gguf.GGUFWriter with all metadata written to it and no tensor yet."""
    import gguf

    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    vocab = json.loads(tokenizer.read_text())["model"]["vocab"]
    names = sorted(vocab, key=vocab.__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(names)
    writer.add_token_types([3] + [1] * (len(vocab) - 1))
    writer.add_token_merges([" ".join(_MERGE)])
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(0)
    writer.add_add_bos_token(False)
    return writer


def finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_gguf(config: dict[str, Any], weights: dict[str, Any], path: Path) -> None:
    """The same weights for llama.cpp: matrices in BF16, norms in F32."""
    import gguf
    import torch

    writer = gguf_writer(config, path.parent / "tokenizer.json", path)
    for name, tensor in weights.items():
        if tensor.ndim == 1:
            writer.add_tensor(gguf_name(name), tensor.float().numpy())
        else:
            data = tensor.view(torch.int16).numpy().view("uint8")
            writer.add_tensor(gguf_name(name), data, raw_dtype=gguf.GGMLQuantizationType.BF16)
    finish(writer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gguf", action="store_true", help="write model.gguf as well")
    arguments = parser.parse_args()
    from safetensors.torch import save_file

    config = write_config(arguments.shape, arguments.folder)
    weights = tensors(config)
    save_file(weights, arguments.folder / "model.safetensors", metadata={"format": "pt"})
    if arguments.gguf:
        write_gguf(config, weights, arguments.folder / "model.gguf")


if __name__ == "__main__":
    main()

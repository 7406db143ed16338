"""Checkpoints of real shapes in quantized formats, of random valid blocks: speed and memory only.

    python benchmarks/quantized.py M models/M-Q4_K_M --format Q4_K_M   # model.gguf, as Q8_0 too
    python benchmarks/quantized.py M models/M-gptq --format gptq       # safetensors, 4 bits, 128

Made in seconds, without a quantizer. In Q4_K_M each tensor has the type that llama.cpp's own tool
gives it in this shape.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import shapes
import torch
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

_STD = 0.02
_GROUP = 128
Bytes = NDArray[np.uint8]


def blocks(rng: np.random.Generator, rows: int, columns: int, kind: Type) -> Bytes:
    """uint8 [rows, bytes of a row]: random codes and inner scales, outer ones that give _STD."""
    size, nbytes = gguf.GGML_QUANT_SIZES[kind]
    count = rows * columns // size
    data = rng.integers(0, 256, (count, nbytes), dtype=np.uint8)
    # The standard deviation of what one block holds before its outer scale.
    spread = {Type.Q4_K: 258.0, Type.Q6_K: 1367.0, Type.Q8_0: 73.9}[kind]
    d = (_STD / spread * np.exp(0.2 * rng.standard_normal(count))).astype(np.float16)
    if kind is Type.Q4_K:
        data[:, 0:2] = d.view(np.uint8).reshape(-1, 2)
        data[:, 2:4] = (d * np.float16(7.5)).view(np.uint8).reshape(-1, 2)
    elif kind is Type.Q6_K:
        data[:, 208:210] = d.view(np.uint8).reshape(-1, 2)
    else:
        data[:, 0:2] = d.view(np.uint8).reshape(-1, 2)
    return data.reshape(rows, -1)


def _matrices(config: dict[str, Any]) -> Iterator[tuple[str, int, int]]:
    """(HF name, rows, columns) of every linear layer."""
    hidden, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}."
        for leaf, rows in (("q", queries), ("k", keys), ("v", keys)):
            yield f"{at}self_attn.{leaf}_proj", rows, hidden
        yield f"{at}self_attn.o_proj", hidden, queries
        yield f"{at}mlp.gate_proj", inner, hidden
        yield f"{at}mlp.up_proj", inner, hidden
        yield f"{at}mlp.down_proj", hidden, inner


def _type_of(name: str, index: int, layers: int, wanted: str) -> Type:
    if wanted == "Q8_0":
        return Type.Q8_0
    more = index < layers // 8 or index >= 7 * layers // 8 or (index - layers // 8) % 3 == 2
    fine = name.endswith(("v_proj", "down_proj")) and more
    return Type.Q6_K if fine else Type.Q4_K


def write_gguf(config: dict[str, Any], folder: Path, wanted: str) -> None:
    writer = shapes.gguf_writer(config, folder / "tokenizer.json", folder / "model.gguf")
    rng = np.random.default_rng(5)
    norm = np.ones(config["hidden_size"], np.float32)

    def add(name: str, rows: int, columns: int, kind: Type) -> None:
        writer.add_tensor(
            shapes.gguf_name(f"{name}.weight"), blocks(rng, rows, columns, kind), raw_dtype=kind
        )

    table = Type.Q8_0 if wanted == "Q8_0" else Type.Q6_K
    add("model.embed_tokens", config["vocab_size"], config["hidden_size"], table)
    writer.add_tensor("output_norm.weight", norm)
    layers = config["num_hidden_layers"]
    for i in range(layers):
        for leaf in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{leaf}.weight", norm)
    for name, rows, columns in _matrices(config):
        add(name, rows, columns, _type_of(name, int(name.split(".")[2]), layers, wanted))
    shapes.finish(writer)


def write_packed(config: dict[str, Any], folder: Path, method: str) -> None:
    """4-bit GPTQ (no act-order, symmetric) or AWQ (gemm), groups of 128; the rest is bf16."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(5)

    def words(*shape: int) -> torch.Tensor:
        return torch.randint(-(2**31), 2**31, shape, generator=generator, dtype=torch.int32)

    tensors = {k: v for k, v in shapes.tensors(config).items() if not k.endswith("_proj.weight")}
    for name, rows, columns in _matrices(config):
        groups = columns // _GROUP
        packed = (columns // 8, rows) if method == "gptq" else (columns, rows // 8)
        tensors[f"{name}.qweight"] = words(*packed)
        # Stored as 7, which means 8, in every nibble; AWQ's zeros are any.
        seven = torch.full((groups, rows // 8), 0x77777777, dtype=torch.int32)
        tensors[f"{name}.qzeros"] = seven if method == "gptq" else words(groups, rows // 8)
        scale = torch.full((groups, rows), _STD / 4.6, dtype=torch.float16)
        tensors[f"{name}.scales"] = scale
        if method == "gptq":
            tensors[f"{name}.g_idx"] = torch.arange(columns, dtype=torch.int32) // _GROUP
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    quantization = {"quant_method": method, "bits": 4, "group_size": _GROUP}
    quantization |= (
        {"desc_act": False, "sym": True}
        if method == "gptq"
        else {"zero_point": True, "version": "gemm"}
    )
    path = folder / "config.json"
    path.write_text(json.dumps(config | {"quantization_config": quantization}, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("shape", choices=sorted(shapes.SHAPES))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--format", choices=("Q4_K_M", "Q8_0", "gptq", "awq"), required=True)
    options = parser.parse_args()
    config = shapes.write_config(options.shape, options.folder)
    if options.format in ("gptq", "awq"):
        write_packed(config, options.folder, options.format)
        return
    write_gguf(config, options.folder, options.format)
    # What is measured is the GGUF file alone.
    for beside in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (options.folder / beside).unlink()


if __name__ == "__main__":
    main()

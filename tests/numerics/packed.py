"""What the tests of GPTQ and AWQ share: sources without files, fixtures, one forward pass."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantd.daemon.types import LoadModel
from quantd.daemon.worker.load import Model, load_model
from quantd.kernels import ops
from quantd.plugins.api import LinearSpec
from quantd.plugins.grouped import GroupedLinear

FIXTURES = Path(__file__).parents[1] / "fixtures" / "quantized"
CPU = torch.device("cpu")
K_PROJ = "model.layers.0.self_attn.k_proj"
_TYPES = {
    torch.int16: "I16",
    torch.int32: "I32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
}


class Source:
    """A TensorSource over tensors in memory."""

    def __init__(self, tensors: Mapping[str, Tensor], **quantization: Any) -> None:
        self.tensors = dict(tensors)
        self.config: Mapping[str, Any] = {"quantization_config": quantization}
        self.released: set[str] = set()

    def names(self) -> Collection[str]:
        return self.tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> str:
        return _TYPES[self.tensors[name].dtype]

    def read(self, name: str) -> Tensor:
        return self.tensors[name]

    def release(self, name: str) -> None:
        self.released.add(name)


def spec_of(columns: int, rows: int, *parts: str, bias: bool = False) -> LinearSpec:
    """Exact, each part of `rows` rows."""
    named = parts or ("m",)
    splits = (rows,) * len(named)
    return LinearSpec("layer", columns, splits, named, torch.float32, bias=bias, exact=True)


def quantization_of(folder: Path) -> dict[str, Any]:
    quantization: dict[str, Any] = json.loads((folder / "config.json").read_text())[
        "quantization_config"
    ]
    return quantization


def load_float32(folder: Path) -> Model:
    load = LoadModel("tiny", str(folder), max_context=64, threads=1, dtype="float32")
    return load_model(load, lambda progress: None)


def logits_of(model: Model, tokens: Tensor) -> Tensor:
    """[T, vocabulary] of one sequence in one piece."""
    length = len(tokens)
    positions = torch.arange(length)
    blocks = torch.arange(-(-length // ops.BLOCK_SIZE), dtype=torch.int32)
    batch = ops.AttentionBatch(
        torch.tensor([0, length], dtype=torch.int32),
        torch.tensor([length], dtype=torch.int32),
        blocks[None],
        positions,
        positions,
    )
    hidden = model.decoder.forward(tokens.long(), batch, length, model.pools, None)
    return model.decoder.logits(hidden)


def multiply_rounded(layer: GroupedLinear, x: Tensor) -> Tensor:
    """What a layer without bias gives when its weight is rounded to fp16."""
    return x @ layer.dequantize().half().float().T

"""What tests of formats share: a layer by itself, and a tiny Llama judged by transformers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from numerics.tiny import Driver, prompt_of, reference
from torch import Tensor

from quantd.plugins.api import LinearSpec

CPU = torch.device("cpu")
_TYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int8: "I8",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float8_e4m3fn: "F8_E4M3",
}


class Tensors:
    """A TensorSource of what is in memory. `held` is what was read and not released."""

    def __init__(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None = None):
        self.config: Mapping[str, Any] = config or {}
        self.held: set[str] = set()
        self._tensors = tensors

    def names(self) -> Collection[str]:
        return self._tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> str:
        return _TYPES[self._tensors[name].dtype]

    def read(self, name: str) -> Tensor:
        self.held.add(name)
        return self._tensors[name]

    def release(self, name: str) -> None:
        self.held.discard(name)


def layer(rows: int | tuple[int, ...], columns: int, **fields: Any) -> LinearSpec:
    """Its parts are "m" for one split, else "m0", "m1", ..."""
    splits = rows if isinstance(rows, tuple) else (rows,)
    parts = tuple(f"m{i}" for i in range(len(splits))) if len(splits) > 1 else ("m",)
    return LinearSpec("model.m", columns, splits, parts, **{"dtype": torch.float32} | fields)


def check_logits(
    model: Any, folder: Path, quantize: Callable[[str, Tensor], Tensor], **options: Any
) -> Driver:
    """The checkpoint in `folder`, computed exactly, against transformers' `model` when each linear
    layer's weight is `quantize(name, weight)`."""
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.copy_(quantize(name, module.weight.detach().clone()))
    driver = Driver(folder, dtype="float32", **options)
    (answer,) = driver.run([prompt_of(20)], chunk=20)
    expected = reference(model, answer.tokens)[:-1]
    torch.testing.assert_close(answer.logprobs, expected, rtol=0.0, atol=1e-3)
    return driver

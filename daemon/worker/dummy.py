"""Made-up weights of the shapes in config.json, the same on each load: load_format = "dummy"."""

from __future__ import annotations

import math
import zlib
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

_POOL = (1 << 22) + 19
"""Random numbers that all tensors share, each from another place on. Odd, so that no row of a
matrix repeats the one before."""
_STD = 0.02


class DummySource:
    """A TensorSource without files: matrices are normal with the usual spread, norms neutral,
    biases zero."""

    def __init__(
        self,
        config: Mapping[str, Any],
        shapes: Iterable[tuple[str, tuple[int, ...]]],
        dtype: torch.dtype,
        norm: float = 1.0,
    ) -> None:
        self._config = config
        self._shapes = dict(shapes)
        self._dtype = dtype
        self._norm = norm
        generator = torch.Generator().manual_seed(0)
        self._pool = torch.empty(_POOL).normal_(0.0, _STD, generator=generator).to(dtype)

    @property
    def config(self) -> Mapping[str, Any]:
        return self._config

    def names(self) -> Collection[str]:
        return self._shapes.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> str:
        return {torch.bfloat16: "BF16", torch.float16: "F16"}.get(self._dtype, "F32")

    def read(self, name: str) -> Tensor:
        shape = self._shapes[name]
        if len(shape) == 1:
            value = 0.0 if name.endswith(".bias") else self._norm
            return torch.full(shape, value, dtype=self._dtype)
        out = torch.empty(math.prod(shape), dtype=self._dtype)
        offset = zlib.crc32(name.encode()) % _POOL
        done = 0
        while done < len(out):
            count = min(len(out) - done, _POOL - offset)
            out[done : done + count] = self._pool[offset : offset + count]
            done, offset = done + count, 0
        return out.view(shape)

    def release(self, name: str) -> None:
        """Nothing is held."""

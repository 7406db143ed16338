"""Made-up weights of the shapes in config.json, the same on each load: load_format = "dummy".

With a `quantization_config` some are of a quantized format: `dummy_packed.py`."""

from __future__ import annotations

import math
import zlib
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from quantd.daemon.worker.dummy_packed import Made, pack

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
        self._shapes: dict[str, tuple[int, ...]] = {}
        """Of what is plain."""
        self._packed: dict[str, Made] = {}
        for name, shape in shapes:
            packed = pack(config, name, shape)
            if packed is None:
                self._shapes[name] = shape
            else:
                self._packed |= packed
        self._dtype = dtype
        self._norm = norm
        generator = torch.Generator().manual_seed(0)
        self._pool = torch.empty(_POOL).normal_(0.0, _STD, generator=generator).to(dtype)
        self._words: Tensor | None = None
        if self._packed:
            self._words = torch.empty(_POOL, dtype=torch.int32)
            self._words.random_(-(1 << 31), (1 << 31) - 1, generator=generator)

    @property
    def config(self) -> Mapping[str, Any]:
        return self._config

    def names(self) -> Collection[str]:
        return self._shapes.keys() | self._packed.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._packed[name].shape if name in self._packed else self._shapes[name]

    def dtype(self, name: str) -> str:
        if name in self._packed:
            return self._packed[name].dtype
        return {torch.bfloat16: "BF16", torch.float16: "F16"}.get(self._dtype, "F32")

    def read(self, name: str) -> Tensor:
        if name in self._packed:
            return self._packed[name].make(self._random_words)
        shape = self._shapes[name]
        if len(shape) == 1:
            value = 0.0 if name.endswith(".bias") else self._norm
            return torch.full(shape, value, dtype=self._dtype)
        return _drawn(self._pool, name, math.prod(shape)).view(shape)

    def _random_words(self, name: str, count: int) -> Tensor:
        assert self._words is not None
        return _drawn(self._words, name, count)

    def release(self, name: str) -> None:
        """Nothing is held."""


def _drawn(pool: Tensor, name: str, count: int) -> Tensor:
    """[count] of the pool, from a place on that the name decides; a new tensor."""
    out = torch.empty(count, dtype=pool.dtype)
    offset = zlib.crc32(name.encode()) % _POOL
    done = 0
    while done < count:
        part = min(count - done, _POOL - offset)
        out[done : done + part] = pool[offset : offset + part]
        done, offset = done + part, 0
    return out

"""Triton without a GPU, up to the launch: kernels are called as on a GPU, with its own binding of
arguments, and what would be compiled and launched is written down instead."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

MOST_PROGRAMS = (2**31 - 1, 65535, 65535)
"""In each dimension of a grid (CUDA C++ Programming Guide, table of technical specifications)."""

_devices = count(1000)
"""A new one each time: nothing is compiled for it yet."""


@dataclass
class Launches:
    compiled: list[tuple[str, str]] = field(default_factory=list)
    """The kernel's name, and what it is compiled for: types, attributes and constants."""
    launched: list[tuple[str, tuple[int, int, int]]] = field(default_factory=list)
    tensors: list[torch.Tensor] = field(default_factory=list)
    """That were given to kernels."""

    def names(self) -> set[str]:
        return {name for name, _ in self.launched}

    def count(self, name: str) -> int:
        return sum(compiled == name for compiled, _ in self.compiled)


class _Driver:
    def __init__(self, device: int, capability: int) -> None:
        self._device, self._capability = device, capability

    def get_current_device(self) -> int:
        return self._device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, 32)


class _Kernel:
    function = packed_metadata = None

    def __init__(self, name: str, launches: Launches) -> None:
        self._name, self._launches = name, launches

    def launch_metadata(self, *arguments: Any) -> None:
        return None

    def run(self, x: int, y: int, z: int, *rest: Any) -> None:
        assert all(0 < n <= most for n, most in zip((x, y, z), MOST_PROGRAMS, strict=True)), (
            f"{self._name}: a grid of {x, y, z}"
        )
        self._launches.launched.append((self._name, (x, y, z)))
        self._launches.tensors += [item for item in rest if isinstance(item, torch.Tensor)]


@contextmanager
def launches(capability: int = 90) -> Iterator[Launches]:
    found = Launches()

    def compile_(
        self: Any, key: str, signature: Any, device: int, constants: Any, options: Any, *rest: Any
    ) -> _Kernel:
        name = self.fn.__name__
        kernel = self.device_caches[device][0][key] = _Kernel(name, found)
        found.compiled.append((name, key))
        return kernel

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "_active", _Driver(next(_devices), capability), raising=False)
        patch.setattr(JITFunction, "_do_compile", compile_)
        yield found

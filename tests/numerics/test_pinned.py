"""Memory that a GPU copies by itself, over a runtime that writes down what is asked of it."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

from quantd.daemon.worker.gpu.pinned import pinned


class Runtime:
    """What is used of `torch.cuda.cudart()`."""

    def __init__(self) -> None:
        self.registered: dict[int, int] = {}
        self.status = 0

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        assert address % 4096 == 0 and flags == 0
        if not self.status:
            self.registered[address] = size
        return self.status

    def cudaHostUnregister(self, address: int) -> int:
        del self.registered[address]
        return 0

    def cudaError(self, status: int) -> int:
        return status

    def cudaGetErrorString(self, error: int) -> str:
        return f"error {error}"


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    made = Runtime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: made)
    waits: list[Any] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(dict(made.registered)))
    made.waits = waits  # type: ignore[attr-defined]
    return made


def test_it_takes_what_it_is_asked_for_and_no_more(runtime: Runtime) -> None:
    memory = pinned(3 * 4096 + 8)
    assert memory.dtype == torch.uint8 and memory.tolist() == [0] * len(memory)
    assert runtime.registered == {memory.data_ptr(): 3 * 4096 + 8}


def test_it_lives_as_long_as_a_view_and_copies_end_before(runtime: Runtime) -> None:
    row = pinned(4096).view(torch.float16).view(2, 1024)[1]
    gc.collect()
    row.fill_(7)
    assert runtime.registered and bool((row == 7).all())
    registered = dict(runtime.registered)
    del row
    gc.collect()
    assert not runtime.registered
    assert runtime.waits == [registered]  # type: ignore[attr-defined]


def test_what_cannot_be_pinned_is_named(runtime: Runtime) -> None:
    runtime.status = 2
    with pytest.raises(MemoryError, match="8192 bytes of the host cannot be pinned: error 2"):
        pinned(8192)
    with pytest.raises(MemoryError, match="bytes of the host are not to be had"):
        pinned(1 << 62)

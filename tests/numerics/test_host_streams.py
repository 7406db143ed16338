"""Which stream waits for what around a copy, without a GPU: streams that only write down what was
asked of them. tests/gpu has the races themselves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from numerics.tiny import Family, make_model
from torch import Tensor

from quantd.daemon.types import BlockCopy, DiskOp, LoadModel, StepPlan
from quantd.daemon.worker.host import HostPool
from quantd.daemon.worker.memory import KvPools
from quantd.daemon.worker.runner import Runner


class Stream:
    def __init__(self, name: str, log: list[str]) -> None:
        self._name, self._log = name, log

    def wait_stream(self, other: Stream) -> None:
        self._log.append(f"{self._name} waits for {other._name}")

    def synchronize(self) -> None:
        self._log.append(f"all of {self._name} has happened")


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked for, in order: waits, and copies with the stream they are on."""
    log: list[str] = []
    compute = Stream("compute", log)
    current = ["compute"]

    @contextmanager
    def on(stream: Stream) -> Iterator[None]:
        current.append(stream._name)
        yield
        current.pop()

    original = Tensor.copy_

    def copy(self: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        line = f"copy on {current[-1]}" + ("" if non_blocking else ", waited for")
        if not log or log[-1] != line:  # a copy for each layer's keys and values
            log.append(line)
        return original(self, source)

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: compute)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(Tensor, "copy_", copy)
    return log


def host_pool(log: list[str]) -> HostPool:
    keys, values = (tuple(torch.zeros(4, 1, 16, 8) for _ in range(2)) for _ in range(2))
    host = HostPool(KvPools(keys, values, 4, 4 * keys[0][0].nbytes), 4)
    host._stream = Stream("copies", log)  # type: ignore[assignment]
    return host


ORDERED = ["copies waits for compute", "copy on copies", "compute waits for copies"]


def test_a_copy_comes_after_all_before_it_and_before_all_after_it(log: list[str]) -> None:
    host = host_pool(log)
    host.spill(1, 1)
    assert log == ORDERED
    host.fetch(1, 2)
    assert log == ORDERED * 2
    host.copied()
    assert log[-1] == "all of copies has happened"


def test_the_disk_gets_its_orders_when_the_copies_have_happened(
    log: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file must not be written from a place whose spill is under way, nor read into one that a
    fetch still reads."""
    folder = tmp_path / "model"
    make_model(Family("llama", {"tie_word_embeddings": True}), folder)
    disk = {"disk_kv_path": str(tmp_path / "kv"), "disk_kv_bytes": 1 << 20}
    load = LoadModel("t", str(folder), dtype="float32", threads=1, host_kv_bytes=1 << 20, **disk)  # type: ignore[arg-type]
    runner = Runner(load, lambda progress: None)
    runner._host._stream = Stream("copies", log)  # type: ignore[assignment]
    runner.open_disk(lambda message: None)

    def put(op: DiskOp) -> None:
        log.append(f"disk: {op.kind}")

    monkeypatch.setattr(runner._disk, "put", put)
    log.clear()
    orders: dict[str, Any] = {
        "copies": (BlockCopy("spill", 1, 0), BlockCopy("fetch", 1, 2)),
        "disk": (DiskOp("write", bytes(32), 0), DiskOp("read", bytes(32), 1)),
    }
    runner.execute(StepPlan(1, (), **orders))
    assert log == [*ORDERED * 2, "all of copies has happened", "disk: write", "disk: read"]
    log.clear()
    runner.execute(StepPlan(2, (), copies=(BlockCopy("spill", 1, 0),)))
    assert log == ORDERED, "without orders to the disk nobody waits on the host's side"

"""Each wait of the GPU's runner taken away: that it is missed shows that the queue would notice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
import torch
from numerics.fake_queue import FakeMark, FakeQueue
from numerics.gpu_pair import (
    GREEDY,
    Driver,
    Pair,
    bits,
    both_runners,
    decodes,
    expected,
    growing,
)
from numerics.tiny import prompt_of

from quantd.daemon.types import (
    BlockCopy,
    Chunk,
    NewSequence,
    StepPlan,
)
from quantd.daemon.worker.gpu import frame
from quantd.daemon.worker.gpu.frame import Upward
from quantd.daemon.worker.gpu.graphs import Graphs
from quantd.daemon.worker.gpu.runner import GpuRunner
from quantd.kernels import ops

pytestmark = pytest.mark.skipif(
    bool(ops.notes()), reason="without the C library a row's bits depend on its batch"
)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with both_runners(tmp_path_factory.mktemp("llama")) as made:
        yield made


def test_pinned_memory_that_is_written_too_early_is_noticed(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Upward, "_TURNS", 1)
    plans = decodes(4, prompt_of(20), prompt_of(9))
    queue = FakeQueue(0, 0.0)
    with suppress(IndexError):  # of a poisoned token
        assert bits(Driver(pair.device(queue), queue).run(plans)) != expected(pair, plans)


def test_a_read_before_the_mark_is_noticed(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeMark, "wait", lambda mark: None)
    monkeypatch.setattr(FakeQueue, "seconds", lambda queue, begun, ended: 0.0)
    plans = decodes(1, prompt_of(20))
    for eagerness in (0.0, 1.0):
        queue = FakeQueue(0, eagerness)
        driver = Driver(pair.device(queue), queue)
        for plan in plans:
            driver.submit(plan)
        assert bits(driver.results) != expected(pair, plans)[:1]


def test_a_step_that_waits_for_itself_is_noticed(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = GpuRunner._sample

    def wait(runner: GpuRunner, step: Any) -> None:
        sample(runner, step)
        step.ended.wait()

    monkeypatch.setattr(GpuRunner, "_sample", wait)
    queue = FakeQueue(0)
    with pytest.raises(AssertionError, match="a step waited for itself"):
        Driver(pair.device(queue), queue).run(decodes(1, prompt_of(20)))


@pytest.mark.parametrize("kind", ["spill", "fetch"])
def test_a_copy_that_does_not_wait_is_noticed(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """A block is saved, the next plan fetches it elsewhere: what is copied out is not gathered yet,
    or what is copied in is read before. More in test_bounce.py."""
    prompt = prompt_of(20)
    spill, fetch = BlockCopy("spill", 10, 4), BlockCopy("fetch", 4, 80)
    add = (NewSequence(1, prompt, 20, GREEDY),)
    plans = [
        *decodes(0, prompt),
        StepPlan(1, (), copies=(spill,)),
        StepPlan(2, (Chunk(1, 16, 20, (80, 81), True),), add, (0, 1), (fetch,)),
    ]
    for tensor in pair.model.pools.tensors:
        tensor[10], tensor[80] = 0.5, 0.5
    right = expected(pair, plans)

    def run() -> list[Any]:
        queue = FakeQueue(0, 0.0, prefers_copies=kind == "spill")
        return bits(Driver(pair.device(queue), queue).run(plans))

    assert run() == right
    copy = FakeQueue.copy
    if kind == "spill":
        monkeypatch.setattr(FakeQueue, "copy", lambda queue, work, after: copy(queue, work, None))
    else:
        monkeypatch.setattr(FakeQueue, "follow", lambda queue, copied: None)
    assert run() != right


def test_a_graph_that_outlives_its_buffer_is_noticed(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frame, "_FIRST_BYTES", 1 << 10)
    monkeypatch.setattr(Graphs, "drop", lambda graphs: None)
    queue = FakeQueue(4, 0.0)
    plans = growing()
    assert bits(Driver(pair.device(queue), queue).run(plans)) != expected(pair, plans)


@pytest.mark.parametrize(
    "work",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: bool(x.any()),
        lambda x: x[x > 1],
        lambda x: x.nonzero(),
        lambda x: x.unique(),
        lambda x: torch.bincount(x.long()),
        lambda x: x.cpu() if x.is_cuda else x.masked_select(x > 1),
    ],
)
def test_reading_in_queued_work_is_noticed(work: Callable[[torch.Tensor], Any]) -> None:
    queue = FakeQueue(0, 0.0)
    x = torch.arange(4.0)
    queue.run(lambda: work(x))
    with pytest.raises(AssertionError, match="the host would wait for the device"):
        queue.settle()


def test_waiting_for_all_within_a_step_is_noticed() -> None:
    queue = FakeQueue(in_step=True)
    with pytest.raises(AssertionError, match="within a step"):
        queue.settle()

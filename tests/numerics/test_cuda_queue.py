"""What the queue of a CUDA device asks of torch, without a GPU: streams, events and graphs that
only write down what was asked of them."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import pytest
import torch

from quantd.daemon.worker.gpu.cuda import CudaQueue
from quantd.daemon.worker.gpu.queue import NotRecorded


class Stream:
    names = iter(())

    def __init__(self, device: torch.device) -> None:
        self.name = next(Stream.names)
        self.log = Log.lines

    def wait_event(self, event: Event) -> None:
        self.log.append(f"{self.name} waits for {event.place}")


class Log:
    lines: list[str] = []


class Event:
    def __init__(self, enable_timing: bool = False) -> None:
        self.has_time = enable_timing

    def record(self, stream: Stream) -> None:
        self.place = f"mark in {stream.name}"
        Log.lines.append(self.place)

    def query(self) -> bool:
        return False

    def synchronize(self) -> None:
        Log.lines.append("wait for the mark")

    def elapsed_time(self, other: Event) -> float:
        assert self.has_time and other.has_time
        return 5.0


class CUDAGraph:
    users: Counter[str] = Counter()
    """Graphs of each pool, as torch's allocator counts them."""
    ended: set[str] = set()

    def capture_begin(self, pool: str, capture_error_mode: str) -> None:
        assert pool not in self.ended, "INTERNAL ASSERT FAILED: it->second->use_count > 0"
        self.pool, self.is_ended = pool, False
        self.users[pool] += 1
        Log.lines.append(f"record into {pool}, {capture_error_mode}")

    def capture_end(self) -> None:
        self.is_ended = True
        Log.lines.append("recorded")

    def __del__(self) -> None:
        if self.is_ended:
            self.users[self.pool] -= 1
            if not self.users[self.pool]:
                self.ended.add(self.pool)

    def replay(self) -> None:
        Log.lines.append("replay")


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> CudaQueue:
    Log.lines = []
    CUDAGraph.users.clear()
    CUDAGraph.ended.clear()
    handles = (f"pool {number}" for number in count())
    Stream.names = iter(("compute", "copying"))  # type: ignore[assignment]

    @contextmanager
    def on(stream: Stream) -> Iterator[None]:
        Log.lines.append(f"on {stream.name}:")
        yield

    def note(line: str) -> Any:
        return lambda *args, **kwargs: Log.lines.append(line)

    for name, other in {
        "Stream": Stream,
        "Event": Event,
        "CUDAGraph": CUDAGraph,
        "stream": on,
        "set_stream": lambda stream: Log.lines.append(f"current: {stream.name}"),
        "graph_pool_handle": lambda: next(handles),
        "synchronize": note("all is done"),
        "empty_cache": note("give back"),
    }.items():
        monkeypatch.setattr(torch.cuda, name, other)
    return CudaQueue(torch.device("cuda:0"))


def test_the_computing_stream_becomes_the_current_one(queue: CudaQueue) -> None:
    assert Log.lines == ["all is done", "give back", "current: compute"]


def test_streams_wait_for_what_they_are_told_to_alone(queue: CudaQueue) -> None:
    Log.lines = []
    queue._compute.log = queue._copying.log = Log.lines  # type: ignore[attr-defined]
    copied = queue.copy(lambda: Log.lines.append("copy"), None)
    queue.run(lambda: Log.lines.append("work"))
    assert Log.lines == ["on copying:", "copy", "mark in copying", "work"]
    mark = queue.mark()
    Log.lines.clear()
    queue.copy(lambda: Log.lines.append("copy"), mark)
    queue.follow(copied)
    assert Log.lines == [
        "copying waits for mark in compute",
        "on copying:",
        "copy",
        "mark in copying",
        "compute waits for mark in copying",
    ]


def test_marks_are_in_the_computing_stream(queue: CudaQueue) -> None:
    begun, ended = queue.mark(), queue.mark()
    assert not ended.is_reached()
    ended.wait()
    assert queue.seconds(begun, ended) == 0.005
    assert Log.lines[-3:] == ["mark in compute", "mark in compute", "wait for the mark"]


def test_recording_waits_for_nothing(queue: CudaQueue) -> None:
    Log.lines = []
    queue.record(lambda: Log.lines.append("work")).replay()
    assert Log.lines == ["record into pool 1, thread_local", "work", "recorded", "replay"]


def test_graphs_share_a_pool_until_the_last_of_them_has_gone(queue: CudaQueue) -> None:
    graphs = [queue.record(lambda: None) for _ in range(3)]
    del graphs[0]
    graphs.append(queue.record(lambda: None))
    assert set(CUDAGraph.users) == {"pool 1"} and CUDAGraph.users["pool 1"] == 3
    for _ in range(2):
        graphs.clear()
        graphs += [queue.record(lambda: None) for _ in range(2)]
    assert CUDAGraph.ended == {"pool 1", "pool 2"}


def test_nothing_is_collected_while_it_is_recorded(queue: CudaQueue) -> None:
    """The pools of a model that went before would wait for the device, which ends a recording."""
    seen: list[bool] = []
    queue.record(lambda: seen.append(gc.isenabled()))
    assert seen == [False] and gc.isenabled()

    def work() -> None:
        seen.append(gc.isenabled())
        raise torch.OutOfMemoryError("no memory")

    with pytest.raises(torch.OutOfMemoryError):
        queue.record(work)
    assert seen == [False, False] and gc.isenabled()


def test_a_recording_that_finds_no_memory_is_ended(queue: CudaQueue) -> None:
    def work() -> None:
        raise torch.OutOfMemoryError("no memory")

    Log.lines = []
    with pytest.raises(torch.OutOfMemoryError):
        queue.record(work)
    assert Log.lines[-1] == "recorded"
    queue.settle()
    queue.give_back()
    assert Log.lines[-2:] == ["all is done", "give back"]


def test_a_graph_that_cuda_finds_no_memory_for(
    queue: CudaQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = queue.record(lambda: None)

    def fail(message: str) -> Any:
        def raising(self: CUDAGraph) -> None:
            raise RuntimeError(message)

        return raising

    monkeypatch.setattr(CUDAGraph, "replay", fail("CUDA error: out of memory"))
    with pytest.raises(torch.OutOfMemoryError, match="CUDA error"):
        graph.replay()
    monkeypatch.setattr(CUDAGraph, "capture_end", fail("CUDA error: out of memory"))
    with pytest.raises(torch.OutOfMemoryError, match="CUDA error"):
        queue.record(lambda: None)
    monkeypatch.setattr(CUDAGraph, "replay", fail("CUDA error: an illegal memory access"))
    with pytest.raises(RuntimeError, match="illegal") as caught:
        graph.replay()
    assert not isinstance(caught.value, torch.OutOfMemoryError)


def test_what_is_not_recorded_is_told_from_what_fails(
    queue: CudaQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work() -> None:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    with pytest.raises(NotRecorded, match="not permitted"):
        queue.record(work)
    assert Log.lines[-1] == "recorded", "the stream is one again that does what it is given"
    with pytest.raises(KeyError):
        queue.record(lambda: {}["a mistake of ours"])
    for part in ("capture_begin", "capture_end"):
        with monkeypatch.context() as patch:

            def refuse(self: CUDAGraph, **rest: Any) -> None:
                self.is_ended = False
                raise RuntimeError("INTERNAL ASSERT FAILED")

            patch.setattr(CUDAGraph, part, refuse)
            with pytest.raises(NotRecorded, match="ASSERT"):
                queue.record(lambda: None)
    queue.record(lambda: None).replay()


def test_uploads_and_downloads_do_not_wait(
    queue: CudaQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    original = torch.Tensor.copy_

    def copy(self: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> Any:
        asked.append(non_blocking)
        return original(self, source)

    monkeypatch.setattr(torch.Tensor, "copy_", copy)
    source, target = torch.arange(4), torch.zeros(4, dtype=torch.int64)
    queue.upload(source, target)
    assert target.tolist() == [0, 1, 2, 3]
    queue.download(source + 1, target)
    assert target.tolist() == [1, 2, 3, 4]
    assert asked == [True, True]

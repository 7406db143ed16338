"""The queue of a CUDA device: two streams, events, pinned memory, recorded graphs.

It has not run on a GPU yet (docs/gpus.md); what is put into it was, by the tests' queue.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from weakref import WeakSet

import torch
from torch import Tensor

from quantd.daemon.worker.gpu.queue import Copied, Graph, Mark, NotRecorded, Work


class CudaMark:
    """An event in the computing stream, with its time."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self.event.record(stream)

    def is_reached(self) -> bool:
        return bool(self.event.query())  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        self.event.synchronize()


class CudaCopied:
    """An event in the copying stream."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self.event.record(stream)


class CudaGraph:
    """Its memory goes back to its pool when this goes."""

    def __init__(self, graph: torch.cuda.CUDAGraph) -> None:
        self._graph = graph

    def replay(self) -> None:
        with _memory_errors():
            self._graph.replay()


@contextmanager
def _memory_errors() -> Iterator[None]:
    """CUDA takes memory of its own for a graph, and torch has no class for that error."""
    try:
        yield
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
        raise torch.OutOfMemoryError(str(error)) from None


@contextmanager
def _no_collection() -> Iterator[None]:
    """Nothing dies but what loses its last reference. What a collector finds might be pools of an
    earlier model, which wait for the device before they go: that would void a recording."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class CudaQueue:
    """Makes a stream of its own the current one of the calling thread, for good: torch's allocator
    reuses memory in the order of the stream that was current when it was asked."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # What was loaded was on the default stream, and what torch keeps is for that one.
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        self._compute = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._copying = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        torch.cuda.set_stream(self._compute)
        self._graphs: WeakSet[CudaGraph] = WeakSet()
        self._pool = torch.cuda.graph_pool_handle()
        """Of all graphs: they run one after another, so that one's memory may be the next's."""

    @property
    def device(self) -> torch.device:
        return self._device

    def run(self, work: Work) -> None:
        work()

    def copy(self, work: Work, after: Mark | None) -> Copied:
        if after is not None:
            assert isinstance(after, CudaMark)
            self._copying.wait_event(after.event)
        with torch.cuda.stream(self._copying):
            work()
        return CudaCopied(self._copying)

    def follow(self, copied: Copied) -> None:
        assert isinstance(copied, CudaCopied)
        self._compute.wait_event(copied.event)

    def upload(self, source: Tensor, target: Tensor) -> None:
        target.copy_(source, non_blocking=True)

    def download(self, source: Tensor, target: Tensor) -> None:
        target.copy_(source, non_blocking=True)

    def mark(self) -> Mark:
        return CudaMark(self._compute)

    def seconds(self, begun: Mark, ended: Mark) -> float:
        assert isinstance(begun, CudaMark) and isinstance(ended, CudaMark)
        return float(begun.event.elapsed_time(ended.event)) / 1000

    def pinned(self, num_bytes: int) -> Tensor:
        return torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=True)

    def record(self, work: Work) -> Graph:
        if not self._graphs:
            # A pool ends with its last graph; torch asserts that it is not shared after that.
            self._pool = torch.cuda.graph_pool_handle()
        # Not torch.cuda.graph, which waits for the device and empties the cache before. Other
        # threads (the disk's, the masks') may do as they like meanwhile: "thread_local".
        graph = torch.cuda.CUDAGraph()
        try:
            with _no_collection(), _memory_errors():
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    work()
                except BaseException:
                    with suppress(RuntimeError):  # the recording is void, which it says as well
                        graph.capture_end()
                    raise
                graph.capture_end()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # a context that is lost says so again when the work is done
            raise NotRecorded(str(error)) from error
        recorded = CudaGraph(graph)
        self._graphs.add(recorded)
        return recorded

    def settle(self) -> None:
        torch.cuda.synchronize(self._device)

    def give_back(self) -> None:
        torch.cuda.empty_cache()

"""The queue of a GPU on CPU tensors: each piece of work is done as late, or as early, as streams
and marks allow, by a seeded schedule.

What a GPU would not forgive is an error or another result here:
- work that reads a value on the host raises (`NoReads`);
- an upload reads its pinned source when its turn comes, and the source is poison after that;
- a download's target is poison until a later mark is seen to be reached;
- new memory of the device is poison (`poisoned`).
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from quantd.daemon.worker.gpu.queue import Copied, Graph, Mark, Work

POISON = 0x7F
"""As a byte: in float32 3.4e38, as an id beyond every vocabulary and pool."""

_READS = {
    "aten::_local_scalar_dense",
    "aten::item",
    "aten::is_nonzero",
    "aten::equal",
    "aten::nonzero",
    "aten::masked_select",
    "aten::unique_consecutive",
    "aten::unique_dim",
    "aten::_unique",
    "aten::_unique2",
    "aten::bincount",
    "aten::repeat_interleave.Tensor",
}
"""Operations whose result, or its size, is read from the device."""
_INDEXED = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}


class NoReads(TorchDispatchMode):
    """Raises on what would wait for a GPU."""

    is_suspended = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func._schema.name
        full = f"{name}.{func._schema.overload_name}"
        by_mask = name in _INDEXED and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if not NoReads.is_suspended and (name in _READS or full in _READS or by_mask):
            raise AssertionError(f"{full} in queued work: the host would wait for the device")
        return func(*args, **(kwargs or {}))


class NoListsOfTensors(TorchFunctionMode):
    """The same for what never gets as far as an operation."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.Tensor.tolist, torch.Tensor.numpy) and not NoReads.is_suspended:
            raise AssertionError(f"{func} in queued work: the host would wait for the device")
        return func(*args, **(kwargs or {}))


@contextmanager
def reads_allowed() -> Iterator[None]:
    """For a specification that reads, in the place of a kernel that does not."""
    NoReads.is_suspended = True
    try:
        yield
    finally:
        NoReads.is_suspended = False


@dataclass(eq=False)
class Piece:
    """Work in a stream."""

    work: Work
    needs: int
    """So many pieces of the other stream come before it."""


@dataclass(eq=False)
class FakeMark:
    queue: FakeQueue
    number: int
    place: int
    """So many pieces of the computing stream are before it."""
    time: int = -1
    is_seen: bool = False

    def is_reached(self) -> bool:
        self.queue.tick()
        if self.queue.num_computed < self.place:
            return False
        self.queue.see(self)
        return True

    def wait(self) -> None:
        self.queue.log.append(("wait", self.number))
        self.queue.compute_until(self.place)
        self.queue.see(self)


@dataclass(eq=False)
class FakeCopied:
    place: int
    """So many pieces of the copying stream are before it."""


@dataclass(eq=False)
class FakeGraph:
    queue: FakeQueue
    work: Work
    is_alive: bool = True

    def replay(self) -> None:
        self.queue.log.append(("replay", 0))
        self.queue.put(self.work)


@dataclass(eq=False)
class FakeQueue:
    """seed: of the schedule. eagerness: how likely a piece of work is done at each occasion; 0: as
    late as possible, 1: at once."""

    seed: int = 0
    eagerness: float = 0.3
    prefers_copies: bool = False
    """Copies are done as early as they may, whatever the eagerness."""
    memory_errors: list[int] = field(default_factory=list)
    """Which calls of `run` and `record`, counted from now, find no memory."""
    in_step: bool = False
    log: list[tuple[str, int]] = field(default_factory=list)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._computing: deque[Piece] = deque()
        self._copying: deque[Piece] = deque()
        self.num_computed = self.num_copied = 0
        self.num_marks = 0
        self._landed: list[tuple[int, Tensor, Tensor]] = []
        """Downloads that are done but not seen: place, what came, where it goes."""

    # --- the interface ---------------------------------------------------------------------------

    def run(self, work: Work) -> None:
        self._need_memory()
        self.put(work)

    def copy(self, work: Work, after: Mark | None) -> Copied:
        assert after is None or isinstance(after, FakeMark)
        self._copying.append(Piece(work, 0 if after is None else after.place))
        copied = FakeCopied(self.num_copied + len(self._copying))
        self.log.append(("copy", 0))
        self.tick()
        return copied

    def follow(self, copied: Copied) -> None:
        assert isinstance(copied, FakeCopied)
        self.put(lambda: None, copied.place)

    def upload(self, source: Tensor, target: Tensor) -> None:
        def work() -> None:
            target.copy_(source)
            source.fill_(POISON)

        self.put(work)

    def download(self, source: Tensor, target: Tensor) -> None:
        target.fill_(POISON)
        place = self._num_put + 1
        self.put(lambda: self._landed.append((place, source.clone(), target)))

    def mark(self) -> Mark:
        self.num_marks += 1
        self.log.append(("mark", self.num_marks))
        mark = FakeMark(self, self.num_marks, self._num_put + 1)
        self.put(lambda: None)
        return mark

    def seconds(self, begun: Mark, ended: Mark) -> float:
        assert isinstance(begun, FakeMark) and isinstance(ended, FakeMark)
        assert self.num_computed >= max(begun.place, ended.place), "of a mark that is not reached"
        return float(ended.place - begun.place)

    def pinned(self, num_bytes: int) -> Tensor:
        return torch.zeros(num_bytes, dtype=torch.uint8)

    def record(self, work: Work) -> Graph:
        self._need_memory()
        self.log.append(("record", 0))
        return FakeGraph(self, work)

    def settle(self) -> None:
        assert not self.in_step, "all was waited for within a step"
        self.log.append(("settle", 0))
        self.compute_until(self._num_put)
        while self._copying:
            self._do_copy()

    def give_back(self) -> None:
        assert self.is_settled, "memory is given back under work"
        self.log.append(("give back", 0))

    @property
    def is_settled(self) -> bool:
        return not self._computing and not self._copying

    # --- what marks and graphs need --------------------------------------------------------------

    def put(self, work: Work, needs: int = 0) -> None:
        self._computing.append(Piece(work, needs))
        self.tick()

    def tick(self) -> None:
        """An occasion to get on."""
        while self.prefers_copies and self._copying:
            self._step(self._copying)
        while self._random.random() < self.eagerness and (self._computing or self._copying):
            streams = [stream for stream in (self._computing, self._copying) if stream]
            self._step(self._random.choice(streams))

    def get_on(self) -> None:
        """The device does one more piece of work: time passes."""
        if self._computing or self._copying:
            self._step(self._computing or self._copying)

    def compute_until(self, place: int) -> None:
        while self.num_computed < place:
            self._step(self._computing)

    def see(self, mark: FakeMark) -> None:
        """The host knows that it is reached: what came down before it may be read."""
        left = []
        for place, came, target in self._landed:
            if place <= mark.place:
                target.copy_(came)
            else:
                left.append((place, came, target))
        self._landed = left

    # --- doing it --------------------------------------------------------------------------------

    @property
    def _num_put(self) -> int:
        return self.num_computed + len(self._computing)

    def _step(self, stream: deque[Piece]) -> None:
        """The next piece of a stream, after what it needs of the other one."""
        if stream is self._copying:
            while self.num_computed < stream[0].needs:
                self._step(self._computing)
            if stream:
                self._do_copy()
            return
        while self.num_copied < stream[0].needs:
            self._step(self._copying)
        self._do(stream.popleft().work)
        self.num_computed += 1

    def _do_copy(self) -> None:
        self._do(self._copying.popleft().work)
        self.num_copied += 1

    @staticmethod
    def _do(work: Work) -> None:
        with torch.inference_mode(), NoReads(), NoListsOfTensors():
            work()

    def _need_memory(self) -> None:
        self.memory_errors = [number - 1 for number in self.memory_errors]
        if -1 in self.memory_errors:
            self.memory_errors.remove(-1)
            self.in_step = False  # then, and only then, may a step wait for all
            raise torch.OutOfMemoryError("injected")


@contextmanager
def poisoned() -> Iterator[None]:
    """What torch.empty gives is NaN, or the highest number."""
    before = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]

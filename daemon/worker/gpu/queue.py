"""What a runner needs of a GPU: two streams of work, marks in them, and pinned memory.

Everything is put into a queue and done later, in the order of its stream. The caller never reads a
device's tensor and never waits but at a `Mark`. `cuda.py` is the real one; tests have one that
does each piece of work as late, or as early, as streams and marks allow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

Work = Callable[[], None]
"""Operations on the device's tensors. It reads no value of theirs on the host."""


class Mark(Protocol):
    """A place in the computing stream."""

    def is_reached(self) -> bool:
        """All that was put into the stream before it is done. Does not wait."""

    def wait(self) -> None:
        """Returns when it is reached."""


class Copied(Protocol):
    """A place in the copying stream, for `Queue.follow`."""


class Graph(Protocol):
    """Work that was recorded once."""

    def replay(self) -> None:
        """Puts it into the computing stream again, with the same tensors."""


class NotRecorded(Exception):
    """The device does not record this work; nothing of it was done. The text says why."""


class Queue(Protocol):
    """One device. For the worker's own thread only."""

    @property
    def device(self) -> torch.device: ...

    def run(self, work: Work) -> None:
        """Puts work into the computing stream."""

    def copy(self, work: Work, after: Mark | None) -> Copied:
        """Puts work into the copying stream, and gives the place behind it. It begins when what is
        in the copying stream now is done and `after` is reached, and waits for nothing else of the
        computing stream, as nothing there waits for it but what `follow`s."""

    def follow(self, copied: Copied) -> None:
        """What is put into the computing stream from now on begins when the copying stream has got
        there. The host does not wait."""

    def upload(self, source: Tensor, target: Tensor) -> None:
        """In the computing stream: `target`, on the device, becomes `source`, which is pinned and
        not written to until a later mark is reached."""

    def download(self, source: Tensor, target: Tensor) -> None:
        """In the computing stream: `target`, which is pinned, becomes `source`. It may be read
        when a later mark is reached."""

    def mark(self) -> Mark:
        """A mark behind all that is in the computing stream now."""

    def seconds(self, begun: Mark, ended: Mark) -> float:
        """Of the device's clock, between two marks that are reached."""

    def pinned(self, num_bytes: int) -> Tensor:
        """uint8 [num_bytes] of pinned memory, zeros."""

    def record(self, work: Work) -> Graph:
        """Records work without doing it. It allocates from memory that the graph keeps, and
        torch.OutOfMemoryError is raised when there is none. NotRecorded: the work can be done as it
        is. A graph is kept until what replays it is done."""

    def settle(self) -> None:
        """Returns when both streams are empty. Never within a step: at the end, and where memory
        is given back."""

    def give_back(self) -> None:
        """Memory that is kept for what may come next goes back to the device; to be called when
        the queue is settled."""

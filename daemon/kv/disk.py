"""The third tier as the control plane sees it: which blocks lie in files, and which go next.

A file's name is a digest of its namespace and of all tokens up to the block's end, so it means the
same after a restart. The worker checks when it reads that a file holds what its name says.
"""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable

from quantd.daemon.kv.tree import Node
from quantd.daemon.types import DiskOp

FIRST_REST_SECONDS = 10.0
LONGEST_REST_SECONDS = 600.0
"""After a failed write nothing is written for the first, after each further failure for twice the
time before, and never for longer than the second."""


def chain(digest: bytes, key: bytes) -> bytes:
    """The name of the block `key` behind the one called `digest`."""
    return hashlib.blake2b(key, key=digest, digest_size=32, person=b"quantd-kv-block").digest()


def digest_of(node: Node) -> bytes:
    """The name of a node's block, of 32 bytes; kept in the node."""
    missing: list[Node] = []
    at = node
    while at.digest is None:
        assert at.parent is not None, "a root has its digest from its namespace"
        missing.append(at)
        at = at.parent
    digest = at.digest
    for below in reversed(missing):
        digest = below.digest = chain(digest, below.key)
    return digest


class DiskIndex:
    """Names of files, least recently used first, within a budget. Moves no bytes: what is to be
    done stands in `ops`, which go out with the next plan."""

    def __init__(self, budget_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._budget_bytes = budget_bytes
        self._clock = clock
        self._file_bytes = 0
        self._files: OrderedDict[bytes, None] = OrderedDict()
        """The complete ones, and those that are being written."""
        self._writing: set[bytes] = set()
        self._unwanted: set[bytes] = set()
        """To be removed as soon as they are written."""
        self.ops: list[DiskOp] = []
        self.problem: str | None = None
        """Why the last write failed; None once one has succeeded since. Reads that fail only
        forget their file."""
        self._rest_seconds = FIRST_REST_SECONDS
        self._rests_until = 0.0

    @property
    def is_open(self) -> bool:
        """The folder was looked through; until then nothing is read or written."""
        return self._file_bytes > 0

    @property
    def capacity(self) -> int:
        """Files that the budget allows; 0 until the folder was looked through."""
        return self._budget_bytes // self._file_bytes if self.is_open else 0

    def __len__(self) -> int:
        """Files that can be read."""
        return len(self._files) - len(self._writing)

    def __contains__(self, name: bytes) -> bool:
        """It can be read."""
        return name in self._files and name not in self._writing

    def knows(self, name: bytes) -> bool:
        """It can be read, or is being written."""
        return name in self._files

    def open(self, names: Iterable[bytes], file_bytes: int) -> None:
        """What the folder holds, oldest first."""
        self._file_bytes = file_bytes
        for name in names:
            self._files[name] = None
        self._keep_budget()

    @property
    def rests(self) -> bool:
        """After a failed write, for a time."""
        return self.problem is not None and self._clock() < self._rests_until

    @property
    def may_write(self) -> bool:
        """After a rest: one file at a time, until one has succeeded."""
        if self.capacity == 0 or self.rests:
            return False
        return self.problem is None or not self._writing

    def write(self, name: bytes, place: int) -> bool:
        """Begin to write, unless it is there; False: nothing was begun."""
        self._unwanted.discard(name)
        if name in self._files or not self.may_write:
            return False
        self._files[name] = None
        self._writing.add(name)
        self.ops.append(DiskOp("write", name, place))
        self._keep_budget()
        return True

    def written(self, name: bytes, error: str | None) -> None:
        self._writing.discard(name)
        is_unwanted = name in self._unwanted
        self._unwanted.discard(name)
        if error is None:
            self.problem, self._rest_seconds = None, FIRST_REST_SECONDS
            if is_unwanted:
                self.remove(name)
            self._keep_budget()  # while all that were there were being written, nothing could go
            return
        self._files.pop(name, None)
        now = self._clock()
        if self.problem is None or now >= self._rests_until:  # else it was sent before the rest
            self._rests_until = now + self._rest_seconds
            self._rest_seconds = min(2 * self._rest_seconds, LONGEST_REST_SECONDS)
        self.problem = error

    def remove(self, name: bytes) -> None:
        """No effect on one that is not there."""
        if name in self._writing:
            self._unwanted.add(name)
        elif name in self._files:
            del self._files[name]
            self.ops.append(DiskOp("remove", name))

    def read(self, name: bytes, place: int) -> None:
        assert name in self
        self._files.move_to_end(name)
        self.ops.append(DiskOp("read", name, place))

    def unreadable(self, name: bytes) -> None:
        """The worker has found the file to be wrong or gone, and removed it."""
        if name not in self._writing:  # else it is made anew
            self._files.pop(name, None)

    def _keep_budget(self) -> None:
        while len(self._files) > self.capacity:
            oldest = next((name for name in self._files if name not in self._writing), None)
            if oldest is None:
                return
            del self._files[oldest]
            self.ops.append(DiskOp("remove", oldest))

    def check(self) -> None:
        assert self._unwanted <= self._writing <= self._files.keys()
        assert len(self) <= self.capacity

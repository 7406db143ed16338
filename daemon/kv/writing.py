"""Blocks on their way from the host to disk, and those that are to go."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from quantd.daemon.kv.disk import digest_of
from quantd.daemon.kv.tree import NONE, Node
from quantd.daemon.types import DiskDone

if TYPE_CHECKING:
    from quantd.daemon.kv.cache import KvCache

_PLACES_SHARE = 4
"""At most a quarter of the host's places may wait for the disk."""


@dataclass(slots=True)
class DiskWrites:
    """Writes what is spilled and, at rest, what is only in memory. A place from which is written is
    owned until that is done, so the block may leave the host meanwhile."""

    _cache: KvCache
    _unsaved: deque[Node] = field(default_factory=deque)
    """Nodes that may not be on disk yet, parents before children."""
    _places: dict[bytes, int] = field(default_factory=dict)
    """File -> place from which it is written."""

    def note(self, node: Node) -> None:
        """It has a new block. An engine that is never at rest never calls `save`: what is gone is
        dropped by and by."""
        if self._cache.disk is None:
            return
        if len(self._unsaved) > 2 * self._cache.tree.num_nodes + 64:
            there = (n for n in self._unsaved if n.block != NONE or n.place != NONE)
            self._unsaved = deque(dict.fromkeys(there))  # each once
        self._unsaved.append(node)

    def begin(self, node: Node) -> None:
        """Write a block that has a place; not if it is on disk, or too many are on their way."""
        disk, host = self._cache.disk, self._cache.host
        if disk is None or not self._may_begin:
            return
        assert host is not None
        name = digest_of(node)
        if disk.write(name, node.place):
            host.retain((node.place,))
            self._places[name] = node.place

    def save(self) -> bool:
        """Begin to write what is only in memory, as far as there are places for it. False: there is
        nothing to write to, or not now."""
        cache = self._cache
        disk = cache.disk
        if disk is None or cache.host is None or disk.rests:
            self._unsaved.clear()
            return False
        while self._unsaved and self._may_begin and disk.may_write:
            node = self._unsaved[0]
            whole = node.block != NONE and not cache.pool.is_trimmed(node.block)
            if whole and digest_of(node) not in disk and node.place == NONE:
                if not cache.spill(node):
                    break
            if node.place != NONE:
                self.begin(node)
            self._unsaved.popleft()
        return True

    def done(self, done: DiskDone) -> int:
        """A file was written, or not. The place from which, which is released."""
        disk, host = self._cache.disk, self._cache.host
        assert disk is not None and host is not None
        place = self._places.pop(done.key)
        disk.written(done.key, done.error)
        self._cache.num_moved["out", "disk"] += done.error is None
        host.release((place,))
        return place

    @property
    def num_unsaved(self) -> int:
        return len(self._unsaved)

    def places(self) -> set[int]:
        return set(self._places.values())

    @property
    def _may_begin(self) -> bool:
        host = self._cache.host
        return host is not None and len(self._places) * _PLACES_SHARE < host.limit

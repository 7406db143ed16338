"""Blocks on their way from disk to the host, for sequences that wait for them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from quantd.daemon.kv.disk import chain, digest_of
from quantd.daemon.kv.namespace import Namespace
from quantd.daemon.kv.tree import KEY_BYTES, Node
from quantd.daemon.types import DiskDone

if TYPE_CHECKING:
    from quantd.daemon.kv.cache import KvCache

_PLACES_SHARE = 2
"""At most half of the host's places may be waited for at once."""


@dataclass(slots=True)
class _Job:
    """One sequence's blocks, in order of depth."""

    id: int
    namespace: Namespace
    key: bytes
    start: int
    """Depth of the node under which the first of them belongs."""
    places: list[int]
    num_done: int = 0
    failed: bool = False
    """What comes after a block that is missing is of no use."""


@dataclass(slots=True)
class DiskReads:
    """Reads what a sequence wants from disk and is nowhere nearer. A job has ended when each of its
    blocks was read or has failed; what was read is in the tree then, on the host."""

    _cache: KvCache
    _jobs: dict[int, _Job] = field(default_factory=dict)
    _by_name: dict[bytes, _Job] = field(default_factory=dict)
    _ids: itertools.count[int] = field(default_factory=lambda: itertools.count(1))

    def begin(self, namespace: Namespace, key: bytes | bytearray, num_blocks: int) -> int | None:
        """A job for the blocks after those of the tree; None: there is nothing worth reading."""
        cache = self._cache
        disk = cache.disk
        if disk is None or not len(disk) or not cache.cost.read_is_cheaper():
            return None
        node: Node = cache.tree.find(namespace, key, num_blocks) or cache.tree.root(namespace)
        names = self._names(node, bytes(key), num_blocks)
        places: list[int] = []
        for _ in names:
            place = cache.take_place()
            if place is None:
                break
            places.append(place)
        if not places:
            cache.tree.forget_root(cache.tree.root(namespace))
            return None
        job = _Job(next(self._ids), namespace, bytes(key), node.depth, places)
        self._jobs[job.id] = job
        for name, place in zip(names, places, strict=False):
            self._by_name[name] = job
            disk.read(name, place)
        return job.id

    def _names(self, node: Node, key: bytes, num_blocks: int) -> list[bytes]:
        disk, host = self._cache.disk, self._cache.host
        assert disk is not None and host is not None
        names: list[bytes] = []
        name = digest_of(node)
        room = host.limit // _PLACES_SHARE - sum(len(job.places) for job in self._jobs.values())
        for depth in range(node.depth, min(num_blocks, node.depth + max(0, room))):
            name = chain(name, key[depth * KEY_BYTES : (depth + 1) * KEY_BYTES])
            if name not in disk or name in self._by_name:
                break
            names.append(name)
        return names

    def done(self, done: DiskDone) -> set[int]:
        """The next block of a job was read, or not. The job, if that was its last."""
        job = self._by_name.pop(done.key)
        cache = self._cache
        assert cache.disk is not None and cache.host is not None
        place = job.places[job.num_done]
        depth = job.start + job.num_done
        job.num_done += 1
        if done.error is not None:
            cache.disk.unreadable(done.key)
            job.failed = True
        else:
            cache.cost.read(done.seconds)
            cache.num_moved["in", "disk"] += 1
        if job.failed or not self._attach(job, depth, place):
            job.failed = True
            cache.host.release((place,))
        if job.num_done < len(job.places):
            return set()
        del self._jobs[job.id]
        cache.tree.forget_root(cache.tree.root(job.namespace))
        return {job.id}

    def _attach(self, job: _Job, depth: int, place: int) -> bool:
        """False when what came before it is gone, or it is there already."""
        tree = self._cache.tree
        parent: Node | None = tree.root(job.namespace)
        if depth:
            parent = tree.find(job.namespace, job.key, depth)
        key = job.key[depth * KEY_BYTES : (depth + 1) * KEY_BYTES]
        if parent is None or parent.depth < depth or parent.child(key) is not None:
            return False
        self._cache.put(tree.add(parent, key), place)
        return True

    def places(self) -> set[int]:
        return {place for job in self._jobs.values() for place in job.places[job.num_done :]}

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
    """Blocks that follow one another, in order of depth."""

    id: int
    namespace: Namespace
    key: bytes
    start: int
    """Depth of the node under which the first of them belongs."""
    places: list[int]
    num_done: int = 0


@dataclass(slots=True)
class DiskReads:
    """Reads what a sequence wants from disk and is nowhere nearer. What was read is in the tree
    then, on the host.

    No block is read twice at once: who wants one that is on its way waits for it, and reads only
    what comes behind. That is attached later, because the worker reads in order.
    """

    _cache: KvCache
    _jobs: dict[int, _Job] = field(default_factory=dict)
    _by_name: dict[bytes, _Job] = field(default_factory=dict)
    _waits: dict[bytes, set[int]] = field(default_factory=dict)
    """By the last block that each waits for."""
    _ids: itertools.count[int] = field(default_factory=lambda: itertools.count(1))

    def begin(self, namespace: Namespace, key: bytes | bytearray, num_blocks: int) -> int | None:
        """Have the blocks after those of the tree read; a number that `done` names once each of
        them was read or has failed. None: there is nothing worth reading."""
        cache = self._cache
        disk = cache.disk
        if disk is None or not len(disk) or not cache.cost.read_is_cheaper():
            return None
        node: Node = cache.tree.find(namespace, key, num_blocks) or cache.tree.root(namespace)
        shared, names = self._names(node, bytes(key), num_blocks)
        places: list[int] = []
        for _ in names:
            place = cache.take_place()
            if place is None:
                break
            places.append(place)
        names = names[: len(places)]
        if not shared and not names:
            cache.tree.forget_root(cache.tree.root(namespace))
            return None
        id = next(self._ids)
        if names:
            start = node.depth + len(shared)
            job = self._jobs[id] = _Job(id, namespace, bytes(key), start, places)
            for name, place in zip(names, places, strict=True):
                self._by_name[name] = job
                disk.read(name, place)
        self._waits.setdefault([*shared, *names][-1], set()).add(id)
        return id

    def _names(self, node: Node, key: bytes, num_blocks: int) -> tuple[list[bytes], list[bytes]]:
        """The files of the next blocks: those that are being read, and then those to read."""
        disk, host = self._cache.disk, self._cache.host
        assert disk is not None and host is not None
        shared: list[bytes] = []
        names: list[bytes] = []
        name = digest_of(node)
        room = host.limit // _PLACES_SHARE - sum(len(job.places) for job in self._jobs.values())
        for depth in range(node.depth, num_blocks):
            name = chain(name, key[depth * KEY_BYTES : (depth + 1) * KEY_BYTES])
            if name in self._by_name and not names:
                shared.append(name)
            elif name in disk and name not in self._by_name and len(names) < room:
                names.append(name)
            else:
                break
        return shared, names

    def done(self, done: DiskDone) -> set[int]:
        """The next block of a job was read, or not. What `begin` gave to whoever waited for it."""
        job = self._by_name.pop(done.key)
        cache = self._cache
        assert cache.disk is not None and cache.host is not None
        place = job.places[job.num_done]
        depth = job.start + job.num_done
        job.num_done += 1
        if done.error is not None:
            cache.disk.unreadable(done.key)
        else:
            cache.cost.read(done.seconds)
            cache.num_moved["in", "disk"] += 1
        if done.error is not None or not self._attach(job, depth, place):
            cache.host.release((place,))
        if job.num_done == len(job.places):
            del self._jobs[job.id]
            cache.tree.forget_root(cache.tree.root(job.namespace))
        return self._waits.pop(done.key, set())

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

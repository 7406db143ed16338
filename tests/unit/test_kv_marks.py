"""What is kept elsewhere takes its blocks along when it is deleted, and nobody else's."""

from __future__ import annotations

import random
from typing import NamedTuple

import pytest
from fakes import make_tables

from quantd.daemon.kv.cache import KvCache
from quantd.daemon.kv.namespace import Namespace
from quantd.daemon.kv.tree import KEY_BYTES, Node, Root, encode
from quantd.daemon.types import BLOCK_TOKENS, DiskDone

HERE = Namespace(revision="r")


def key_of(*blocks: int) -> bytes:
    """One number a block."""
    return encode(token for block in blocks for token in [block] * BLOCK_TOKENS)


class Running(NamedTuple):
    root: Root
    node: Node
    owned: list[int]
    mark: str


def start(kv: KvCache, *blocks: int, mark: str = "") -> Running:
    """A sequence of whole blocks, or of as many as there is room for."""
    key = key_of(*blocks)
    root, node, owned = kv.start(HERE, kv.match(HERE, key, len(blocks)))
    for i in range(len(owned), len(blocks)):
        new = kv.allocate(1)
        if new is None:
            break
        found = kv.insert(node, key[i * KEY_BYTES : (i + 1) * KEY_BYTES], new[0])
        assert found is not None
        node = found
        owned.append(node.block)
    return Running(root, node, owned, mark)


def grow(kv: KvCache, *blocks: int, mark: str = "") -> None:
    """One that has run and gone."""
    kv.release(*start(kv, *blocks, mark=mark))
    kv.check()


def known(kv: KvCache, *blocks: int) -> int:
    return kv.match(HERE, key_of(*blocks), len(blocks)).num_blocks


def files(kv: KvCache) -> int:
    assert kv.disk is not None
    return len(kv.disk)


def work_disk(kv: KvCache) -> list[str]:
    """As the worker does: what was written, read and removed."""
    kv.take_copies()
    done = kv.take_disk_ops()
    for op in done:
        if op.kind != "remove":
            kv.disk_done(DiskDone(op.kind, op.key, None, 0.1))
    return [op.kind for op in done]


def test_what_nobody_else_uses_is_gone() -> None:
    kv = make_tables(16).kv
    grow(kv, 1, 2, 3, mark="a")
    kv.forget("a")
    assert (known(kv, 1), kv.tree.num_nodes, kv.pool.num_free) == (0, 0, 16)
    kv.forget("a")
    kv.forget("never")
    kv.check()


def test_what_others_go_on_from_stays() -> None:
    kv = make_tables(16).kv
    grow(kv, 1, 2, 3, mark="a")
    grow(kv, 1, 4)
    kv.forget("a")
    assert (known(kv, 1, 2), known(kv, 1, 4)) == (1, 2)
    kv.check()


def test_a_chain_goes_with_the_last_of_it_in_any_order() -> None:
    for order in (("one", "two"), ("two", "one")):
        kv = make_tables(16).kv
        grow(kv, 1, 2, mark="one")
        grow(kv, 1, 2, 3, 4, mark="two")
        kv.forget(order[0])
        assert known(kv, 1, 2, 3, 4) == (2 if order[0] == "two" else 4)
        kv.check()
        kv.forget(order[1])
        assert (known(kv, 1), kv.tree.num_nodes) == (0, 0)


def test_what_runs_keeps_what_it_uses() -> None:
    kv = make_tables(16).kv
    grow(kv, 1, 2, 3, 4, mark="a")
    running = start(kv, 1, 2)
    kv.forget("a")
    assert known(kv, 1, 2, 3, 4) == 2
    kv.check()
    kv.release(*running)
    assert known(kv, 1, 2) == 2, "it is of another one now"


def test_what_was_taken_off_again_stays_as_any_other() -> None:
    kv = make_tables(16).kv
    grow(kv, 1, 2, mark="a")
    kv.unmark("a")
    kv.forget("a")
    assert known(kv, 1, 2) == 2
    kv.check()


def test_evicted_ends_leave_their_mark_on_what_is_left() -> None:
    kv = make_tables(4).kv
    grow(kv, 1, 2, 3, mark="a")
    taken = kv.allocate(3)
    assert taken is not None and known(kv, 1, 2, 3) == 1
    kv.check()
    kv.forget("a")
    assert known(kv, 1) == 0
    kv.pool.release(taken)
    kv.check()


def test_marks_go_with_the_last_block() -> None:
    kv = make_tables(4).kv
    for i in range(100):
        grow(kv, i, 1, mark=f"response {i}")
    kv.shrink()
    assert kv._marks._nodes == {}
    kv.check()


def test_the_host_gives_it_up_as_well() -> None:
    kv = make_tables(4, num_places=8).kv
    grow(kv, 1, 2, 3, mark="a")
    taken = kv.allocate(4)
    assert taken is not None and known(kv, 1, 2, 3) == 3, "on the host"
    kv.forget("a")
    assert (known(kv, 1), kv.stats().host_cached) == (0, 0)
    kv.pool.release(taken)
    kv.check()


@pytest.mark.parametrize("is_written", [False, True])
def test_files_go_too_also_those_that_are_being_written(is_written: bool) -> None:
    kv = make_tables(8, num_places=16, disk_files=100).kv
    grow(kv, 1, 2, 3, mark="a")
    grow(kv, 1, 9)
    assert kv.save()
    written = kv.take_disk_ops()
    assert [op.kind for op in written] == ["write"] * 4
    if not is_written:
        kv.forget("a")
    for op in written:
        kv.disk_done(DiskDone("write", op.key, None, 0.1))
    if is_written:
        kv.forget("a")
    assert work_disk(kv) == ["remove"] * 2
    assert (files(kv), known(kv, 1, 2), known(kv, 1, 9)) == (2, 1, 2)
    kv.check()


def test_files_of_what_has_left_memory_go_too() -> None:
    kv = make_tables(4, num_places=16, disk_files=200).kv
    grow(kv, 1, 2, 3, mark="a")
    kv.save()
    work_disk(kv)
    for i in range(10, 30):
        grow(kv, i, i, i, i)
        work_disk(kv)
    assert known(kv, 1) == 0 and kv.disk is not None
    before = files(kv)
    kv.forget("a")
    assert work_disk(kv).count("remove") == 3 and files(kv) == before - 3
    kv.check()


def test_a_file_that_is_wanted_again_stays() -> None:
    kv = make_tables(8, num_places=16, disk_files=100).kv
    grow(kv, 1, 2, mark="a")
    kv.save()
    written = kv.take_disk_ops()
    kv.forget("a")
    grow(kv, 1, 2)
    kv.save()
    for op in written:
        kv.disk_done(DiskDone("write", op.key, None, 0.1))
    work_disk(kv)
    assert (files(kv), known(kv, 1, 2)) == (2, 2)
    kv.check()


def test_all_chains_of_a_mark_go_and_those_of_a_short_sequence_are_none() -> None:
    kv = make_tables(16).kv
    grow(kv, 1, 2, mark="a")
    grow(kv, 3, 4, mark="a")
    grow(kv, mark="a")
    kv.forget("a")
    assert (kv.tree.num_nodes, kv.pool.num_free) == (0, 16)


def test_a_file_that_another_mark_has_too_stays() -> None:
    kv = make_tables(4, num_places=16, disk_files=200).kv
    grow(kv, 1, 2, mark="a")
    grow(kv, 1, 3, mark="b")
    kv.save()
    work_disk(kv)
    for i in range(10, 30):
        grow(kv, i, i, i, i)
        work_disk(kv)
    assert known(kv, 1) == 0
    before = files(kv)
    kv.forget("a")
    assert work_disk(kv) == ["remove"] and files(kv) == before - 1
    kv.check()
    kv.forget("b")
    assert work_disk(kv) == ["remove"] * 2
    kv.check()


def test_files_that_have_gone_are_not_remembered() -> None:
    """Of ever new responses, on a disk that holds ten blocks."""
    kv = make_tables(2, num_places=4, disk_files=10).kv
    for i in range(600):
        grow(kv, i, 1, mark=f"response {i}")
        work_disk(kv)
        kv.check()
        assert kv._marks._num_files <= 2 * 10 + 66
    assert 0 < len(kv._marks._files) <= 86
    last = next(reversed(kv._marks._files))
    assert all(map(kv._marks._is_file, kv._marks._files[last]))


@pytest.mark.parametrize("seed", range(4))
def test_random_sequences_marks_and_deletions(seed: int) -> None:
    """Nothing that runs is taken; what only deleted ones have used is nowhere, in no tier."""
    rng = random.Random(seed)
    kv = make_tables(24, num_places=10, disk_files=30 if seed % 2 else 0).kv
    live: list[Running] = []
    names = [f"m{i}" for i in range(6)]
    for number in range(1500):
        what = rng.random()
        if what < 0.15:
            kv.forget(rng.choice(names))
        elif what < 0.2:
            kv.unmark(rng.choice(names))
        elif live and (what < 0.55 or len(live) > 4):
            kv.release(*live.pop(rng.randrange(len(live))))
        else:
            blocks = [rng.randrange(3) for _ in range(rng.randint(1, 6))]
            live.append(start(kv, *blocks, mark=rng.choice(["", *names])))
        for running in live:
            path = running.node.path()
            assert [node.block for node in path] == running.owned
        if kv.disk is not None and rng.random() < 0.5:
            kv.save()
            work_disk(kv)
        kv.take_copies()
        kv.step += 1
        if number % 25 == 0:
            kv.check()
    for running in live:
        kv.release(*running)
    kv.shrink()
    for name in names:
        kv.forget(name)
    work_disk(kv)
    kv.check()
    assert kv._marks._nodes == {} and kv._marks._files == {} and kv._marks._num_files == 0
    assert not kv._marks._num_marks


@pytest.mark.parametrize("seed", range(3))
def test_all_marked_and_all_deleted_is_an_empty_cache(seed: int) -> None:
    rng = random.Random(seed)
    kv = make_tables(64, num_places=20).kv
    for i in range(60):
        grow(kv, *[rng.randrange(3) for _ in range(rng.randint(1, 5))], mark=str(i))
        kv.take_copies()
    for i in rng.sample(range(60), 60):
        kv.forget(str(i))
        kv.check()
    assert (kv.tree.num_nodes, kv.pool.num_free, kv.stats().host_cached) == (0, 64, 0)

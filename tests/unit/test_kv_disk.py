"""The disk tier as the control plane sees it: names, budget, and blocks on their way from there."""

from __future__ import annotations

import random
from collections import deque

import pytest
from fakes import ManualClock, make_tables

from quantd.daemon.kv.cache import KvCache
from quantd.daemon.kv.disk import FIRST_REST_SECONDS, DiskIndex, chain, digest_of
from quantd.daemon.kv.namespace import Namespace
from quantd.daemon.kv.tree import KEY_BYTES, Node, Root, encode
from quantd.daemon.types import BLOCK_TOKENS, DiskDone, DiskOp

HERE = Namespace(revision="r")


def name_of(i: int) -> bytes:
    return i.to_bytes(32, "big")


def index(budget: int, *names: int, file_bytes: int = 1) -> DiskIndex:
    disk = DiskIndex(budget, ManualClock(100.0))
    disk.open(map(name_of, names), file_bytes)
    return disk


def ops(disk: DiskIndex) -> list[tuple[str, int]]:
    done = [(op.kind, int.from_bytes(op.key, "big")) for op in disk.ops]
    disk.ops = []
    return done


# --- names ----------------------------------------------------------------------------------------


def test_a_name_is_made_of_all_that_comes_before() -> None:
    kv = make_tables(4).kv
    node = grow(kv, 1, 2, 3)
    name = HERE.digest()
    for block in (1, 2, 3):
        name = chain(name, key_of(block))
        assert len(name) == 32
    assert digest_of(node) == name == node.digest
    for above in node.path():
        assert above.digest == digest_of(above)


# --- the index ------------------------------------------------------------------------------------


def test_before_the_folder_was_looked_through_there_is_nothing() -> None:
    disk = DiskIndex(100)
    assert (disk.is_open, disk.capacity, len(disk), disk.may_write) == (False, 0, 0, False)
    assert not disk.write(name_of(1), 0) and not disk.ops


def test_the_budget_is_in_bytes_and_is_used_up() -> None:
    disk = index(39, file_bytes=10)
    assert disk.capacity == 3
    for i in range(3):
        assert disk.write(name_of(i), i)
        disk.written(name_of(i), None)
    assert len(disk) == 3
    assert disk.write(name_of(3), 3)
    assert ops(disk)[-2:] == [("write", 3), ("remove", 0)]
    assert not index(9, file_bytes=10).write(name_of(1), 0), "not even one"


def test_a_folder_over_the_budget_loses_the_oldest() -> None:
    disk = index(2, 1, 2, 3, 4)
    assert ops(disk) == [("remove", 1), ("remove", 2)]
    assert [name_of(i) in disk for i in (1, 2, 3, 4)] == [False, False, True, True]


def test_what_is_read_is_newer_than_what_is_not() -> None:
    disk = index(3, 1, 2, 3)
    disk.read(name_of(1), 0)
    disk.write(name_of(4), 1)
    assert ops(disk) == [("read", 1), ("write", 4), ("remove", 2)]


def test_what_is_being_written_is_known_and_neither_read_nor_removed() -> None:
    disk = index(2, 9)
    assert disk.write(name_of(1), 0) and not disk.write(name_of(1), 0)
    assert disk.knows(name_of(1)) and name_of(1) not in disk and len(disk) == 1
    for i in (2, 3):
        assert disk.write(name_of(i), i)
    assert ops(disk) == [("write", 1), ("write", 2), ("remove", 9), ("write", 3)]
    for i in (1, 2, 3):  # all at once were more than there is room for
        disk.written(name_of(i), None)
        disk.check()
    assert ops(disk) == [("remove", 1)] and len(disk) == 2


def test_a_file_that_is_made_anew_is_not_lost_when_the_old_one_cannot_be_read() -> None:
    disk = index(2, 1)
    disk.read(name_of(1), 0)
    disk.remove(name_of(1))
    assert disk.write(name_of(1), 1)
    disk.unreadable(name_of(1))
    disk.check()
    disk.written(name_of(1), None)
    assert name_of(1) in disk


def test_a_write_that_succeeds_ends_the_rest_and_the_next_failure_begins_another() -> None:
    clock = ManualClock()
    disk = DiskIndex(100, clock)
    disk.open((), 1)
    for i in range(4):
        assert disk.write(name_of(i), i)
    disk.written(name_of(0), "full")
    assert disk.rests and not disk.may_write
    disk.written(name_of(1), None)  # was on its way
    assert not disk.rests and disk.may_write
    clock.advance(FIRST_REST_SECONDS - 1)
    disk.written(name_of(2), "full")
    clock.advance(FIRST_REST_SECONDS - 1)
    assert disk.rests, "as long as the first"
    clock.advance(1)
    assert not disk.rests and not disk.may_write, "one more is on its way"
    disk.written(name_of(3), None)
    assert disk.may_write


# --- reading --------------------------------------------------------------------------------------


def key_of(*blocks: int) -> bytes:
    """One number a block."""
    return encode(token for block in blocks for token in [block] * BLOCK_TOKENS)


def names_of(*blocks: int) -> list[bytes]:
    names = [HERE.digest()]
    for block in blocks:
        names.append(chain(names[-1], key_of(block)))
    return names[1:]


def start(kv: KvCache, *blocks: int) -> tuple[Root, Node, list[int]]:
    key = key_of(*blocks)
    root, node, owned = kv.start(HERE, kv.match(HERE, key, len(blocks)))
    for i in range(len(owned), len(blocks)):
        new = kv.allocate(1)
        if new is None:
            break
        child = kv.insert(node, key[i * KEY_BYTES : (i + 1) * KEY_BYTES], new[0])
        assert child is not None
        node = child
        owned.append(node.block)
    return root, node, owned


def grow(kv: KvCache, *blocks: int) -> Node:
    root, node, owned = start(kv, *blocks)
    kv.release(root, node, owned)
    return node


def known(kv: KvCache, *blocks: int) -> int:
    return kv.match(HERE, key_of(*blocks), len(blocks)).num_blocks


def begin(kv: KvCache, *blocks: int) -> int | None:
    return kv.reads.begin(HERE, key_of(*blocks), len(blocks))


def with_files(*chains: tuple[int, ...], num_places: int = 16, num_blocks: int = 16) -> KvCache:
    kv = make_tables(num_blocks, num_places=num_places, disk_files=100).kv
    assert kv.disk is not None
    kv.disk.open(dict.fromkeys(name for blocks in chains for name in names_of(*blocks)), 1)
    return kv


def reads(kv: KvCache) -> list[bytes]:
    return [op.key for op in kv.take_disk_ops() if op.kind == "read"]


def answer(kv: KvCache, name: bytes, error: str | None = None, seconds: float = 0.1) -> set[int]:
    done = kv.disk_done(DiskDone("read", name, error, seconds))
    kv.check()
    return done


def test_what_is_read_is_known_and_told_with_its_last_block() -> None:
    kv = with_files((1, 2, 3))
    job = begin(kv, 1, 2, 3, 4)
    names = reads(kv)
    assert names == names_of(1, 2, 3)
    assert [answer(kv, name) for name in names] == [set(), set(), {job}]
    assert known(kv, 1, 2, 3, 4) == 3 and kv.num_moved["in", "disk"] == 3
    assert not kv.reads._jobs and not kv.reads.places()


def test_what_is_nearer_is_not_read() -> None:
    kv = with_files((1, 2, 3), (7,))
    grow(kv, 1)
    begin(kv, 1, 2, 3)
    assert reads(kv) == names_of(1, 2, 3)[1:]
    assert begin(kv, 1) is None and begin(kv, 8) is None


def test_where_nothing_is_read_nothing_stays() -> None:
    kv = with_files((1,))
    assert begin(kv, 9) is None and not kv.tree._roots
    begin(kv, 1)
    answer(kv, *names_of(1), error="gone")
    assert not kv.tree._roots and kv.disk is not None and len(kv.disk) == 0


def test_reading_is_weighed_against_computing() -> None:
    kv = with_files((1,), (2,))
    kv.cost.computed(1000, 1.0)
    begin(kv, 1)
    answer(kv, *reads(kv), seconds=BLOCK_TOKENS / 1000 + 0.001)
    assert begin(kv, 2) is None


def test_at_most_half_of_the_places_are_waited_for() -> None:
    kv = with_files((1, 2, 3, 4, 5), (6, 7, 8), num_places=8)
    assert begin(kv, 6) is not None and len(reads(kv)) == 1
    begin(kv, 1, 2, 3, 4, 5)
    assert len(reads(kv)) == 3
    assert begin(kv, 6, 7, 8) is not None, "it waits for what is read already"
    assert reads(kv) == []
    answer(kv, *names_of(6))
    assert begin(kv, 6, 7, 8) is not None and len(reads(kv)) == 1


def test_of_places_that_cannot_be_had_less_is_read() -> None:
    """The end of a chain is being written, and above it nothing may leave the host."""
    kv = with_files((8, 9), num_places=4, num_blocks=3)
    grow(kv, 1, 2, 3)
    kv.pool.release(kv.allocate(3) or ())
    assert kv.host is not None and kv.host.num_free == 1 and len(kv.writes.places()) == 1
    kv.take_disk_ops()
    job = begin(kv, 8, 9)
    assert reads(kv) == names_of(8)
    assert begin(kv, 8, 9) is not None and reads(kv) == []
    assert answer(kv, *names_of(8)) >= {job}
    assert known(kv, 8, 9) == 1


def test_what_was_computed_meanwhile_is_kept_and_what_is_behind_it_read() -> None:
    kv = with_files((1, 2, 3))
    begin(kv, 1, 2, 3)
    grow(kv, 1, 2)
    for name in reads(kv):
        answer(kv, name)
    match = kv.match(HERE, key_of(1, 2, 3), 3)
    assert (match.num_device, match.num_host) == (2, 1)
    assert kv.stats().host_cached == 1


def test_behind_a_block_that_is_gone_nothing_is_of_use() -> None:
    kv = with_files((1, 2, 3))
    begin(kv, 1, 2, 3)
    first, *others = reads(kv)
    answer(kv, first, error="gone")
    for name in others:
        answer(kv, name)
    assert known(kv, 1, 2, 3) == 0 and kv.stats().host_cached == 0


def test_what_is_given_up_before_the_rest_was_read_is_read_again() -> None:
    kv = with_files((1, 2, 3), num_places=8)
    begin(kv, 1, 2, 3)
    first, second, third = reads(kv)
    answer(kv, first)
    assert kv.host is not None
    places = [kv.take_place() for _ in range(6)]  # the first block's too
    assert known(kv, 1) == 0 and None not in places
    kv.host.release(place for place in places if place is not None)
    again = begin(kv, 1, 2, 3)
    assert reads(kv) == [first]
    assert answer(kv, second) == set()
    answer(kv, third)
    assert answer(kv, first) == {again}
    assert known(kv, 1, 2, 3) == 1


@pytest.mark.parametrize("seed", range(6))
def test_random_sequences_over_a_slow_and_failing_disk(seed: int) -> None:
    """Answers come late and in order; files vanish, writes fail, marks are deleted."""
    rng = random.Random(seed)
    num_places = rng.choice([2, 3, 4, 8, 16])
    kv = make_tables(12, num_places=num_places, disk_files=rng.choice([1, 3, 20])).kv
    assert kv.disk is not None and kv.host is not None
    kv.disk = DiskIndex(rng.choice([1, 3, 20]), clock := ManualClock())
    kv.disk.open((), 1)
    files: set[bytes] = set()
    sent: deque[DiskOp] = deque()
    live: list[tuple[Root, Node, list[int]]] = []
    jobs: set[int] = set()

    def work(num: int) -> None:
        kv.take_copies()
        sent.extend(kv.take_disk_ops())
        for _ in range(min(num, len(sent))):
            op = sent.popleft()
            error = "full" if op.kind == "write" and rng.random() < 0.1 else None
            if op.kind == "read" and op.key not in files:
                error = "gone"
            if op.kind == "remove":
                files.discard(op.key)
                continue
            files.add(op.key) if error is None else files.discard(op.key)
            jobs.difference_update(kv.disk_done(DiskDone(op.kind, op.key, error, 0.0)))
            kv.check()

    for _ in range(1500):
        what = rng.random()
        blocks = [rng.randrange(3) for _ in range(rng.randint(1, 6))]
        if what < 0.25 and live:
            kv.release(*live.pop(rng.randrange(len(live))), rng.choice(["", "m", "n"]))
        elif what < 0.5 and len(live) < 3:
            live.append(start(kv, *blocks))
        elif what < 0.65:
            job = begin(kv, *blocks)
            assert job not in jobs
            jobs |= {job} - {None}  # type: ignore[arg-type]
        elif what < 0.7:
            kv.forget(rng.choice("mn"))
        elif what < 0.75 and files:
            files.discard(rng.choice(sorted(files)))
        elif what < 0.8:
            kv.save()
        kv.step += 1
        clock.advance(rng.choice([0.0, 1.0]))
        work(rng.choice([0, 0, 1, 5]))
        kv.check()
    for running in live:
        kv.release(*running)
    work(1000)
    work(1000)
    assert not jobs and not kv.reads._jobs and not kv.reads._waits and not kv.writes.places()
    assert {name for name in files if not kv.disk.knows(name)} == set(), "a file nobody knows of"
    kv.shrink()
    work(1000)
    assert None not in [kv.take_place() for _ in range(num_places)], "a place that is stuck"
    assert kv.pool.num_free == 12 and not kv.tree._roots

"""KvCache: what is counted, what is measured, and that nothing that may go is ever stuck."""

from __future__ import annotations

from itertools import product

import pytest
from fakes import ManualClock, make_tables

from quantd.daemon.kv.cache import KvCache, Match
from quantd.daemon.kv.disk import DiskIndex, digest_of
from quantd.daemon.kv.namespace import Namespace
from quantd.daemon.kv.tree import KEY_BYTES, Node, Root, encode
from quantd.daemon.kv.window import Window
from quantd.daemon.types import BLOCK_TOKENS, DiskDone, StepResult

HERE = Namespace(revision="r")


def key_of(*blocks: int) -> bytes:
    """One number a block."""
    return encode(token for block in blocks for token in [block] * BLOCK_TOKENS)


def match_of(kv: KvCache, *blocks: int) -> Match:
    return kv.match(HERE, key_of(*blocks), len(blocks))


def start(kv: KvCache, *blocks: int) -> tuple[Root, Node, list[int]]:
    """A sequence of whole blocks, all computed."""
    key = key_of(*blocks)
    root, node, owned = kv.start(HERE, match_of(kv, *blocks))
    for i in range(len(owned), len(blocks)):
        (block,) = kv.allocate(1) or ()
        child = kv.insert(node, key[i * KEY_BYTES : (i + 1) * KEY_BYTES], block)
        assert child is not None
        node = child
        owned.append(node.block)
    return root, node, owned


def grow(kv: KvCache, *blocks: int) -> Node:
    """One that has run and gone."""
    root, node, owned = start(kv, *blocks)
    kv.release(root, node, owned)
    return node


def drive_out(kv: KvCache) -> None:
    """Everything that is cached leaves the device."""
    kv.pool.release(kv.allocate(kv.num_available) or ())


def spill(kv: KvCache, *blocks: int) -> None:
    grow(kv, *blocks)
    drive_out(kv)
    kv.take_copies()


# --- what a match says ----------------------------------------------------------------------------


def test_a_match_says_what_running_ones_own() -> None:
    kv = make_tables(8, num_places=8).kv
    spill(kv, 1, 2, 3, 4, 5)
    start(kv, 1, 2)
    grow(kv, 1, 2, 3)
    match = match_of(kv, 1, 2, 3, 4, 5)
    assert (match.num_device, match.num_host, match.num_used, match.num_blocks) == (3, 2, 2, 5)


@pytest.mark.parametrize("num_window", [1, 2, 3])
@pytest.mark.parametrize("trimmed", list(product([False, True], repeat=4)))
def test_one_goes_on_behind_the_last_whole_window(
    num_window: int, trimmed: tuple[bool, ...]
) -> None:
    kv = make_tables(8, window=Window(num_window * BLOCK_TOKENS, 0.5), capacity=16).kv
    _, node, owned = start(kv, 1, 2, 3, 4)
    for block, is_trimmed in zip(owned, trimmed, strict=True):
        assert not is_trimmed or kv.trim(block)
        assert not is_trimmed or not kv.trim(block), "it is trimmed already"
    most = max(n for n in range(5) if not any(trimmed[max(0, n - num_window) : n]))
    match = match_of(kv, 1, 2, 3, 4)
    assert (match.num_device, match.num_host, match.num_used) == (most, 0, most)
    assert kv.retreat(node, owned) is match.node and len(owned) == most
    kv.check()


def test_what_lies_on_the_host_alone_is_not_taken_over() -> None:
    """While its blocks are not worth fetching, a sequence computes them again."""
    kv = make_tables(8, num_places=8).kv
    spill(kv, 1, 2, 3)
    kv.cost.computed(100, 1e-6)
    kv.cost.copied(1, 1.0)
    root, node, owned = kv.start(HERE, match_of(kv, 1, 2, 3))
    assert (owned, kv.adopt_next(node, key_of(1))) == ([], None)
    kv.release(root, node, owned)
    assert grow(kv, 1, 2, 3).path() == match_of(kv, 1, 2, 3).node.path()  # type: ignore[union-attr]
    kv.check()


def test_of_what_is_not_known_nothing_is_used() -> None:
    kv = make_tables(8).kv
    assert match_of(kv, 1) == Match(None, 0, 0, 0, 0)
    start(kv, 1, 2)
    assert match_of(kv, 9, 2) == Match(None, 0, 0, 0, 0)


# --- counts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_saved", [False, True])
def test_moves_and_returns_are_counted_one_by_one(is_saved: bool) -> None:
    kv = make_tables(4, num_places=16, disk_files=10).kv
    for first in (1, 3):
        grow(kv, first, first + 1)
        if is_saved:
            assert kv.save()
        else:
            drive_out(kv)
        assert [copy.kind for copy in kv.take_copies()] == ["spill", "spill"]
        for op in kv.take_disk_ops():
            kv.disk_done(DiskDone("write", op.key, None, 0.1))
    drive_out(kv)
    assert kv.take_copies() == ()
    for first in (1, 3):
        root, node, owned = kv.start(HERE, match_of(kv, first, first + 1))
        kv.release(root, node, owned)
    counted = {("out", "host"): 4, ("in", "host"): 4, ("out", "disk"): 4, ("in", "disk"): 0}
    assert kv.num_moved == counted
    assert (kv.num_fetches, kv.num_recomputes) == (2, 0)
    drive_out(kv)
    kv.cost.computed(100, 1e-6)
    kv.cost.copied(1, 1.0)
    for first in (1, 3):
        grow(kv, first)
    grow(kv, 9)
    assert (kv.num_fetches, kv.num_recomputes) == (2, 2)
    stats = kv.stats()
    assert (stats.host_free, stats.host_cached) == (12, 4)
    assert (stats.disk_free, stats.disk_cached) == (6, 4)
    assert (stats.free, stats.used, stats.cached, stats.nodes) == (1, 0, 3, 5)


def test_a_disk_that_fails_counts_for_nothing_and_its_writes_neither() -> None:
    kv = make_tables(4, num_places=8, disk_files=10).kv
    grow(kv, 1, 2)
    kv.save()
    kv.take_copies()
    for op in kv.take_disk_ops():
        kv.disk_done(DiskDone("write", op.key, "full", 0.1))
    stats = kv.stats()
    assert (stats.disk_free, stats.disk_cached, stats.disk_problem) == (0, 0, "full")
    assert stats.moved_blocks["out_disk"] == 0


def test_without_tiers_their_counts_are_zero() -> None:
    stats = make_tables(4).kv.stats()
    assert (stats.host_free, stats.host_cached, stats.disk_free, stats.disk_cached) == (0, 0, 0, 0)


# --- what is measured -----------------------------------------------------------------------------


def result_of(step: int, seconds: float, copy_seconds: float) -> StepResult:
    return StepResult(step, (), (), seconds, copy_seconds)


@pytest.mark.parametrize(
    ("num_tokens", "num_sampled", "is_measured"),
    [(33, 1, True), (32, 0, True), (32, 1, False), (40, 10, False), (41, 10, False)]
    + [(50, 12, True), (100, 25, False), (101, 25, True)],
)
def test_a_step_says_what_a_token_costs_if_it_is_mostly_prompts(
    num_tokens: int, num_sampled: int, is_measured: bool
) -> None:
    kv = make_tables(4).kv
    kv.done(result_of(1, 3.0, 1.0), num_tokens, num_sampled)
    assert kv.cost.token_seconds == (2.0 / num_tokens if is_measured else None)
    assert kv.cost.fetch_seconds is None


def test_a_step_with_a_fetch_says_what_copying_a_block_costs() -> None:
    kv = make_tables(2, num_places=8).kv
    grow(kv, 1, 2)
    drive_out(kv)
    kv.step = 1
    assert {copy.kind for copy in kv.take_copies()} == {"spill"}
    kv.done(result_of(1, 1.0, 1.0), 0, 0)
    assert kv.cost.fetch_seconds is None, "a GPU does not wait for spills"
    grow(kv, 3)
    kv.step = 2
    kv.start(HERE, match_of(kv, 1, 2))  # two fetches, and a spill for their room
    assert sorted(copy.kind for copy in kv.take_copies()) == ["fetch", "fetch", "spill"]
    kv.done(result_of(2, 1.0, 0.75), 0, 0)
    assert kv.cost.fetch_seconds == 0.25
    kv.done(result_of(3, 1.0, 9.0), 0, 0)
    assert kv.cost.fetch_seconds == 0.25


# --- nothing is stuck, nothing goes that is in use ------------------------------------------------


def test_what_was_given_back_can_be_given_up() -> None:
    kv = make_tables(4, num_places=4).kv
    root, node, owned = start(kv, 1, 2)
    assert node.parent is not None
    kv.give_back(node)
    owned.pop()
    assert kv.allocate(3) is not None and kv.allocate(1) is None
    assert match_of(kv, 1, 2).num_device == 1
    kv.release(root, node.parent, owned)


def test_a_new_budget_gives_up_no_more_than_it_must() -> None:
    kv = make_tables(8).kv
    for first in (1, 2, 3):
        grow(kv, first, first)
    kv.resize(4)
    assert (kv.pool.num_free, kv.pool.num_cached) == (0, 4)
    assert [match_of(kv, n, n).num_blocks for n in (1, 2, 3)] == [0, 2, 2]
    kv.resize(8)
    assert kv.pool.num_cached == 4


def test_every_host_place_can_be_had_again() -> None:
    """Whatever became of a copy: spilled, fetched, taken over, with something below it or not."""
    kv = make_tables(3, num_places=5, disk_files=9).kv
    assert kv.host is not None
    for blocks in ((1, 2, 3), (1, 4), (5,), (1, 2, 3), (1, 4, 6)):
        grow(kv, *blocks)
        drive_out(kv)
        kv.take_copies()
        for op in kv.take_disk_ops():
            kv.disk_done(DiskDone("write", op.key, None, 0.1))
        grow(kv, *blocks[:2])
        kv.check()
    places = [kv.take_place() for _ in range(5)]
    assert None not in places and kv.take_place() is None
    kv.host.release(place for place in places if place is not None)
    kv.check()


def test_places_of_what_was_fetched_can_be_had_at_once() -> None:
    """While they were fetched from, room was made and they were looked at in vain."""
    kv = make_tables(2, num_places=2).kv
    spill(kv, 1, 2)
    grow(kv, 3, 4)
    root, node, owned = kv.start(HERE, match_of(kv, 1, 2))
    assert kv.stats().host_cached == 2
    assert None not in [kv.take_place(), kv.take_place()]
    kv.release(root, node, owned)


def test_a_copy_of_what_is_on_the_device_goes_from_the_host_with_its_children_there() -> None:
    kv = make_tables(3, num_places=2).kv
    spill(kv, 1, 2)
    root, node, owned = kv.start(HERE, match_of(kv, 1))
    assert (len(owned), kv.stats().host_cached) == (1, 2)
    places = [kv.take_place(), kv.take_place()]
    assert None not in places, "also that of a trunk which is on the device"
    assert match_of(kv, 1, 2).num_blocks == 1
    kv.release(root, node, owned)


def test_what_failed_leaves_what_others_use() -> None:
    kv = make_tables(8).kv
    other = start(kv, 1, 2)
    root, node, owned = start(kv, 1, 2, 3)
    kv.release(root, node, owned)
    kv.discard(node)
    assert match_of(kv, 1, 2, 3).num_blocks == 2
    kv.check()
    kv.release(*other)
    kv.discard(other[1])
    assert (match_of(kv, 1).num_blocks, kv.tree.num_nodes, len(kv.tree._roots)) == (0, 0, 0)


def test_what_failed_stays_where_something_goes_on_behind_it() -> None:
    kv = make_tables(4, num_places=4).kv
    spill(kv, 1, 2)
    root, node, owned = kv.start(HERE, match_of(kv, 1))
    kv.release(root, node, owned)
    kv.discard(node)
    kv.check()
    assert match_of(kv, 1, 2).num_blocks == 2


def test_what_failed_is_gone_from_the_host_and_from_disk() -> None:
    kv = make_tables(4, num_places=16, disk_files=9).kv
    grow(kv, 1, 2)
    kv.save()
    kv.take_copies()
    for op in kv.take_disk_ops():
        kv.disk_done(DiskDone("write", op.key, None, 0.1))
    root, node, owned = start(kv, 1, 2)
    kv.release(root, node, owned)
    kv.discard(node)
    assert [op.kind for op in kv.take_disk_ops()] == ["remove", "remove"]
    assert kv.disk is not None and len(kv.disk) == 0 and kv.stats().host_cached == 0
    kv.check()


def test_a_sequence_without_a_whole_block_leaves_nothing() -> None:
    kv = make_tables(4).kv
    for i in range(10):
        root, node, owned = kv.start(Namespace(revision="r", salt=str(i)), Match(None, 0, 0, 0))
        kv.release(root, node, owned, "m")
    assert not kv.tree._roots and root.marks is None
    kv.forget("m")
    other = Namespace(revision="r", alone=1)
    kv.drop(kv.tree.root(other))
    assert not kv.tree._roots


# --- saving ---------------------------------------------------------------------------------------


def test_nothing_is_saved_that_is_there_or_cannot_be_used() -> None:
    kv = make_tables(8, num_places=32, disk_files=20, window=Window(16, 0.5), capacity=16).kv
    assert kv.disk is not None
    known, trimmed, _ = (node for node in grow(kv, 1, 2, 3).path())
    kv.pool.retain((trimmed.block,))
    kv.trim(trimmed.block)
    kv.pool.release((trimmed.block,))
    kv.disk.open([digest_of(known)], 1)
    assert kv.save()
    assert len(kv.take_copies()) == 1 + 1  # the third one's, and the trim
    assert [op.kind for op in kv.take_disk_ops()] == ["write"]


def test_a_quarter_of_the_places_may_wait_for_the_disk() -> None:
    kv = make_tables(16, num_places=8, disk_files=20).kv
    grow(kv, *range(10))
    assert kv.save()
    assert sum(op.kind == "write" for op in kv.take_disk_ops()) == 2
    kv.take_copies()
    drive_out(kv)
    assert kv.take_disk_ops() == ()


def test_what_is_dropped_of_the_unsaved_is_only_what_is_gone() -> None:
    kv = make_tables(128, num_places=16, disk_files=400).kv
    kv.disk = DiskIndex(400, ManualClock())
    kv.disk.open((), 1)
    grow(kv, 1, 2)
    spilled = grow(kv, 3)
    for i in range(200):
        root, node, owned = start(kv, 100 + i)
        kv.release(root, node, owned)
        kv.discard(node)
    kept = {node.depth for node in kv.writes._unsaved if node.block >= 0}
    assert kept == {1, 2} and spilled in kv.writes._unsaved
    assert len(kv.writes._unsaved) <= 2 * kv.tree.num_nodes + 66

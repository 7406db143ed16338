"""PrefixTree and KvCache: what is found, what is given up, and in which order."""

from __future__ import annotations

import random

import pytest
from fakes import ManualClock, make_request, make_tables

from quantd.daemon.kv.cache import KvCache
from quantd.daemon.kv.disk import FIRST_REST_SECONDS, LONGEST_REST_SECONDS, DiskIndex
from quantd.daemon.kv.lru import LruQueue
from quantd.daemon.kv.namespace import Namespace
from quantd.daemon.kv.tree import KEY_BYTES, STRIDE, Node, PrefixTree, encode
from quantd.daemon.scheduler.deadlines import Deadlines
from quantd.daemon.scheduler.sequence import Sequence
from quantd.daemon.types import BLOCK_TOKENS, DiskDone

HERE = Namespace(revision="r")


def key_of(*blocks: int) -> bytes:
    """One number a block."""
    return encode(token for block in blocks for token in [block] * BLOCK_TOKENS)


def grow(kv: KvCache, *blocks: int, namespace: Namespace = HERE) -> Node:
    """A sequence of whole blocks that has run and gone."""
    key = key_of(*blocks)
    root, node, owned = kv.start(namespace, kv.match(namespace, key, len(blocks)))
    for i in range(len(owned), len(blocks)):
        new = kv.allocate(1)
        assert new is not None
        owned += new
        node = kv.insert(node, key[i * KEY_BYTES : (i + 1) * KEY_BYTES], new[0])
    kv.release(root, node, owned)
    kv.check()
    return node


def known(kv: KvCache, *blocks: int, namespace: Namespace = HERE) -> int:
    return kv.match(namespace, key_of(*blocks), len(blocks)).num_blocks


def test_a_match_is_the_longest_known_beginning() -> None:
    kv = make_tables(16).kv
    grow(kv, 1, 2, 3)
    grow(kv, 1, 2, 4)
    assert [known(kv, *b) for b in ((1, 2, 3), (1, 2, 4, 5), (1, 9), (2, 3), (1,))] == [
        3,
        3,
        1,
        0,
        1,
    ]
    assert (kv.pool.num_cached, kv.tree.num_nodes) == (4, 4)


@pytest.mark.parametrize("length", [STRIDE - 1, STRIDE, STRIDE + 1, 3 * STRIDE + 5])
def test_milestones_change_nothing_but_the_time(length: int) -> None:
    kv = make_tables(2 * length).kv
    blocks = [i % 7 for i in range(length)]
    grow(kv, *blocks)
    for cut in (1, STRIDE - 1, STRIDE, length - 1, length):
        if cut < length:
            assert known(kv, *blocks[:cut], 99) == cut
        assert known(kv, *blocks[:cut]) == min(cut, length)
    kv.shrink()
    assert (kv.tree.num_nodes, kv.pool.num_free) == (0, 2 * length)
    kv.check()


@pytest.mark.parametrize(
    "other",
    [
        Namespace(revision="s"),
        Namespace(revision="r", precision_epoch=1),
        Namespace(revision="r", adapter=b"x"),
        Namespace(revision="r", salt="x"),
        Namespace(revision="r", rope="x"),
        Namespace(revision="r", media=((3, b"x"),)),
        Namespace(revision="r", media=((4, b"x"),)),
        Namespace(revision="r", media=((3, b"y"),)),
    ],
)
def test_no_field_of_a_namespace_can_be_taken_for_another(other: Namespace) -> None:
    kv = make_tables(8).kv
    grow(kv, 1, 2)
    assert known(kv, 1, 2, namespace=other) == 0
    grow(kv, 1, 2, namespace=other)
    assert (known(kv, 1, 2), known(kv, 1, 2, namespace=other)) == (2, 2)
    salted = [Namespace(revision="r", salt="x"), Namespace(revision="r", adapter=b"x")]
    digests = {HERE.digest(), other.digest(), *(n.digest() for n in salted)}
    assert len(digests) == len({HERE, other, *salted})


def test_leaves_go_first_and_the_oldest_of_them() -> None:
    kv = make_tables(5).kv
    grow(kv, 1, 2, 3)
    grow(kv, 1, 4)
    grow(kv, 1, 2, 3)  # is newer than 4 now
    kept = []
    while kv.pool.num_cached:
        assert kv.allocate(kv.pool.num_free + 1) is not None
        kv.check()
        kept.append((known(kv, 1, 2, 3), known(kv, 1, 4)))
    # 4 goes first; then the deepest of the other chain, and the trunk last.
    assert kept == [(3, 1), (2, 1), (1, 1), (0, 0)]


def test_another_order_of_age_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: with ages upside down the newest one goes, which the test above would see."""
    add = LruQueue.add

    def upside_down(self: LruQueue, node: Node) -> None:
        node.last_used = -abs(node.last_used)
        add(self, node)

    monkeypatch.setattr(LruQueue, "add", upside_down)
    with pytest.raises(AssertionError):
        test_leaves_go_first_and_the_oldest_of_them()


def test_a_trunk_is_not_given_up_under_a_running_child() -> None:
    kv = make_tables(4).kv
    grow(kv, 1, 2)
    root, node, blocks = kv.start(HERE, kv.match(HERE, key_of(1, 2), 2))
    assert kv.allocate(3) is None
    assert known(kv, 1, 2) == 2
    kv.release(root, node, blocks)
    assert kv.allocate(4) is not None
    assert known(kv, 1) == 0


def test_salts_leave_nothing_behind() -> None:
    kv = make_tables(4).kv
    for i in range(50):
        grow(kv, 1, 2, namespace=Namespace(revision="r", salt=str(i)))
    kv.shrink()
    assert len(kv.tree._roots) == 0


def test_what_was_spilled_comes_back_and_the_copy_stays() -> None:
    kv = make_tables(3, num_places=4).kv
    grow(kv, 1, 2)
    taken = kv.allocate(3)
    assert taken is not None
    spilled = kv.take_copies()
    assert [copy.kind for copy in spilled] == ["spill", "spill"]
    kv.pool.release(taken)
    match = kv.match(HERE, key_of(1, 2), 2)
    assert (match.num_device, match.num_host) == (0, 2)
    root, node, blocks = kv.start(HERE, match)
    copies = kv.take_copies()
    assert [(c.kind, c.dst) for c in copies] == [("fetch", block) for block in blocks]
    places = {copy.dst for copy in spilled}
    assert {copy.src for copy in copies} == places
    kv.release(root, node, blocks)
    kv.check()
    assert kv.allocate(3) is not None
    assert kv.take_copies() == (), "the host still has them"


def test_what_makes_room_for_a_fetch_does_not_take_the_places_it_comes_from() -> None:
    kv = make_tables(2, num_places=2).kv
    grow(kv, 1, 2)
    grow(kv, 3, 4)
    assert known(kv, 1, 2) == 2, "on the host"
    kv.take_copies()
    root, node, blocks = kv.start(HERE, kv.match(HERE, key_of(1, 2), 2))
    assert [copy.kind for copy in kv.take_copies()] == ["fetch", "fetch"]
    assert (node.path(), known(kv, 3, 4)) == ([node.parent, node], 0)
    kv.release(root, node, blocks)
    kv.check()


def test_a_copy_to_write_to_is_of_bytes_that_are_there() -> None:
    kv = make_tables(4).kv
    kv.step = 1
    node = grow(kv, 1)
    assert kv.copy_on_write(node) is None, "copies come before what this plan computes"
    kv.step = 2
    assert kv.copy_on_write(node) is not None


def test_without_a_place_it_is_gone_with_all_below() -> None:
    kv = make_tables(4, num_places=1).kv
    grow(kv, 1, 2, 3)
    kv.allocate(4)
    kv.check()
    # One place: the trunk took it from its own children, which nobody could use without it.
    assert known(kv, 1, 2, 3) == 1


def test_fetching_is_weighed_against_computing() -> None:
    kv = make_tables(2, num_places=4).kv
    grow(kv, 1, 2)
    taken = kv.allocate(2)
    assert taken is not None
    kv.pool.release(taken)
    kv.cost.computed(1000, 1.0)
    kv.cost.copied(1, 1.0)
    match = kv.match(HERE, key_of(1, 2), 2)
    assert (match.num_host, match.num_spurned) == (0, 2)
    grow(kv, 1, 2)
    assert (kv.num_recomputes, kv.num_fetches) == (1, 0)
    assert known(kv, 1, 2) == 2


def test_a_smaller_budget_takes_effect_as_blocks_come_back() -> None:
    kv = make_tables(8, capacity=16).kv
    grow(kv, 1, 2, 3)
    taken = kv.allocate(4)
    assert taken is not None
    kv.resize(2)
    assert (kv.pool.num_free, kv.pool.num_cached) == (-2, 0)
    assert kv.allocate(1) is None
    kv.pool.release(taken)
    assert kv.pool.num_free == 2
    kv.resize(16)
    assert kv.allocate(16) is not None
    kv.check()


@pytest.mark.parametrize(
    "count", [4000, pytest.param(1_000_000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])]
)
def test_many_random_operations_against_a_plain_oracle(count: int) -> None:
    """Every sequence finds at least what a dictionary of live prefixes says it must."""
    rng = random.Random(5)
    kv = make_tables(40, num_places=12).kv
    live: list[tuple[object, Node, list[int], list[int]]] = []
    for _ in range(count):
        if live and (rng.random() < 0.45 or len(live) > 6):
            root, node, owned, blocks = live.pop(rng.randrange(len(live)))
            kv.release(root, node, owned)  # type: ignore[arg-type]
        else:
            blocks = [rng.randrange(3) for _ in range(rng.randint(1, 6))]
            key = key_of(*blocks)
            match = kv.match(HERE, key, len(blocks))
            must = max(
                (_common(blocks, theirs) for *_, theirs in live),
                default=0,
            )
            assert match.num_device >= must, "what runs is there"
            root, node, owned = kv.start(HERE, match)
            for i in range(len(owned), len(blocks)):
                new = kv.allocate(1)
                if new is None:
                    break
                node = kv.insert(node, key[i * KEY_BYTES : (i + 1) * KEY_BYTES], new[0])
                owned.append(node.block)
            live.append((root, node, owned, blocks[: len(owned)]))
        if rng.random() < 200 / count:
            kv.check()
        kv.step += 1
        kv.take_copies()
    for root, node, owned, _ in live:
        kv.release(root, node, owned)  # type: ignore[arg-type]
    kv.check()
    assert kv.pool.num_used == 0
    kv.shrink()
    assert kv.pool.num_free == 40


def _common(a: list[int], b: list[int]) -> int:
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return n


def test_a_long_match_takes_few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not timed: counted. 128k tokens are 8,192 blocks, found in 128 steps."""
    tree, steps = PrefixTree(), 0
    node: Node = tree.root(HERE)
    length = 8192
    key = encode(range(length * BLOCK_TOKENS))
    for i in range(length):
        node = tree.add(node, key[i * KEY_BYTES : (i + 1) * KEY_BYTES])
        node.block = i
        assert node.parent is not None
        node.parent.num_device_children += 1
    original = Node.child

    def counted(self: Node, key: bytes) -> Node | None:
        nonlocal steps
        steps += 1
        return original(self, key)

    monkeypatch.setattr(Node, "child", counted)
    assert tree.find(HERE, key, length) is node
    assert steps == 0, "the last stride ends at a milestone"
    assert tree.find(HERE, key, length - 1) is node.parent
    assert steps == STRIDE - 1


def chain_of(tree: PrefixTree, length: int) -> list[Node]:
    """The root and what is below it, one block each."""
    nodes: list[Node] = [tree.root(HERE)]
    for i in range(length):
        nodes.append(tree.add(nodes[-1], key_of(i)))
    return nodes


@pytest.mark.parametrize("length", [1, STRIDE - 1, STRIDE, STRIDE + 1, 5 * STRIDE, 5 * STRIDE + 9])
def test_climbing_finds_the_deepest_in_few_steps(length: int) -> None:
    nodes = chain_of(PrefixTree(), length)
    for deepest in range(length + 1):
        asked: list[Node] = []

        def holds(node: Node, deepest: int = deepest, asked: list[Node] = asked) -> bool:
            asked.append(node)
            return node.depth <= deepest

        assert nodes[-1].climb(holds) is nodes[deepest]
        assert len(asked) <= 2 * (2 * STRIDE + 5)


def test_a_milestone_goes_with_its_node() -> None:
    tree = PrefixTree()
    key = key_of(*range(STRIDE + 6))
    nodes = chain_of(tree, STRIDE + 6)
    for node in reversed(nodes[STRIDE - 3 :]):
        tree.remove(node)
    assert tree.find(HERE, key, STRIDE + 6) is nodes[STRIDE - 4]
    for depth in range(STRIDE - 4, STRIDE + 6):
        nodes[depth + 1 :] = [tree.add(nodes[depth], key_of(depth))]
    assert tree.find(HERE, key, STRIDE + 6) is nodes[-1]
    assert tree.find(HERE, key, STRIDE) is nodes[STRIDE]


def test_a_namespace_that_somebody_works_in_stays() -> None:
    tree = PrefixTree()
    root = tree.root(HERE)
    root.num_users = 1
    tree.forget_root(root)
    assert tree.root(HERE) is root
    root.num_users = 0
    tree.forget_root(root)
    assert tree.root(HERE) is not root


# --- the disk's index -----------------------------------------------------------------------------


def name_of(i: int) -> bytes:
    return i.to_bytes(32, "big")


def test_after_a_failed_write_the_disk_rests_longer_and_longer() -> None:
    clock = ManualClock(1000.0)
    disk = DiskIndex(100, clock)
    disk.open((), 1)
    assert disk.write(name_of(0), 0) and disk.write(name_of(1), 1)
    disk.written(name_of(0), "No space left")
    disk.written(name_of(1), "No space left")  # was on its way: the rest is no longer for it
    assert disk.problem == "No space left" and len(disk) == 0
    seconds = FIRST_REST_SECONDS
    for i in range(2, 12):
        clock.advance(seconds - 0.5)
        assert not disk.write(name_of(i), 0), "it rests"
        clock.advance(0.5)
        assert disk.write(name_of(i), 0), "one file, to see"
        assert not disk.write(name_of(100 + i), 0), "but only one"
        disk.written(name_of(i), "Input/output error")
        seconds = min(2 * seconds, LONGEST_REST_SECONDS)
        disk.check()
    clock.advance(LONGEST_REST_SECONDS)
    assert disk.write(name_of(50), 0)
    disk.written(name_of(50), None)
    assert disk.problem is None and name_of(50) in disk
    assert disk.write(name_of(51), 0) and disk.write(name_of(52), 0)
    disk.written(name_of(51), "again")
    clock.advance(FIRST_REST_SECONDS)
    assert disk.may_write is False, "one is still on its way"
    disk.written(name_of(52), None)
    assert disk.may_write


def answer_writes(kv: KvCache, error: str | None) -> int:
    """As the worker does; how many there were."""
    kv.take_copies()
    writes = [op for op in kv.take_disk_ops() if op.kind == "write"]
    for op in writes:
        kv.disk_done(DiskDone("write", op.key, error, 0.1))
    return len(writes)


def test_a_disk_that_rests_holds_on_to_nothing_and_saves_again_afterwards() -> None:
    clock = ManualClock()
    kv = make_tables(8, num_places=16).kv
    kv.disk = DiskIndex(100, clock)
    kv.disk.open((), 1)
    grow(kv, 1, 2)
    assert kv.save() and answer_writes(kv, "No space left") == 2
    grow(kv, 3, 4)
    assert not kv.save() and kv.writes.num_unsaved == 0
    clock.advance(FIRST_REST_SECONDS)
    grow(kv, 5, 6)
    assert kv.save() and answer_writes(kv, None) == 1, "one, to see"
    assert kv.disk.problem is None
    grow(kv, 7, 8)
    assert kv.save() and answer_writes(kv, None) == 3, "with what had to wait for it"
    kv.check()


def test_an_engine_that_never_rests_forgets_what_it_did_not_save() -> None:
    kv = make_tables(4, num_places=2, disk_files=3).kv
    for i in range(1000):
        grow(kv, i % 900, i % 7, 5)
        answer_writes(kv, None)
    assert kv.writes.num_unsaved <= 2 * kv.tree.num_nodes + 65


def test_deadlines_of_requests_that_are_gone_are_forgotten() -> None:
    deadlines = Deadlines()
    first = Sequence(0, make_request([1], deadline=1e6))
    deadlines.add(first)
    for i in range(1, 5000):
        seq = Sequence(i, make_request([1], deadline=1e6 + i))
        deadlines.add(seq)
        deadlines.remove(seq)
    assert len(deadlines._heap) <= 2 + 65
    assert deadlines.due(2e6) == [first]

"""The KV blocks of one model over their tiers: what is kept, what is given up, what comes back."""

from __future__ import annotations

from typing import NamedTuple

from quantd.daemon.kv.cost import CostModel
from quantd.daemon.kv.disk import DiskIndex, digest_of
from quantd.daemon.kv.lru import LruQueue
from quantd.daemon.kv.marks import Marks
from quantd.daemon.kv.namespace import Namespace
from quantd.daemon.kv.pool import BlockPool
from quantd.daemon.kv.reading import DiskReads
from quantd.daemon.kv.stats import DIRECTIONS, KvStats
from quantd.daemon.kv.tree import NONE, Node, PrefixTree, Root
from quantd.daemon.kv.window import NO_WINDOW, Window
from quantd.daemon.kv.writing import DiskWrites
from quantd.daemon.types import BlockCopy, DiskDone, DiskOp, StepResult

_MEASURED_TOKENS = 32
"""Of prompts in a step, for its time to say what computing costs."""


class Match(NamedTuple):
    """What is there of a sequence's first blocks. A look: it holds nothing."""

    node: Node | None
    num_device: int
    """Blocks on the device; `num_host` more follow them on the host."""
    num_host: int
    num_used: int
    """Of the device's, those that running sequences own: using them takes no room."""
    num_spurned: int = 0
    """Blocks on the host that are cheaper to compute again; not counted above."""

    @property
    def num_blocks(self) -> int:
        return self.num_device + self.num_host


class KvCache:
    """Block pool, prefix tree, host places and disk index of one model.

    Running sequences own blocks in the pool; the tree holds what is full, and keeps it when the
    owners are gone. When blocks are needed, the least recently used leaf of the device goes: to
    the host if there is a place, else for good. Whoever owns a block owns all above it, so nothing
    is taken from under a running sequence. A host place is kept when its block comes back, and
    may be given up at any time while the block is on the device.

    Ids only: what the worker has to move stands in `take_copies` and `take_disk_ops`, for the plan
    that is being made. Called by the scheduler, on the event loop.
    """

    def __init__(
        self,
        pool: BlockPool,
        host: BlockPool | None = None,
        disk: DiskIndex | None = None,
        block_bytes: int = 0,
        window: Window = NO_WINDOW,
    ) -> None:
        self.pool = pool
        self.window = window
        self.host = host
        self.disk = disk
        self.tree = PrefixTree()
        self._marks = Marks(lambda name: self.disk is not None and self.disk.knows(name))
        self.cost = CostModel()
        self.reads = DiskReads(self)
        self.writes = DiskWrites(self)
        self.step = 0
        """The plan that is being made."""
        self._block_bytes = block_bytes
        self._tick = 0
        self._device_queue = LruQueue(self._may_leave_device)
        self._host_queue = LruQueue(self._may_leave_host)
        self._copies: list[BlockCopy] = []
        self._sent: dict[int, int] = {}
        """Plan -> fetches and spills in it, for their time."""
        self._by_place: dict[int, Node] = {}
        self.num_moved = dict.fromkeys(DIRECTIONS, 0)
        self.num_fetches = self.num_recomputes = 0

    # --- blocks of sequences -----------------------------------------------------------------

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can give: the free ones and the cached."""
        return self.pool.num_available

    def allocate(self, n: int) -> list[int] | None:
        """`n` blocks with one owner each; cached ones are given up for them. None: there are not
        so many, though some that were cached may be gone."""
        while (blocks := self.pool.allocate(n)) is None:
            if not self._evict():
                return None
        return blocks

    def match(self, namespace: Namespace, key: bytes | bytearray, num_blocks: int) -> Match:
        """The longest known beginning, at most `num_blocks` blocks of it. Changes nothing."""
        node = self.tree.find(namespace, key, num_blocks)
        if node is None:
            return Match(None, 0, 0, 0)
        owners, num_spurned = self.pool.num_owners, 0
        on_device = node.climb(lambda node: node.block != NONE)
        if node is not on_device and not self.cost.fetch_is_cheaper():
            num_spurned, node = node.depth - on_device.depth, on_device
        node = self._continuable(node)
        if node.depth < on_device.depth:
            on_device = node
        num_used = on_device.climb(lambda node: owners(node.block) > 0).depth
        num_host = node.depth - on_device.depth
        return Match(node, on_device.depth, num_host, num_used, num_spurned)

    def _continuable(self, node: Node) -> Node:
        """The deepest node from here up whose last window is whole; the root if there is none."""
        if not self.pool.num_trimmed:
            return node
        found, num_whole, above = node, 0, node
        while above.parent is not None and num_whole < self.window.num_blocks:
            whole = above.block == NONE or not self.pool.is_trimmed(above.block)
            num_whole = num_whole + 1 if whole else 0
            found = found if whole else above.parent
            above = above.parent
        return found

    def retreat(self, node: Node, blocks: list[int]) -> Node:
        """Who owns `blocks`, which end with `node`'s, can go on behind the node that this gives;
        what lies below it is given back, and taken from `blocks`."""
        target = self._continuable(node)
        while node is not target:
            assert node.parent is not None
            blocks.pop()
            self.give_back(node)
            node = node.parent
        return target

    def start(self, namespace: Namespace, match: Match) -> tuple[Root, Node, list[int]]:
        """A sequence begins with what was matched: (root, deepest node, its blocks, owned).

        What lies on the host gets blocks and comes back by copies; when these run out, less.
        """
        root = self.tree.root(namespace)
        root.num_users += 1
        path = [] if match.node is None else match.node.path()  # of a root: nothing
        device, spilled = path[: match.num_device], path[match.num_device :]
        blocks = [node.block for node in device]
        self.pool.retain(blocks)
        last: Node = device[-1] if device else root
        if spilled:
            fetched = self._fetch(spilled)
            blocks += [node.block for node in fetched]
            last = self.retreat(fetched[-1] if fetched else last, blocks)
            self.num_fetches += 1
        self.num_recomputes += match.num_spurned > 0
        return root, last, blocks

    def adopt_next(self, node: Node, key: bytes) -> Node | None:
        """The child `key` on the device, with one owner more; None: compute it."""
        child = node.child(key)
        if child is None or child.block == NONE or self.pool.is_trimmed(child.block):
            return None
        self.pool.retain((child.block,))
        return child

    def trim(self, block: int) -> bool:
        """Give up what layers with a window hold of a block, which its only owner has left behind.
        False: it has other owners, or is trimmed already."""
        if self.pool.num_owners(block) != 1 or self.pool.is_trimmed(block):
            return False
        self.pool.trim(block)
        self._copies.append(BlockCopy("trim", block, block))
        return True

    def copy_on_write(self, node: Node) -> int | None:
        """A block of one's own with the bytes of `node`'s, to write to. None: there is none, or
        the bytes are not there before this plan's chunks run."""
        if node.step >= self.step:
            return None
        blocks = self.allocate(1)
        if blocks is None:
            return None
        self._copies.append(BlockCopy("cow", node.block, blocks[0]))
        return blocks[0]

    def insert(self, parent: Node, key: bytes, block: int) -> Node | None:
        """`block`, which the caller owns and this or an earlier plan computes, becomes known.

        When an equal one is known already, that one is returned, owned by the caller in place of
        `block`, which is given back. None: that one is trimmed, and somebody still works with it.
        """
        child = parent.child(key)
        if child is None:
            child = self.tree.add(parent, key)
        elif child.block != NONE:
            if not self.pool.is_trimmed(child.block):
                self.pool.retain((child.block,))
                self.pool.release((block,))
                return child
            if self.pool.num_owners(child.block):
                return None
            self.pool.unhold(child.block)
            parent.num_device_children -= 1
        self.writes.note(child)
        child.block, child.step = block, self.step
        self.pool.hold(block)
        parent.num_device_children += 1
        return child

    def give_back(self, node: Node) -> None:
        """One owner less for its block."""
        self.pool.release((node.block,))
        self._offer(node)

    def release(self, root: Root, node: Node, blocks: list[int], mark: str = "") -> None:
        """A sequence gives up its blocks; what the tree knows of them stays, as newest, and goes
        with `forget(mark)`."""
        self.pool.release(blocks)
        root.num_users -= 1
        if node is root:
            self.tree.forget_root(root)
            return
        self._tick += 1
        node.last_used = self._tick
        if mark:
            self._marks.put(node, mark)
        self._offer(node)

    def forget(self, mark: str) -> None:
        """Give up, in all tiers, what sequences of this mark have left and nobody else uses: no
        sequence that runs, no other mark, nothing that goes on behind it."""
        nodes, files = self._marks.take(mark)
        for node in nodes:
            if node.block != NONE or node.place != NONE:  # else it went with the one before
                self._give_up(node)
        if self.disk is not None:
            for name in files:
                self.disk.remove(name)

    def unmark(self, mark: str) -> None:
        """There will be no `forget` of this mark; its blocks stay as others do."""
        self._marks.take(mark)

    def _give_up(self, node: Node) -> None:
        """A leaf that nobody uses, and those above that are left so."""
        while node.parent is not None and node.is_leaf and not node.marks:
            if node.block != NONE and self.pool.num_owners(node.block):
                return
            parent = node.parent
            if self.disk is not None:
                self.disk.remove(digest_of(node))
            if node.block != NONE:
                self._leave_device(node)
            self._leave_host(node)
            node = parent

    def discard(self, node: Node) -> None:
        """Forget a node that must not be used, and those above that nobody else uses."""
        while node.parent is not None and node.is_leaf and self._may_leave_device(node):
            parent = node.parent
            if self.disk is not None:
                self.disk.remove(digest_of(node))
            self._leave_device(node)
            self._leave_host(node)
            node = parent

    def drop(self, root: Root) -> None:
        """Forget a namespace, which no sequence is at work in."""
        assert root.num_users == 0
        for node in reversed(list(self.tree.nodes(root))):
            if node.block != NONE:
                self._leave_device(node)
            self._leave_host(node)
        self.tree.forget_root(root)

    # --- size --------------------------------------------------------------------------------

    def resize(self, num_blocks: int) -> None:
        """How many blocks may be in use from now on. Cached ones go at once; what sequences own
        beyond it comes back as they end or are preempted."""
        self.pool.resize(min(num_blocks, self.pool.capacity))
        while self.pool.num_free < 0 and self._evict():
            pass

    def shrink(self) -> None:
        """Give up every block that no sequence owns."""
        while self._evict():
            pass

    def save(self) -> bool:
        """Begin to write to disk what is only in memory, as far as there are places for it. To be
        called when there is nothing else to do: leaves are given up first, so without it the
        beginnings, which a new process needs first, would reach the disk last. True: there are
        orders for a plan."""
        return self.writes.save() and self.has_orders

    # --- what the worker has to do -----------------------------------------------------------

    def take_copies(self) -> tuple[BlockCopy, ...]:
        """In order, for the plan that is being made."""
        copies, self._copies = tuple(self._copies), []
        if any(copy.kind == "fetch" for copy in copies):
            # Spills alone say nothing of what a fetch costs: a GPU does not wait for them.
            self._sent[self.step] = sum(copy.kind in ("spill", "fetch") for copy in copies)
        return copies

    def take_disk_ops(self) -> tuple[DiskOp, ...]:
        if self.disk is None or not self.disk.ops:
            return ()
        ops, self.disk.ops = tuple(self.disk.ops), []
        return ops

    @property
    def has_orders(self) -> bool:
        return bool(self._copies) or (self.disk is not None and bool(self.disk.ops))

    def done(self, result: StepResult, num_tokens: int, num_sampled: int) -> None:
        """A plan was executed: learn what copying and computing cost."""
        moved = self._sent.pop(result.step, 0)
        self.cost.copied(moved, result.copy_seconds)
        if num_tokens > 4 * num_sampled and num_tokens - num_sampled >= _MEASURED_TOKENS:
            self.cost.computed(num_tokens, result.seconds - result.copy_seconds)

    def disk_done(self, done: DiskDone) -> set[int]:
        """The worker has written or read a file. The jobs of `reads` that have ended with it."""
        if done.kind == "read":
            return self.reads.done(done)
        node = self._by_place.get(self.writes.done(done))
        if node is not None:
            self._offer(node)
        return set()

    def stats(self) -> KvStats:
        host, disk, pool = self.host, self.disk, self.pool
        in_host = 0 if host is None else host.num_used
        in_disk = 0 if disk is None else len(disk)
        # Nothing more goes to a disk that fails; what lies there is read all the same.
        disk_free = 0 if disk is None or disk.problem else max(0, disk.capacity - in_disk)
        return KvStats(
            block_bytes=self._block_bytes,
            free=pool.num_free,
            used=pool.num_used,
            cached=pool.num_cached,
            trimmed=pool.num_trimmed,
            host_free=0 if host is None else host.num_free,
            host_cached=in_host,
            disk_free=disk_free,
            disk_cached=in_disk,
            moved_blocks={f"{way}_{tier}": n for (way, tier), n in self.num_moved.items()},
            fetches=self.num_fetches,
            recomputes=self.num_recomputes,
            nodes=self.tree.num_nodes,
            disk_problem=None if disk is None else disk.problem,
        )

    # --- tiers -------------------------------------------------------------------------------

    def take_place(self) -> int | None:
        """A host place with one owner; the oldest copy there is given up for it."""
        assert self.host is not None
        got = self.host.allocate(1)
        if got is None:
            oldest = self._host_queue.pop()
            if oldest is None:
                return None
            self._leave_host(oldest)
            got = self.host.allocate(1)
        return None if got is None else got[0]

    def spill(self, node: Node) -> bool:
        """A copy of its block on the host, where it has none yet. False: there is no place."""
        place = None if self.host is None else self.take_place()
        if place is None:
            return False
        self._copies.append(BlockCopy("spill", node.block, place))
        self.num_moved["out", "host"] += 1
        self.put(node, place)
        return True

    def put(self, node: Node, place: int) -> None:
        """`place`, which the caller owns, is the node's from now on."""
        node.place = place
        self._by_place[place] = node
        self._offer(node)

    def _may_leave_device(self, node: Node) -> bool:
        return (
            node.block != NONE
            and node.num_device_children == 0
            and self.pool.num_owners(node.block) == 0
        )

    def _may_leave_host(self, node: Node) -> bool:
        assert self.host is not None
        return (
            node.place != NONE
            and self.host.num_owners(node.place) == 1
            and (node.block != NONE or node.is_leaf)
        )

    def _offer(self, node: Node) -> None:
        """It may have become one that can be given up, or older or newer."""
        if self._may_leave_device(node):
            self._device_queue.add(node)
        if node.place != NONE and self._may_leave_host(node):
            self._host_queue.add(node)

    def _evict(self) -> bool:
        """The least recently used block leaves the device; False: every block is owned."""
        node = self._device_queue.pop()
        if node is None:
            return False
        whole = not self.pool.is_trimmed(node.block)
        if whole and node.place == NONE and self.spill(node):
            self.writes.begin(node)
        self._leave_device(node)
        if node.place == NONE:
            for below in reversed(list(self.tree.nodes(node))):
                self._leave_host(below)
            self._forget(node)
        else:
            self._offer(node)
        return True

    def _fetch(self, spilled: list[Node]) -> list[Node]:
        """Blocks for nodes that lie on the host, from the top; those that got one."""
        assert self.host is not None
        places = [node.place for node in spilled]
        self.host.retain(places)  # or the spills that make room could take them
        fetched: list[Node] = []
        for node in spilled:
            blocks = self.allocate(1)
            if blocks is None:
                break
            assert node.parent is not None
            node.block, node.step = blocks[0], 0
            node.parent.num_device_children += 1
            self.pool.hold(node.block)
            self._copies.append(BlockCopy("fetch", node.place, node.block))
            self.num_moved["in", "host"] += 1
            fetched.append(node)
        self.host.release(places)
        for node in spilled:
            self._offer(node)
        return fetched

    def _leave_device(self, node: Node) -> None:
        """Its block is free, or its owner's alone. The node must then have a place, or go."""
        parent = node.parent
        assert parent is not None
        self.pool.unhold(node.block)
        node.block = NONE
        parent.num_device_children -= 1
        parent.last_used = max(parent.last_used, node.last_used)
        self._offer(parent)

    def _leave_host(self, node: Node) -> None:
        """Its place is free, unless it is being written to disk. Without a block the node goes."""
        if node.place != NONE:
            assert self.host is not None
            del self._by_place[node.place]
            self.host.release((node.place,))
            node.place = NONE
        if node.block == NONE:
            self._forget(node)

    def _forget(self, node: Node) -> None:
        parent = node.parent
        assert parent is not None
        if node.marks:
            self._marks.leave(node, self._file_of(node))
        self.tree.remove(node)
        if isinstance(parent, Root):
            self.tree.forget_root(parent)
        else:
            self._offer(parent)

    def _file_of(self, node: Node) -> bytes | None:
        if self.disk is None or not self.disk.knows(digest_of(node)):
            return None
        return digest_of(node)

    # --- invariants --------------------------------------------------------------------------

    def check(self) -> None:
        """Recount pool, tree and places from scratch; AssertionError where one does not hold."""
        self.pool.check()
        self.tree.check()
        self._marks.check(set(self.tree.nodes()))
        held, places = set(), set()
        for node in self.tree.nodes():
            if node.block != NONE:
                assert self.pool.is_held(node.block) and node.block not in held
                held.add(node.block)
            if node.place != NONE:
                assert node.place not in places and self._by_place[node.place] is node
                places.add(node.place)
        assert self._by_place.keys() == places
        assert len(held) == sum(self.pool.is_held(b) for b in range(self.pool.capacity))
        if self.host is not None:
            self.host.check()
            owned = places | self.writes.places() | self.reads.places()
            assert owned == {p for p in range(self.host.limit) if self.host.num_owners(p)}
        if self.disk is not None:
            self.disk.check()

"""The prefix tree: which full blocks of tokens are known, and what came before each."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator

from quantd.daemon.kv.namespace import Namespace
from quantd.daemon.types import BLOCK_TOKENS

TOKEN_BYTES = array("i").itemsize
KEY_BYTES = BLOCK_TOKENS * TOKEN_BYTES
STRIDE = 64
"""Blocks from one milestone to the next."""
NONE = -1
"""No block, no place."""


def encode(tokens: Iterable[int]) -> bytes:
    """Tokens as the tree compares them. Exact: equal bytes are equal tokens."""
    return array("i", tokens).tobytes()


class Node:
    """One full block under its parent: 16 tokens, and where their keys and values lie.

    Invariant: a node has a device block, or a host place, or both; who has a device block has a
    parent with one. Roots stand for namespaces and have neither.
    """

    __slots__ = (
        "parent",
        "key",
        "depth",
        "children",
        "milestones",
        "above",
        "block",
        "place",
        "step",
        "last_used",
        "num_device_children",
        "digest",
        "marks",
    )

    def __init__(self, parent: Node | None, key: bytes, depth: int) -> None:
        self.parent = parent
        self.key = key
        """KEY_BYTES of `encode`; empty for a root."""
        self.depth = depth
        """Blocks from the root to here; 0 for a root."""
        self.children: dict[bytes, Node] | None = None
        self.milestones: dict[bytes, Node] | None = None
        """At depths that are multiples of STRIDE: the nodes STRIDE deeper, by all keys between."""
        self.above: Node | None = None
        """At depths that are multiples of STRIDE: the node STRIDE above."""
        self.block = NONE
        self.place = NONE
        self.step = 0
        """The plan that computes the block: complete for every later one."""
        self.last_used = 0
        self.num_device_children = 0
        self.digest: bytes | None = None
        """See `disk.py`; made when it is asked for."""
        self.marks: set[str] | None = None
        """See `marks.py`."""

    @property
    def is_leaf(self) -> bool:
        return not self.children

    def child(self, key: bytes) -> Node | None:
        return None if self.children is None else self.children.get(key)

    def climb(self, holds: Callable[[Node], bool]) -> Node:
        """The deepest node from here up of which `holds`; the root if there is none. If it holds of
        a node, it must hold of all above. Takes 2 STRIDE steps and one for each STRIDE."""
        node: Node = self
        while (parent := node.parent) is not None and not holds(node):
            above = node.above
            far = above is not None and above.parent is not None and not holds(above)
            node = above if far and above is not None else parent
        return node

    def path(self) -> list[Node]:
        """From below the root to here."""
        nodes: list[Node] = []
        node: Node = self
        while node.parent is not None:
            nodes.append(node)
            node = node.parent
        nodes.reverse()
        return nodes


class Root(Node):
    """A namespace."""

    __slots__ = ("namespace", "num_users")

    def __init__(self, namespace: Namespace) -> None:
        super().__init__(None, b"", 0)
        self.namespace = namespace
        self.digest = namespace.digest()
        self.num_users = 0
        """Sequences that are at work in it; a root without users and children is forgotten."""


class PrefixTree:
    """Nodes by namespace and tokens. Structure only: tiers and their order are `KvCache`'s.

    A look-up of n blocks takes n / 64 steps and at most 64 more, because every 64th node is also
    found at once from the one 64 above it. Keys are compared whole, so nothing can collide.
    """

    def __init__(self) -> None:
        self._roots: dict[Namespace, Root] = {}
        self.num_nodes = 0
        """Without roots."""

    def root(self, namespace: Namespace) -> Root:
        """Made if it is not there."""
        root = self._roots.get(namespace)
        if root is None:
            root = self._roots[namespace] = Root(namespace)
        return root

    def find(self, namespace: Namespace, key: bytes | bytearray, num_blocks: int) -> Node | None:
        """The deepest node on the way of the first `num_blocks` blocks of `key`; None: not even
        one. Changes nothing."""
        root = self._roots.get(namespace)
        if root is None:
            return None
        node: Node = root
        view = bytes(key)
        depth = 0
        while depth + STRIDE <= num_blocks and node.milestones is not None:
            start = depth * KEY_BYTES
            further = node.milestones.get(view[start : start + STRIDE * KEY_BYTES])
            if further is None:
                break
            node, depth = further, depth + STRIDE
        while depth < num_blocks:
            start = depth * KEY_BYTES
            child = node.child(view[start : start + KEY_BYTES])
            if child is None:
                break
            node, depth = child, depth + 1
        return node if depth else None

    def add(self, parent: Node, key: bytes) -> Node:
        """A new child, which its caller must give a block or a place."""
        assert len(key) == KEY_BYTES and parent.child(key) is None
        node = Node(parent, key, parent.depth + 1)
        if parent.children is None:
            parent.children = {}
        parent.children[key] = node
        self.num_nodes += 1
        if node.depth % STRIDE == 0:
            above, keys = self._stride(node)
            if above.milestones is None:
                above.milestones = {}
            above.milestones[keys] = node
            node.above = above
        return node

    def remove(self, node: Node) -> None:
        """Forget a leaf, which has neither block nor place any more."""
        assert node.is_leaf and node.parent is not None
        assert node.block == NONE and node.place == NONE
        if node.depth % STRIDE == 0:
            above, keys = self._stride(node)
            assert above.milestones is not None
            del above.milestones[keys]
        parent = node.parent
        assert parent.children is not None
        del parent.children[node.key]
        self.num_nodes -= 1

    def forget_root(self, root: Root) -> None:
        """No effect while it has users or nodes."""
        if root.is_leaf and root.num_users == 0:
            self._roots.pop(root.namespace, None)

    def nodes(self, top: Node | None = None) -> Iterator[Node]:
        """All nodes, or those under `top`, parents before children; roots are not among them."""
        stack: list[Node] = [*self._roots.values()] if top is None else [top]
        while stack:
            node = stack.pop()
            if node.parent is not None and node is not top:
                yield node
            if node.children:
                stack.extend(node.children.values())

    def _stride(self, node: Node) -> tuple[Node, bytes]:
        """The node STRIDE above, and all keys from there to here."""
        keys: list[bytes] = []
        for _ in range(STRIDE):
            keys.append(node.key)
            assert node.parent is not None
            node = node.parent
        return node, b"".join(reversed(keys))

    def check(self) -> None:
        """Recount; AssertionError where a node does not hold what is said of it."""
        count = 0
        for node in self.nodes():
            count += 1
            parent = node.parent
            assert parent is not None and parent.child(node.key) is node
            assert node.depth == parent.depth + 1
            assert node.block != NONE or node.place != NONE, "a node without its bytes"
            if node.block != NONE:
                assert parent.parent is None or parent.block != NONE, "an orphan on the device"
            below = node.children.values() if node.children else ()
            assert node.num_device_children == sum(child.block != NONE for child in below)
            if node.depth % STRIDE == 0:
                above, keys = self._stride(node)
                assert above.milestones is not None and above.milestones[keys] is node
        assert count == self.num_nodes

"""Which blocks were used for something that is kept elsewhere, and go when it is deleted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from quantd.daemon.kv.tree import Node, Root


class Marks:
    """Names (of responses, of conversations) on nodes of the tree: each on the ends of its chains.

    Invariant: a marked node is in the tree. When one goes, its marks go on to its parent, so that
    a name stands where what is left of its chains ends, and nowhere once nothing is left. What has
    gone from memory and lies on disk is remembered by its file. Changed by `KvCache` alone.
    """

    def __init__(self, is_file: Callable[[bytes], bool]) -> None:
        """`is_file`: whether the disk has a block of this name."""
        self._is_file = is_file
        self._nodes: dict[str, dict[Node, None]] = {}
        self._files: dict[str, dict[bytes, None]] = {}
        self._num_marks: Counter[bytes] = Counter()
        """By file, how many have it."""
        self._num_files = 0
        """Of all marks together."""
        self._swept = 64

    def put(self, node: Node, mark: str) -> None:
        if node.marks is None:
            node.marks = set()
        node.marks.add(mark)
        self._nodes.setdefault(mark, {})[node] = None

    def take(self, mark: str) -> tuple[list[Node], list[bytes]]:
        """The nodes where it stood, and the files that it alone was left with; it stands nowhere
        then."""
        nodes = list(self._nodes.pop(mark, ()))
        for node in nodes:
            assert node.marks is not None
            node.marks.discard(mark)
        return nodes, [name for name in self._files.pop(mark, ()) if self._drop(name)]

    def leave(self, node: Node, file: bytes | None) -> None:
        """A node is about to go; its block stays in this file."""
        if not node.marks:
            return
        parent = node.parent
        for mark in node.marks:
            del self._nodes[mark][node]
            if file is not None and file not in self._files.setdefault(mark, {}):
                self._files[mark][file] = None
                self._num_marks[file] += 1
                self._num_files += 1
            if parent is not None and not isinstance(parent, Root):
                self.put(parent, mark)
            elif not self._nodes[mark]:
                del self._nodes[mark]
        node.marks = None
        if self._num_files > self._swept:
            self._sweep()

    def _sweep(self) -> None:
        """Drop the files that have gone since."""
        for mark, files in list(self._files.items()):
            for name in [name for name in files if not self._is_file(name)]:
                del files[name]
                self._drop(name)
            if not files:
                del self._files[mark]
        self._swept = 2 * self._num_files + 64

    def _drop(self, file: bytes) -> bool:
        """One mark less for a file; True if that was the last."""
        self._num_files -= 1
        self._num_marks[file] -= 1
        if self._num_marks[file]:
            return False
        del self._num_marks[file]
        return True

    def check(self, nodes: set[Node]) -> None:
        """`nodes` are those of the tree."""
        for mark, marked in self._nodes.items():
            assert marked and nodes.issuperset(marked)
            assert all(node.marks is not None and mark in node.marks for node in marked)
        assert sum(len(node.marks or ()) for node in nodes) == sum(map(len, self._nodes.values()))
        assert self._num_files == sum(map(len, self._files.values()))
        assert self._num_marks == Counter(name for files in self._files.values() for name in files)

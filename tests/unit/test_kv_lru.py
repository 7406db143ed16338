"""LruQueue against a plain list that is searched."""

from __future__ import annotations

import random

import pytest

from quantd.daemon.kv.lru import LruQueue
from quantd.daemon.kv.tree import Node


def node_of(depth: int, last_used: int) -> Node:
    node = Node(None, b"", depth)
    node.last_used = last_used
    return node


@pytest.mark.parametrize("seed", range(10))
def test_the_oldest_that_may_go_and_of_equals_the_deepest(seed: int) -> None:
    rng = random.Random(seed)
    may_go: set[Node] = set()
    queue = LruQueue(may_go.__contains__)
    nodes = [node_of(rng.randrange(4), 0) for _ in range(300)]
    for now in range(3000):
        node = rng.choice(nodes)
        what = rng.random()
        if what < 0.65:
            node.last_used = rng.choice([now // 10, node.last_used])
            may_go.add(node)
            queue.add(node)
        elif what < 0.75:
            may_go.discard(node)
        else:
            found = queue.pop()
            if found is None:
                assert not may_go
                continue
            first = min((each.last_used, -each.depth) for each in may_go)
            assert found in may_go and (found.last_used, -found.depth) == first
            may_go.remove(found)


def test_what_is_out_of_date_does_not_pile_up() -> None:
    nodes = [node_of(0, 0) for _ in range(20)]
    queue = LruQueue(lambda node: node is not nodes[19])
    for now in range(5000):
        nodes[now % 20].last_used = now
        queue.add(nodes[now % 20])
        queue.add(nodes[now % 20])
        assert len(queue._heap) <= 2 * 20 + 65
    ages = [node.last_used for node in iter(queue.pop, None) if node is not None]
    assert sorted(set(ages)) == sorted(node.last_used for node in nodes[:19])

"""The counts of a model's KV blocks, by tier and state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

DIRECTIONS: tuple[tuple[str, str], ...] = (
    ("out", "host"),
    ("in", "host"),
    ("out", "disk"),
    ("in", "disk"),
)
"""(direction, tier): "out" leaves the tier above for this one, "in" comes back from it."""


class KvStats(NamedTuple):
    """At one moment; what is counted since the start says so."""

    block_bytes: int
    free: int
    """Blocks of the device pool that hold nothing. free + used + cached is the pool's budget."""
    used: int
    """Held by at least one running sequence."""
    cached: int
    """Held by the prefix tree alone: given up, oldest first, when others need the place."""
    trimmed: int
    """Of the used and the cached, those whose part in layers with a window was given back; the
    pool's budget holds that many parts more."""
    host_free: int
    host_cached: int
    """0 and 0 without a host pool."""
    disk_free: int
    disk_cached: int
    """0 and 0 without a disk tier, and while it rests because the disk failed."""
    moved_blocks: Mapping[str, int]
    """Since the start, by "direction_tier" ("out_host"); all of DIRECTIONS are there."""
    fetches: int
    """Since the start: sequences whose spilled blocks were copied back, as the cheaper way."""
    recomputes: int
    """Since the start: sequences that had spilled blocks and computed them again."""
    nodes: int
    """In the prefix tree."""
    disk_problem: str | None
    """Why the disk tier rests; None: it works or there is none."""

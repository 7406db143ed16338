"""What an engine shows of itself: numbers for metrics and `ps`, one line a request for `top`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from quantd.daemon.kv.stats import KvStats


class EngineStats(NamedTuple):
    """A look at an engine. All counts since the start are of this engine, which ends with its
    worker; those of `telemetry` go on."""

    running: int
    waiting: int
    """With those that wait for blocks from disk."""
    kv: KvStats
    preemptions: Mapping[str, int]
    """Since the start, by reason; every reason is there."""
    steps: int
    finished: int
    """Requests that ran to their end: neither aborted nor failed."""
    prompt_tokens: int
    """Since the start, with the cached ones."""
    cached_tokens: int
    generated_tokens: int


class RequestState(NamedTuple):
    """One request at this moment. Sizes are tokens, times seconds."""

    id: str
    caller: str
    phase: str
    """waiting | fetching (from disk) | prefill | decode"""
    priority: int
    prompt_tokens: int
    cached_tokens: int
    """Of the prompt, found when it first started."""
    computed_tokens: int
    output_tokens: int
    max_tokens: int
    blocks: int
    preemptions: int
    age: float
    """Since it arrived."""
    queue_seconds: float | None
    """Until it first started; None: it has not."""

"""What an engine measures, as an interface; `telemetry` implements it."""

from __future__ import annotations

from collections import Counter
from typing import Protocol

from quantd.daemon.scheduler.scheduler import Scheduler


class EngineMetrics(Protocol):
    """Counts of one model. Called from the step loop, so each call must be a few microseconds and
    must not raise. Times are seconds."""

    def observe_queue(self, seconds: float) -> None:
        """From a request's arrival until it is first in a batch."""
        ...

    def observe_ttft(self, seconds: float) -> None:
        """From a request's arrival to its first token."""
        ...

    def observe_itl(self, seconds: float) -> None:
        """Between two tokens of one request."""
        ...

    def observe_step(self, seconds: float, num_tokens: int) -> None:
        """A step's time in the worker, and the tokens it computed."""
        ...

    def count_masks(self, number: int, seconds: float, wait_seconds: float) -> None:
        """Of a step, the masks of grammars: what they took beside the model, and how long the
        step waited for them."""
        ...

    def count_prompt(self, num_tokens: int, num_cached_tokens: int) -> None:
        """A request's prompt, when its first token comes."""
        ...

    def count_generated(self, num_tokens: int) -> None: ...

    def count_finished(self, reason: str) -> None:
        """A request ended: stop, length, abort or error."""
        ...

    def count_preempted(self, reason: str, number: int) -> None:
        """Running requests that lost their place: memory or priority."""
        ...

    def count_moved(self, direction: str, tier: str, num_bytes: int) -> None:
        """Bytes of KV blocks, "out" to a lower tier or "in" from it."""
        ...

    def count_returned(self, how: str, number: int) -> None:
        """Requests that found spilled blocks, and got them back by copy or by compute."""
        ...


class Totals:
    """What scheduler and cache count by themselves, carried over to the model's metrics, which
    outlive both. It costs a step nothing: `carry` is called when somebody looks, and at the end."""

    def __init__(self, scheduler: Scheduler, block_bytes: int, metrics: EngineMetrics) -> None:
        self._scheduler = scheduler
        self._block_bytes = block_bytes
        self._metrics = metrics
        self._carried: Counter[tuple[str, str]] = Counter()
        """Per count, how much of it the metrics have."""

    def carry(self) -> None:
        """Brings the metrics up to date; a second call adds nothing."""
        kv, metrics = self._scheduler.kv, self._metrics
        for reason, count in self._scheduler.preemptions.items():
            metrics.count_preempted(reason, self._new(("preempted", reason), count))
        for (direction, tier), count in kv.num_moved.items():
            new = self._new((direction, tier), count)
            metrics.count_moved(direction, tier, new * self._block_bytes)
        for how, count in (("copy", kv.num_fetches), ("compute", kv.num_recomputes)):
            metrics.count_returned(how, self._new(("returned", how), count))

    def _new(self, name: tuple[str, str], count: int) -> int:
        new = count - self._carried[name]
        self._carried[name] = count
        return new

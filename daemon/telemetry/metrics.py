"""What the daemon counts, and how a scrape sees it.

Counting is plain arithmetic on the event loop: no locks, no client library. The library is
imported at the first scrape, which also asks for the gauges of the moment (`watch`), so that
nothing runs between scrapes. The only labels are model names, which the configuration bounds, and
words out of fixed lists.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.metrics_core import Metric

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
ModelState = Literal["cold", "loading", "ready", "failed"]
MODEL_STATES: tuple[ModelState, ...] = ("cold", "loading", "ready", "failed")

_WAIT_BUCKETS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0),
)
_GAP_BUCKETS = (
    *(0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.025, 0.05, 0.075),
    *(0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0),
)


class KvSample(Protocol):
    """What a scrape shows of `kv.stats.KvStats`."""

    @property
    def free(self) -> int: ...
    @property
    def used(self) -> int: ...
    @property
    def cached(self) -> int: ...
    @property
    def host_free(self) -> int: ...
    @property
    def host_cached(self) -> int: ...
    @property
    def disk_free(self) -> int: ...
    @property
    def disk_cached(self) -> int: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSample:
    """One model at the moment of a scrape."""

    model: str
    state: ModelState
    requests_running: int = 0
    requests_waiting: int = 0
    kv: KvSample | None = None


class Histogram:
    """Counts per bucket. Units are seconds."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self.sum += value

    def cumulative(self) -> list[tuple[str, float]]:
        """(upper bound, observations not above it), the last one "+Inf"."""
        pairs: list[tuple[str, float]] = []
        total = 0
        for bound, count in zip((*map(str, self._bounds), "+Inf"), self._counts, strict=True):
            total += count
            pairs.append((bound, total))
        return pairs


@dataclass(slots=True)
class EngineMetrics:
    """One model's counters, which survive that the model is unloaded and loaded again.

    Event loop only.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0
    step_tokens: int = 0
    step_seconds: float = 0.0
    tool_call_retries: int = 0
    masks: int = 0
    mask_seconds: float = 0.0
    mask_wait_seconds: float = 0.0
    finished: dict[str, int] = field(default_factory=dict)
    preempted: dict[str, int] = field(default_factory=dict)
    """By reason."""
    moved_bytes: dict[tuple[str, ...], int] = field(default_factory=dict)
    """By direction and tier."""
    returned: dict[str, int] = field(default_factory=dict)
    """By how."""
    queue: Histogram = field(default_factory=lambda: Histogram(_WAIT_BUCKETS))
    ttft: Histogram = field(default_factory=lambda: Histogram(_WAIT_BUCKETS))
    itl: Histogram = field(default_factory=lambda: Histogram(_GAP_BUCKETS))

    def observe_queue(self, seconds: float) -> None:
        """From arrival to the first step that computes the request."""
        self.queue.observe(seconds)

    def observe_ttft(self, seconds: float) -> None:
        """From arrival to the first token."""
        self.ttft.observe(seconds)

    def observe_itl(self, seconds: float) -> None:
        """Between two successive tokens of one request."""
        self.itl.observe(seconds)

    def observe_step(self, seconds: float, num_tokens: int) -> None:
        self.steps += 1
        self.step_tokens += num_tokens
        self.step_seconds += seconds

    def count_masks(self, number: int, seconds: float, wait_seconds: float) -> None:
        self.masks += number
        self.mask_seconds += seconds
        self.mask_wait_seconds += wait_seconds

    def count_prompt(self, num_tokens: int, num_cached_tokens: int) -> None:
        """`num_tokens` includes the cached ones."""
        self.prompt_tokens += num_tokens
        self.cached_tokens += num_cached_tokens

    def count_generated(self, num_tokens: int) -> None:
        self.generated_tokens += num_tokens

    def count_finished(self, reason: str) -> None:
        self.finished[reason] = self.finished.get(reason, 0) + 1

    def count_preempted(self, reason: str, number: int) -> None:
        self.preempted[reason] = self.preempted.get(reason, 0) + number

    def count_moved(self, direction: str, tier: str, num_bytes: int) -> None:
        way = (direction, tier)
        self.moved_bytes[way] = self.moved_bytes.get(way, 0) + num_bytes

    def count_returned(self, how: str, number: int) -> None:
        self.returned[how] = self.returned.get(how, 0) + number


class Metrics:
    """All of the daemon's metrics."""

    def __init__(self) -> None:
        self._engines: dict[str, EngineMetrics] = {}
        self._sample: Callable[[], Iterable[ModelSample]] = tuple
        self._registry: CollectorRegistry | None = None
        self.safety: dict[tuple[str, ...], int] = {}
        """By policy, stage, action and category, all of which the configuration bounds."""
        self.guard_failures: dict[tuple[str, ...], int] = {}
        """By guard."""

    def engine(self, model: str) -> EngineMetrics:
        """The counters of one model; the same object for the same name."""
        return self._engines.setdefault(model, EngineMetrics())

    def count_safety(self, policy: str, stage: str, action: str, category: str) -> None:
        """A prompt or an answer in which a category was found."""
        key = (policy, stage, action, category)
        self.safety[key] = self.safety.get(key, 0) + 1

    def count_guard_failure(self, guard: str) -> None:
        self.guard_failures[guard,] = self.guard_failures.get((guard,), 0) + 1

    def watch(self, sample: Callable[[], Iterable[ModelSample]]) -> None:
        """Where a scrape gets the gauges from. It is asked before the counters are read."""
        self._sample = sample

    def render(self) -> bytes:
        """The exposition in the text format, of type `CONTENT_TYPE`."""
        from prometheus_client.exposition import generate_latest

        if self._registry is None:
            self._registry = self._new_registry()
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """prometheus_client's Collector protocol."""
        from quantd.daemon.telemetry.families import families, safety_families

        samples = list(self._sample())  # first: it brings counters up to date
        yield from families(self._engines, samples)
        yield from safety_families(self.safety, self.guard_failures)

    def _new_registry(self) -> CollectorRegistry:
        """Our own: the library's global one would pull in whatever others register."""
        from prometheus_client import CollectorRegistry, ProcessCollector

        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        ProcessCollector(registry=registry)
        return registry

"""What an engine measures, as an interface; `telemetry` implements it."""

from __future__ import annotations

from typing import Protocol


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

    def count_prompt(self, num_tokens: int, num_cached_tokens: int) -> None:
        """A request's prompt, when its first token comes."""
        ...

    def count_generated(self, num_tokens: int) -> None: ...

    def count_finished(self, reason: str) -> None:
        """A request ended: stop, length, abort or error."""
        ...

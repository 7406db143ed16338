"""How fast the queue moves: what a refused caller is told."""

from __future__ import annotations

WINDOW = 32
"""Starts over which the pace is averaged."""


class StartPace:
    """Seconds between two starts from the queue, measured only while somebody waits."""

    def __init__(self) -> None:
        self._mean = 0.0
        self._count = 0
        self._since = 0.0

    def waits_from(self, now: float) -> None:
        """The queue was empty until `now`: the time before says nothing of the pace."""
        self._since = max(self._since, now)

    def started(self, now: float) -> None:
        """A sequence has left the queue for good."""
        self._count += 1
        self._mean += (now - self._since - self._mean) / min(self._count, WINDOW)
        self._since = now

    def seconds_per_start(self, now: float) -> float:
        """The recent mean, or the time since the last start where that is longer already."""
        return max(self._mean, now - self._since)

"""How much each caller has had: what fairness between API keys goes by."""

from __future__ import annotations

from collections.abc import Mapping


class CallerShares:
    """Tokens computed for each caller over its weight, while it has requests.

    The virtual token counter of Sheng et al., "Fairness in Serving Large Language Models" (2024):
    who has had least is served next, and who comes back after a pause starts level with those who
    are there, so that no credit is saved up. Memory is a pair of numbers per caller with requests.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        """`weights`: > 0 by the callers' names; 1 for all others."""
        self._weights = weights
        self._used: dict[str, float] = {}
        self._num_requests: dict[str, int] = {}
        self._last = 0.0
        """What the caller who left last had had: where the next one starts when nobody is left."""

    def enter(self, caller: str) -> None:
        """One request more, waiting or running."""
        if caller not in self._used:
            self._used[caller] = min(self._used.values(), default=self._last)
            self._num_requests[caller] = 0
        self._num_requests[caller] += 1

    def leave(self, caller: str) -> None:
        self._num_requests[caller] -= 1
        if self._num_requests[caller] == 0:
            del self._num_requests[caller]
            self._last = self._used.pop(caller)

    def charge(self, caller: str, num_tokens: int) -> None:
        """So many tokens are computed for a caller with requests."""
        self._used[caller] += num_tokens / self._weights.get(caller, 1.0)

    def used(self, caller: str) -> float:
        return self._used[caller]

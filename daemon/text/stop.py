"""Stop strings over a stream of text.

The match that *ends* first wins, and of several that end at the same character the longest. So
the outcome depends on the text alone and not on how it was split, and no match waits for a longer
one. Text that may be the beginning of a stop string is held back until it is decided, so no
character of a stop string is ever given out (unless it was asked for).
"""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Feed text until `matched` is set. Each character costs O(number of stop strings): each one
    is followed by its own automaton (Knuth, Morris, Pratt 1977)."""

    def __init__(self, stops: Sequence[str], *, include_stop: bool = False) -> None:
        assert all(stops), "empty stop strings are refused at the door"
        self._stops = tuple(dict.fromkeys(stops))
        self._failures = [_failure_table(stop) for stop in self._stops]
        self._progress = [0] * len(self._stops)
        self._first_chars = {stop[0] for stop in self._stops}
        self._include_stop = include_stop
        self._held = ""
        self.matched: str | None = None

    def feed(self, text: str) -> str:
        """What can be given out now. Sets `matched` at the first match; the text after it is
        dropped. Not to be called again then."""
        assert self.matched is None
        if not self._held and self._first_chars.isdisjoint(text) and not any(self._progress):
            return text
        for position, char in enumerate(text):
            if stop := self._step(char):
                self.matched = stop
                text = self._held + text[: position + 1]
                self._held = ""
                return text if self._include_stop else text[: len(text) - len(stop)]
        text = self._held + text
        cut = len(text) - (0 if self._include_stop else max(self._progress))
        self._held = text[cut:]
        return text[:cut]

    def flush(self) -> str:
        """The end of the text: gives out what was held back."""
        text, self._held = self._held, ""
        return text

    def _step(self, char: str) -> str | None:
        """Advance all automata; the longest stop string that this character completes."""
        longest = None
        for i, stop in enumerate(self._stops):
            progress = self._progress[i]
            while progress and stop[progress] != char:
                progress = self._failures[i][progress - 1]
            if stop[progress] == char:
                progress += 1
            if progress == len(stop):
                if longest is None or len(stop) > len(longest):
                    longest = stop
                progress = self._failures[i][progress - 1]
            self._progress[i] = progress
        return longest


def _failure_table(stop: str) -> list[int]:
    """For each prefix, the length of its longest proper prefix that is also its suffix."""
    table = [0] * len(stop)
    length = 0
    for i in range(1, len(stop)):
        while length and stop[i] != stop[length]:
            length = table[length - 1]
        if stop[i] == stop[length]:
            length += 1
        table[i] = length
    return table

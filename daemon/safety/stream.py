"""A text on its way out: what a policy's rules let through of it, piece by piece."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from quantd.daemon.safety.json_text import JsonReader
from quantd.daemon.safety.normalize import normalize_at
from quantd.daemon.safety.rules import Found
from quantd.daemon.safety.screen import Screen

PIECE = 2048
"""Characters that are looked at at once."""


class StreamFilter:
    """One text. What `feed` and `flush` give out adds up to the same, however it was split.

    Held back is what may still be the beginning of a match: at most `Screen.held` normalized
    characters, and the invisible ones between them. Nothing of a match that is blocked or
    redacted is ever given out. After `blocked` the text is over.
    """

    def __init__(self, screen: Screen, *, is_json: bool = False, num_before: int = 0) -> None:
        """is_json: it is written in JSON, whose escapes are read. num_before: characters that
        count towards its length already."""
        self.blocked: str | None = None
        """The category."""
        self.found: Counter[str] = Counter()
        """Category → matches; complete after `flush` or `blocked`."""
        self.num_chars = num_before
        """That were fed, up to the limit."""
        self._screen = screen
        self._json = JsonReader() if is_json else None
        self._read: Callable[[str, int], tuple[str, list[int] | range]] = (
            normalize_at if self._json is None else self._json.read
        )
        self._raw = ""
        """What has been neither given nor taken out."""
        self._shown = 0
        """Where it begins in the whole text."""
        self._text = ""
        """Normalized, with one character before what is undecided."""
        self._at: list[int] = []
        """For each of its characters the one of the whole text that it is from."""
        self._cursor = 0
        """In `_text`: starts before it are decided."""
        self._starts = [0] * (0 if screen.rules is None else len(screen.rules.rules))
        """In `_text`: where each rule's next match may begin."""

    def feed(self, text: str) -> str:
        if len(text) <= PIECE:
            return self._feed(text)
        return "".join(
            self._feed(text[start : start + PIECE]) for start in range(0, len(text), PIECE)
        )

    def flush(self) -> str:
        """The end of the text, once: the rest of it."""
        if self.blocked is not None:
            return ""
        if self._json is not None:
            self._add(*self._json.flush())
        rest = self._decide(is_end=True)
        for category, limit in self._screen.limits.items():
            if self.num_chars > limit and self.blocked is None:
                self.found[category] += 1
        return rest

    def _feed(self, text: str) -> str:
        if self.blocked is not None:
            return ""
        most = self._screen.max_chars
        is_over = most is not None and self.num_chars + len(text) > most
        if most is not None and is_over:
            text = text[: most - self.num_chars]
        end = self._shown + len(self._raw)
        self._raw += text
        self.num_chars += len(text)
        self._add(*self._read(text, end))
        if not is_over:
            return self._decide(is_end=False)
        shown = self.flush()
        if self.blocked is None:
            self.blocked = min(self._screen.limits, key=self._screen.limits.__getitem__)
            self.found[self.blocked] += 1
        return shown

    def _add(self, text: str, at: list[int] | range) -> None:
        self._text += text
        self._at += at

    def _decide(self, *, is_end: bool) -> str:
        """Gives out what no rule can change any more."""
        rules, text = self._screen.rules, self._text
        limit = len(text) if is_end or rules is None else rules.settled(text)
        if limit <= self._cursor and not is_end:
            return ""
        shown: list[str] = []
        if rules is not None:
            for found in rules.find(text, self._starts, limit, is_end):
                self._take(found, shown)
                if self.blocked is not None:
                    return "".join(shown)
        self._show(self._place(limit), shown)
        self._forget(limit)
        return "".join(shown)

    def _take(self, found: Found, shown: list[str]) -> None:
        self._starts[found.rule] = found.stop
        self.found[found.category] += 1
        action = self._screen.actions[found.category]
        if action == "annotate":
            return
        start, stop = self._place(found.start), self._place(found.stop)
        is_new = start >= self._shown
        self._show(start, shown)
        if action == "block" or (self._json is not None and self._json.crosses(start, stop)):
            self.blocked = found.category  # what crosses strings cannot be taken out of JSON
            return
        if is_new:
            label = f"[{found.category}]"
            is_bare = self._json is not None and not self._json.is_quoted(start)
            shown.append(f'"{label}"' if is_bare else label)
        self._drop(stop)

    def _place(self, index: int) -> int:
        """Of a character of `_text` in the whole text."""
        return self._at[index] if index < len(self._at) else self._shown + len(self._raw)

    def _show(self, stop: int, shown: list[str]) -> None:
        if stop > self._shown:
            shown.append(self._raw[: stop - self._shown])
            self._drop(stop)

    def _drop(self, stop: int) -> None:
        if stop > self._shown:
            self._raw = self._raw[stop - self._shown :]
            self._shown = stop

    def _forget(self, limit: int) -> None:
        """What is decided, but for one character."""
        gone = max(limit - 1, 0)
        self._text = self._text[gone:]
        del self._at[:gone]
        self._cursor = limit - gone
        self._starts = [max(start, limit) - gone for start in self._starts]
        if self._json is not None:
            self._json.forget(self._shown)

"""What all parsers of answers are made of: states over a buffer, marks, the ends of values."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from quantd.daemon.text.answer import CallArguments, CallStart, Content, Part, Reasoning
from quantd.daemon.text.tools import Toolset


def held(text: str, marks: Sequence[str]) -> int:
    """How many characters at the text's end may be the beginning of a mark."""
    longest = min(len(text), max(map(len, marks)) - 1)
    for length in range(longest, 0, -1):
        if any(mark.startswith(text[-length:]) for mark in marks):
            return length
    return 0


def first_of(text: str, marks: Sequence[str]) -> tuple[int, str] | None:
    """Where the first mark is, and which."""
    found = [(place, mark) for mark in marks if (place := text.find(mark)) >= 0]
    return min(found, default=None)


class Brackets:
    """Finds where a bracketed value ends: brackets in quotes do not count."""

    def __init__(self, quotes: str = '"', depth: int = 0) -> None:
        """depth: how many brackets have been opened before the text."""
        self._outside = re.compile(rf"[{{}}\[\](){quotes}]")
        self._quotes = quotes
        self._quote = ""
        self._escaped = False
        self._depth = depth

    def end(self, text: str, start: int = 0) -> int | None:
        """The place after the closing bracket in `text`, which goes on where the text of the call
        before ended; the first one begins with the opening bracket. None: it is not there yet."""
        place = start
        while place < len(text):
            if self._quote:
                place = self._skip_quoted(text, place)
                continue
            found = self._outside.search(text, place)
            if found is None:
                return None
            place = found.end()
            char = found[0]
            if char in self._quotes:
                self._quote = char
            elif char in "{[(":
                self._depth += 1
            else:
                self._depth -= 1
                if self._depth <= 0:
                    return place
        return None

    def _skip_quoted(self, text: str, place: int) -> int:
        if self._escaped:
            self._escaped = False
            return place + 1
        for index in range(place, len(text)):
            if text[index] == "\\":
                self._escaped = True
                return index + 1
            if text[index] == self._quote:
                self._quote = ""
                return index + 1
        return len(text)


class Prose:
    """The text around calls. White space next to a call is part of its syntax, unless there is
    content on both sides."""

    def __init__(self) -> None:
        self._space = ""
        self._has_text = False
        self._has_call = False
        self._is_after_call = False

    def add(self, text: str) -> str:
        """What of it can be shown now."""
        text = self._space + text
        shown = text.rstrip()
        self._space = text[len(shown) :]
        if shown and self._has_call and not self._has_text:
            shown = shown.lstrip()
        if shown:
            self._has_text, self._is_after_call = True, False
        return shown

    def call(self) -> None:
        self._has_call = self._is_after_call = True

    def end(self) -> str:
        return "" if self._is_after_call else self._space


class CallParser:
    """A parser of answers with calls.

    A state looks at the beginning of `text`. It takes what is decided off and returns True, or it
    returns False: nothing is decided before more text comes. With `ended` no more will come, and
    a state must take all of it.
    """

    reasoning_spans: Sequence[tuple[int, int]] = ()

    def __init__(self, tools: Toolset, new_id: Callable[[], str]) -> None:
        self.tools = {tool.name: tool for tool in tools.tools}
        self.num_calls = 0
        self.num_failed_calls = 0
        self.text = ""
        self.ended = False
        self.state: Callable[[], bool] = self.begin
        self._new_id = new_id
        self._prose = Prose()
        self._parts: list[Part] = []

    def begin(self) -> bool:
        """The first state."""
        raise NotImplementedError

    def feed(self, text: str) -> list[Part]:
        self.text += text
        return self._run()

    def flush(self) -> list[Part]:
        self.ended = True
        self._run()
        self.say(self._prose.end())
        return self._taken()

    def _run(self) -> list[Part]:
        while self.text and self.state():
            pass
        return [] if self.ended else self._taken()

    def _taken(self) -> list[Part]:
        parts, self._parts = self._parts, []
        return parts

    # --- for states ---------------------------------------------------------------------------

    def take(self, count: int) -> str:
        taken, self.text = self.text[:count], self.text[count:]
        return taken

    def prose(self, text: str) -> None:
        self.say(self._prose.add(text))

    def say(self, text: str) -> None:
        if text:
            self._parts.append(Content(text))

    def reason(self, text: str) -> None:
        if text:
            self._parts.append(Reasoning(text))

    def start(self, name: str) -> None:
        self._prose.call()
        self._parts.append(CallStart(self.num_calls, self._new_id(), name))
        self.num_calls += 1

    def argue(self, text: str) -> None:
        if text:
            self._parts.append(CallArguments(self.num_calls - 1, text))

    def pass_mark(self, mark: str) -> bool:
        """Takes white space and the mark, or as much of it as there is at the end; if something
        else comes, nothing. False: it is not decided."""
        rest = self.text.lstrip()
        is_begun = mark.startswith(rest)
        if is_begun and rest != mark and not self.ended:
            return False
        if is_begun or rest.startswith(mark):
            self.take(len(self.text) - len(rest) + min(len(rest), len(mark)))
        return True

    def prose_until(self, marks: Sequence[str]) -> str | None:
        """Takes content up to a mark, and the mark, which is returned."""
        found = first_of(self.text, marks)
        if found is None:
            count = len(self.text) - (0 if self.ended else held(self.text, marks))
            self.prose(self.take(count))
            return None
        place, mark = found
        self.prose(self.take(place))
        self.take(len(mark))
        return mark

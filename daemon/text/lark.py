"""Writing grammars in llguidance's Lark dialect.

A mark that is a special token of the tokenizer is a token of the grammar; one that is not is text.
Free text before a mark ends where the mark first appears. Where the mark is a special token, the
same characters as ordinary text are not allowed, so that nothing looks like a call and is none.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from quantd.daemon.grammar import JSON_OPTIONS

_SPECIAL_CHARS = frozenset("\\.+*?()|[]{}^$#&-~/")
_ANY = "/(?s:.*)/"


class Lark:
    """The rules of one grammar, in the making."""

    def __init__(self, special: Mapping[str, int], avoid_first: str = "") -> None:
        """special: texts of special tokens and their ids. avoid_first: free text does not begin
        with it."""
        self._special = special
        self._avoid_first = "" if avoid_first in special else avoid_first
        self._rules: dict[str, str] = {}

    def source(self, start: str) -> str:
        """The whole grammar; `start` is the right side of its first rule."""
        rules = {"start": start, **self._rules}
        return "".join(f"{name}: {body}\n" for name, body in rules.items())

    def rule(self, name: str, body: str) -> str:
        """Adds a rule and returns its name; a name of capitals makes a terminal. Equal rules are
        one; others get a number."""
        options = ""
        if name.endswith("]"):
            name, bracket, rest = name.partition("[")
            options = bracket + rest
        number = 0
        while True:
            numbered = f"{name}_{number}" if number else name
            known = self._rules.setdefault(numbered + options, body)
            if known == body:
                return numbered
            number += 1

    def is_special(self, mark: str) -> bool:
        return mark in self._special

    def mark(self, text: str) -> str:
        return f"<[{self._special[text]}]>" if text in self._special else quoted(text)

    def free_text(self, *without: str, not_first: str = "", anything: bool = False) -> str:
        """A terminal: any text, but for the marks, and not with this character first. anything: it
        may begin with what is to be avoided elsewhere."""
        body = self._any(anything=anything)
        for mark in without:
            body += f" & ~/(?s:.*){escaped(mark)}(?s:.*)/"
        if not_first:
            body += f" & ~/\\s*{escaped(not_first)}(?s:.*)/"
        return self.rule("TEXT", body)

    def until(self, mark: str, *, anything: bool = False) -> str:
        """Any text up to a mark, and the mark."""
        if self.is_special(mark):
            return f"{self.free_text(mark, anything=anything)} {self.mark(mark)}"
        return self.rule("until[lazy]", self._any(escaped(mark), anything=anything))

    def json(self, schema: object) -> str:
        """Any value that obeys the schema."""
        body: Any = dict(schema) if isinstance(schema, Mapping) else schema
        if isinstance(body, dict):
            # Not the schema's own, which could ask to pass over keywords.
            body = {**body, "x-guidance": JSON_OPTIONS}
        return self.rule("value", "%json " + json.dumps(body))

    def _any(self, end: str = "", *, anything: bool) -> str:
        """Any text that ends so."""
        any_text = _ANY if not end else f"/(?s:.*){end}/"
        if anything or not self._avoid_first:
            return any_text
        return f"{any_text} & ~/\\s*{escaped(self._avoid_first)}(?s:.*)/"


def quoted(text: str) -> str:
    return json.dumps(text)


def one_of(alternatives: Iterable[str]) -> str:
    return "(" + " | ".join(alternatives) + ")"


def escaped(text: str) -> str:
    """For a regular expression between slashes, in Rust's syntax."""
    return "".join("\\" + char if char in _SPECIAL_CHARS else char for char in text)

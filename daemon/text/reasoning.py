"""Reasoning before an answer, between marks: `<think>…</think>` and its kin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from quantd.daemon.text.answer import AnswerParser, Part, Reasoning
from quantd.daemon.text.dialects.scan import held


class Marks(NamedTuple):
    open: str
    close: str


KNOWN = (
    Marks("<think>", "</think>"),
    Marks("[THINK]", "[/THINK]"),
    Marks("<seed:think>", "</seed:think>"),
    Marks("<|START_THINKING|>", "<|END_THINKING|>"),
)


class ReasoningParser:
    """Splits reasoning off the beginning of an answer; the rest goes to another parser.

    Line ends around the marks belong to the marks.
    """

    def __init__(self, marks: Marks, inner: AnswerParser, *, is_open: bool) -> None:
        """is_open: the prompt has opened the reasoning already."""
        self._marks = marks
        self._inner = inner
        self._stage = self._reason if is_open else self._begin
        self._text = ""
        self._place = 0
        """Of `_text` in all that was fed."""
        self._begun = 0
        self._spans: list[tuple[int, int]] = []
        self._is_begun = False
        """Some reasoning has been shown."""
        self._ended = False

    @property
    def num_calls(self) -> int:
        return self._inner.num_calls

    @property
    def num_failed_calls(self) -> int:
        return self._inner.num_failed_calls

    @property
    def reasoning_spans(self) -> Sequence[tuple[int, int]]:
        return self._spans

    def feed(self, text: str) -> list[Part]:
        self._text += text
        return self._stage()

    def flush(self) -> list[Part]:
        self._ended = True
        parts = self._stage()
        if self._stage == self._reason:
            self._spans.append((self._begun, self._place))
        return [*parts, *self._inner.flush()]

    def _take(self, count: int) -> str:
        taken, self._text = self._text[:count], self._text[count:]
        self._place += count
        return taken

    def _begin(self) -> list[Part]:
        """An answer reasons only where it begins."""
        rest = self._text.lstrip()
        if not self._ended and self._marks.open.startswith(rest) and rest != self._marks.open:
            return []
        if not rest.startswith(self._marks.open):
            self._stage = self._pass
            return self._pass()
        self._begun = len(self._text) - len(rest)
        self._take(self._begun + len(self._marks.open))
        self._stage = self._reason
        return self._reason()

    def _reason(self) -> list[Part]:
        close = self._marks.close
        end = self._text.find(close)
        if end >= 0:
            text = self._take(end).rstrip("\n")
            self._take(len(close))
            self._spans.append((self._begun, self._place))
            self._stage = self._after
            return [*self._shown(text), *self._after()]
        count = len(self._text)
        if not self._ended:
            count -= held(self._text, (close,))
            count = len(self._text[:count].rstrip("\n"))
        return self._shown(self._take(count))

    def _shown(self, text: str) -> list[Part]:
        if not self._is_begun:
            text = text.lstrip("\n")
        self._is_begun = self._is_begun or bool(text)
        return [Reasoning(text)] if text else []

    def _after(self) -> list[Part]:
        self._take(len(self._text) - len(self._text.lstrip("\n")))
        if not self._text:
            return []
        self._stage = self._pass
        return self._pass()

    def _pass(self) -> list[Part]:
        return self._inner.feed(self._take(len(self._text)))

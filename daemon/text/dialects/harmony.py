"""Harmony, of gpt-oss: messages with a channel each.

`<|channel|>analysis<|message|>…<|end|><|start|>assistant<|channel|>final<|message|>…`. The analysis
is reasoning, the final channel is content, and so is the commentary, unless it is addressed
`to=functions.NAME`: then it is a call's arguments.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from quantd.daemon.text.answer import Part
from quantd.daemon.text.dialects.dialect import Dialect, arguments_of
from quantd.daemon.text.dialects.scan import Brackets, CallParser, first_of, held
from quantd.daemon.text.lark import Lark, one_of, quoted
from quantd.daemon.text.tools import Toolset

START, CHANNEL, MESSAGE = "<|start|>", "<|channel|>", "<|message|>"
CONSTRAIN, END, CALL, RETURN = "<|constrain|>", "<|end|>", "<|call|>", "<|return|>"
MARKS = (START, CHANNEL, MESSAGE, CONSTRAIN, END, CALL, RETURN)
_ENDS = (END, CALL, RETURN, START)
_HEADS = (START, CHANNEL, MESSAGE, " to=")
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
_RECIPIENT = re.compile(r"\bto=([^\s<]+)")
_FUNCTION = re.compile(r"functions\.(.+)")


class HarmonyParser(CallParser):
    def __init__(self, tools: Toolset, new_id: Callable[[], str]) -> None:
        super().__init__(tools, new_id)
        self.reasoning_spans: list[tuple[int, int]] = []
        self._place = 0
        """Of `text` in all that was fed."""
        self._reasoning_begun: int | None = None
        self._show: Callable[[str], None] = self.prose
        self._has_content = False

    def take(self, count: int) -> str:
        self._place += count
        return super().take(count)

    def flush(self) -> list[Part]:
        parts = super().flush()
        self._end_reasoning()
        return parts

    def begin(self) -> bool:
        """A message's head, up to its text. An answer without a head is content; a head that is
        cut off says nothing."""
        if not any(self.text.startswith(h) or h.startswith(self.text) for h in _HEADS):
            self.state = self._body
            return True
        end = self.text.find(MESSAGE)
        if end < 0:
            if self.ended:
                self.take(len(self.text))
            return False
        begun = self._place
        head = self.take(end)
        self.take(len(MESSAGE))
        self.state = self._body
        self._open(head, begun)
        return True

    def _open(self, head: str, begun: int) -> None:
        recipient = _RECIPIENT.search(head)
        if recipient is None:
            channel = _CHANNEL.search(head)
            if channel is not None and channel[1] == "analysis":
                self._show, self._reasoning_begun = self.reason, begun
                return
        function = _FUNCTION.fullmatch(recipient[1]) if recipient else None
        if function and function[1] in self.tools:
            self.start(function[1])
            self._arguments, self.state = Brackets(), self._call_body
            return
        self._show = self.prose
        if self._has_content:
            self.prose("\n")
        self._has_content = True
        self.num_failed_calls += function is not None
        if recipient:  # of something that is not ours: nothing of it is hidden
            self.prose(head + MESSAGE)

    def _call_body(self) -> bool:
        """Arguments; in JSON a mark inside of a string is text."""
        rest = self.text.lstrip()
        if not rest:
            return False
        self.take(len(self.text) - len(rest))
        self.state = self._pass_arguments
        if not rest.startswith("{"):
            self._show, self.state = self.argue, self._body
        return True

    def _pass_arguments(self) -> bool:
        end = self._arguments.end(self.text)
        if end is None:
            self.argue(self.take(len(self.text)))
            return False
        self.argue(self.take(end))
        self.state = self._close
        return True

    def _close(self) -> bool:
        """The mark behind arguments; a part of it at the end is none of anything."""
        if self.ended and any(mark.startswith(self.text.lstrip()) for mark in _ENDS):
            self.take(len(self.text))
            return False
        if not self.ended and len(self.text.lstrip()) == held(self.text, _ENDS):
            return False
        self._show, self.state = self.prose, self._body
        return True

    def _body(self) -> bool:
        found = first_of(self.text, _ENDS)
        if found is None:
            self._show(self.take(len(self.text) - (0 if self.ended else held(self.text, _ENDS))))
            return False
        place, mark = found
        self._show(self.take(place))
        if mark != START:  # which belongs to the next head
            self.take(len(mark))
        self._end_reasoning()
        self._show, self.state = self.prose, self.begin
        return True

    def _end_reasoning(self) -> None:
        if self._reasoning_begun is not None:
            self.reasoning_spans.append((self._reasoning_begun, self._place))
            self._reasoning_begun = None


class Harmony(Dialect):
    name = "harmony"
    marks = MARKS
    parser = HarmonyParser

    def calls(self, lark: Lark, tools: Toolset) -> str:
        """One, as its end is the end of the turn."""
        text, again = self._parts(lark)
        analysis = self._head(lark, "analysis")
        return f"({analysis} {text} {again})* {self._call(lark, tools)}"

    def prose_or_calls(self, lark: Lark, tools: Toolset) -> str:
        return self._turn(lark, tools, self._parts(lark)[0])

    def answer(self, lark: Lark, tools: Toolset, content: str | None) -> str:
        if tools.required:
            return self.calls(lark, tools)
        return self._turn(lark, tools, content or self._parts(lark)[0])

    def _turn(self, lark: Lark, tools: Toolset, final_text: str) -> str:
        """Analysis and preambles, and then a call or the final message."""
        text, again = self._parts(lark)
        heads = one_of(self._head(lark, channel) for channel in ("analysis", "commentary"))
        final = f"{self._head(lark, 'final')} {final_text}"
        ends = [final, self._call(lark, tools)] if tools.tools else [final]
        return f"({heads} {text} {again})* {one_of(ends)}"

    def _parts(self, lark: Lark) -> tuple[str, str]:
        """A message's text, and what leads from one message to the next."""
        return lark.free_text(*_ENDS), f'{lark.mark(END)} {lark.mark(START)} "assistant"'

    def _head(self, lark: Lark, channel: str) -> str:
        return f"{lark.mark(CHANNEL)} {quoted(channel)} {lark.mark(MESSAGE)}"

    def _call(self, lark: Lark, tools: Toolset) -> str:
        format = f'{lark.mark(CONSTRAIN)} "json" {lark.mark(MESSAGE)}'
        return lark.rule(
            "call",
            " | ".join(
                f"{lark.mark(CHANNEL)} {quoted(f'commentary to=functions.{tool.name} ')} {format}"
                f" {arguments_of(lark, tool)}"
                for tool in tools.tools
            ),
        )

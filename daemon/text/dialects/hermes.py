"""Hermes, Qwen and many more: `<tool_call>{"name": …, "arguments": {…}}</tool_call>`."""

from __future__ import annotations

from typing import ClassVar

from quantd.daemon.text.dialects.dialect import Dialect, json_object, repeated
from quantd.daemon.text.dialects.json_calls import JsonCallParser
from quantd.daemon.text.dialects.scan import CallParser
from quantd.daemon.text.lark import Lark, one_of
from quantd.daemon.text.tools import Toolset

OPEN, CLOSE = "<tool_call>", "</tool_call>"


class HermesParser(JsonCallParser):
    opening = OPEN

    def begin(self) -> bool:
        if self.prose_until((OPEN,)) is None:
            return False
        self.state = self.object
        return True

    after_failure = begin

    def after_object(self) -> bool:
        if not self.pass_mark(CLOSE):
            return False
        self.state = self.begin
        return True


class Hermes(Dialect):
    name = "hermes"
    marks = (OPEN, CLOSE)
    parser: ClassVar[type[CallParser]] = HermesParser

    def calls(self, lark: Lark, tools: Toolset) -> str:
        return self._calls(lark, tools, lark.mark(OPEN))

    def prose_or_calls(self, lark: Lark, tools: Toolset) -> str:
        calls = self._calls(lark, tools, lark.until(OPEN))
        return one_of([lark.free_text(OPEN), calls])

    def _calls(self, lark: Lark, tools: Toolset, begin: str) -> str:
        body = lark.rule("body", f'"\\n" {self.body(lark, tools)} "\\n" {lark.mark(CLOSE)}')
        return repeated(tools, f"{begin} {body}", f'"\\n" {lark.mark(OPEN)} {body}')

    def body(self, lark: Lark, tools: Toolset) -> str:
        """One call between its marks."""
        return json_object(lark, tools, "arguments")

"""Mistral: `[TOOL_CALLS][{"name": …, "arguments": {…}}, …]`, and since the Tekken tokenizers of
2025 `[TOOL_CALLS]name[ARGS]{…}` for each call, in some with `[CALL_ID]…` before `[ARGS]`."""

from __future__ import annotations

import re

from quantd.daemon.text.dialects.dialect import (
    Dialect,
    arguments_of,
    json_object,
    listed,
    repeated,
    short_id,
)
from quantd.daemon.text.dialects.json_calls import JsonCallParser
from quantd.daemon.text.lark import Lark, one_of, quoted
from quantd.daemon.text.tools import Toolset

OPEN, CALL_ID, ARGS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
_NAMED = re.compile(r"\s*([^\s\[{]+)\s*(?:\[CALL_ID\][^\[{]*)?(?:\[ARGS\])?\s*(?=\{)")


class MistralParser(JsonCallParser):
    _in_list = False

    def begin(self) -> bool:
        if self.prose_until((OPEN,)) is None:
            return False
        self.opening, self.state = OPEN, self._form
        return True

    def after_failure(self) -> bool:
        self._in_list = False
        return self.begin()

    def _form(self) -> bool:
        rest = self.text.lstrip()
        if not rest:
            return False
        self._in_list = rest.startswith("[")
        if self._in_list:
            self.opening += self.take(len(self.text) - len(rest) + 1)
            self.state = self.object
        elif rest.startswith("{"):
            self.state = self.object
        else:
            self.state = self._name
        return True

    def _name(self) -> bool:
        head = _NAMED.match(self.text)
        if head is None:
            if not self.ended and "{" not in self.text:
                return False
            return self._no_name()
        if head[1] not in self.tools:
            return self._no_name()
        self.take(head.end())
        self.start(head[1])
        self.arguments()
        return True

    def _no_name(self) -> bool:
        self.num_failed_calls += 1
        self.prose(self.opening)
        self.state = self.begin
        return True

    def after_object(self) -> bool:
        if not self._in_list:
            self.state = self.begin
            return True
        rest = self.text.lstrip()
        if not rest and not self.ended:
            return False
        self.take(len(self.text) - len(rest))
        if rest.startswith(","):
            self.opening = self.take(1)
            self.state = self.object
        else:
            self.take(rest.startswith("]"))
            self.state = self.after_failure
        return True


class Mistral(Dialect):
    name = "mistral"
    marks = (OPEN, CALL_ID, ARGS)
    parser = MistralParser

    def new_id(self) -> str:
        return short_id()

    def calls(self, lark: Lark, tools: Toolset) -> str:
        return self._calls(lark, tools, lark.mark(OPEN))

    def prose_or_calls(self, lark: Lark, tools: Toolset) -> str:
        return one_of([lark.free_text(OPEN), self._calls(lark, tools, lark.until(OPEN))])

    def _calls(self, lark: Lark, tools: Toolset, begin: str) -> str:
        """The newer form where the tokenizer has its mark."""
        if not lark.is_special(ARGS):
            one = json_object(lark, tools, "arguments")
            return f'{begin} /\\s?/ "[" {listed(tools, one, ", ")} "]"'
        id = f"({lark.mark(CALL_ID)} /[A-Za-z0-9]{{9}}/)?" if lark.is_special(CALL_ID) else ""
        one = lark.rule(
            "named",
            " | ".join(
                f"{quoted(tool.name)} {id} {lark.mark(ARGS)} {arguments_of(lark, tool)}"
                for tool in tools.tools
            ),
        )
        return repeated(tools, f"{begin} {one}", f"{lark.mark(OPEN)} {one}")

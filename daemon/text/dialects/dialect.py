"""What a dialect is: the marks, the parser and the grammar of one way to write tool calls."""

from __future__ import annotations

import secrets
import string
from typing import ClassVar

from quantd.daemon.text.dialects.scan import CallParser
from quantd.daemon.text.lark import Lark, one_of, quoted
from quantd.daemon.text.tools import Tool, Toolset

_ANY_OBJECT = {"type": "object"}


class Dialect:
    """Without state. A grammar allows nothing that the parser would not take for what it is meant
    to be: content is never mistaken for a call, and each call is one."""

    name: ClassVar[str]
    marks: ClassVar[tuple[str, ...]]
    """Texts that the parser must see though they may be special tokens."""
    parser: ClassVar[type[CallParser]]

    def new_id(self) -> str:
        return "call_" + secrets.token_hex(12)

    def refusal(self, tool: Tool) -> str | None:
        """Why arguments cannot be held to the tool's schema, with the keyword; None: they can, if
        llguidance knows what the schema says."""
        return None

    def calls(self, lark: Lark, tools: Toolset) -> str:
        """One call or more."""
        raise NotImplementedError

    def prose_or_calls(self, lark: Lark, tools: Toolset) -> str:
        """Free text, or calls, maybe after text."""
        raise NotImplementedError

    def answer(self, lark: Lark, tools: Toolset, content: str | None) -> str:
        """All that comes after the reasoning. content: what constrains an answer without calls."""
        if tools.required:
            return self.calls(lark, tools)
        if content is not None:
            return one_of([content, self.calls(lark, tools)])
        return self.prose_or_calls(lark, tools)


def json_object(lark: Lark, tools: Toolset, key: str) -> str:
    """`{"name": …, key: …}` for each tool."""
    objects = []
    for tool in tools.tools:
        head = f'{{"name": {quoted(tool.name)}, {quoted(key)}: '
        objects.append(f"{quoted(head)} {arguments_of(lark, tool)} {quoted('}')}")
    return lark.rule("object", " | ".join(objects))


def arguments_of(lark: Lark, tool: Tool) -> str:
    return lark.json(tool.parameters if tool.strict else _ANY_OBJECT)


def repeated(tools: Toolset, first: str, further: str) -> str:
    """first, and then as many of `further` as there may be."""
    return f"{first} ({further})*" if tools.parallel else first


def listed(tools: Toolset, one: str, separator: str) -> str:
    return repeated(tools, one, f"{quoted(separator)} {one}")


def short_id() -> str:
    """Nine letters and digits, which Mistral's templates insist on."""
    alphabet = string.ascii_letters + string.digits
    return "".join(secrets.choice(alphabet) for _ in range(9))

"""How one model writes its answers: the marks of its reasoning, and the dialect of its tool calls.

Both are read off the chat template, which has to write old answers in the same way.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from quantd.daemon.errors import RequestError
from quantd.daemon.text import reasoning
from quantd.daemon.text.answer import AnswerParser, PlainAnswer
from quantd.daemon.text.dialects import BY_NAME, dialect_of
from quantd.daemon.text.dialects.dialect import Dialect
from quantd.daemon.text.dialects.harmony import Harmony
from quantd.daemon.text.lark import Lark
from quantd.daemon.text.reasoning import Marks, ReasoningParser
from quantd.daemon.text.tools import Toolset
from quantd.daemon.types import Grammar

_NO_TOOLS = Toolset(())
_EMBEDDED = ("json_schema", "regex")
"""Kinds of grammars that can be part of another."""
_SLASH = re.compile(r"(\\.)|/", re.DOTALL)


class AnswerFormat(NamedTuple):
    marks: Marks | None
    """Of reasoning; None: the model does not reason, or its dialect does it."""
    dialect: Dialect | None
    """None: the template takes no tools, or none that is known."""

    @classmethod
    def detect(cls, templates: Iterable[str], dialect: str = "auto") -> AnswerFormat:
        """dialect: a name in place of what the templates say."""
        text = "\n".join(templates)
        found = dialect_of(text) if dialect == "auto" else BY_NAME.get(dialect)
        if isinstance(found, Harmony):
            return cls(None, found)
        marks = next((marks for marks in reasoning.KNOWN if marks.close in text), None)
        return cls(marks, found)

    @property
    def special(self) -> tuple[str, ...]:
        """Marks that the parser must see though they may be special tokens."""
        return (*(self.marks or ()), *(self.dialect.marks if self.dialect else ()))

    def parser(self, prompt_end: str, tools: Toolset | None) -> AnswerParser:
        """prompt_end: the last characters of the prompt, special tokens included."""
        inner: AnswerParser = PlainAnswer()
        if self.dialect is not None and (tools is not None or self._has_channels):
            inner = self.dialect.parser(tools or _NO_TOOLS, self.dialect.new_id)
        if self.marks is None or _ends_with(prompt_end, self.marks.close):
            return inner
        is_open = _ends_with(prompt_end, self.marks.open)
        return ReasoningParser(self.marks, inner, is_open=is_open)

    def grammar(
        self,
        prompt_end: str,
        tools: Toolset | None,
        content: Grammar | None,
        special: Mapping[str, int],
    ) -> Grammar | None:
        """What the whole output may be: reasoning first, then calls, or content that obeys
        `content`. special: the tokenizer's special tokens. Raises RequestError without a param for
        a combination that is not served."""
        is_free = tools is None or tools.is_free
        if content is None and is_free:
            return None
        marks = self.marks
        if marks is not None and _ends_with(prompt_end, marks.close):
            marks = None
        is_open = marks is not None and _ends_with(prompt_end, marks.open)
        if content is not None and content.kind not in _EMBEDDED and not is_open:
            marks = None  # a model that may reason, but need not, does not
        if tools is None and marks is None and not self._has_channels:
            return content
        lark = Lark(special, avoid_first=marks.open if marks and not is_open else "")
        answer = self._answer(lark, tools, None if content is None else _rule(lark, content))
        if marks is not None:
            thought = f"{lark.until(marks.close, anything=True)} /\\s{{0,8}}/"
            if not is_open:
                thought = f"({lark.mark(marks.open)} {thought})?"
            answer = f"{thought} ({answer})"
        return Grammar("lark", lark.source(answer))

    def _answer(self, lark: Lark, tools: Toolset | None, content: str | None) -> str:
        if self.dialect is not None and (tools is not None or self._has_channels):
            return self.dialect.answer(lark, tools or _NO_TOOLS, content)
        assert content is not None, "without tools there is content to constrain"
        return content

    @property
    def reasons(self) -> bool:
        """Answers may have reasoning apart from their content."""
        return self.marks is not None or self._has_channels

    @property
    def _has_channels(self) -> bool:
        """The answer has to be parsed also without tools."""
        return isinstance(self.dialect, Harmony)


def _ends_with(prompt_end: str, mark: str) -> bool:
    return prompt_end.rstrip().endswith(mark)


def _rule(lark: Lark, content: Grammar) -> str:
    if content.kind == "json_schema":
        return lark.json(json.loads(content.source))
    if content.kind == "regex":
        slashed = _SLASH.sub(lambda found: found[1] or "\\/", content.source)
        return lark.rule("CONTENT", f"/{slashed}/")
    raise RequestError(
        "a grammar cannot be combined with tools, nor with reasoning that the prompt has begun; "
        "a JSON schema or a regular expression can"
    )

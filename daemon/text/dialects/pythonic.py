"""Python's literals: the answer is `[name(key="value"), …]`. Llama 3.2 and 4, if a template asks.

A call's arguments become JSON at the call's end.
"""

from __future__ import annotations

import ast
import keyword
import re
import warnings

from quantd.daemon.text.dialects.dialect import Dialect, listed
from quantd.daemon.text.dialects.flat import Parameter, flat_refusal, parameters_of
from quantd.daemon.text.dialects.json_calls import dump
from quantd.daemon.text.dialects.scan import Brackets, CallParser
from quantd.daemon.text.lark import Lark, one_of, quoted
from quantd.daemon.text.tools import Tool, Toolset

START, END = "<|python_start|>", "<|python_end|>"
_LIST = re.compile(r"\s*(?:\Z|\[\s*(?:\Z|[A-Za-z_][\w.-]*\s*(?:\Z|\()))")
"""The beginning of a list of calls, or what may become one."""
_NAME = re.compile(r"\s*(?:\Z|([A-Za-z_][\w.-]*)\s*(?:\Z|(\()))")
_JSON_NAMES = {"true": True, "false": False, "null": None}


class PythonicParser(CallParser):
    _brackets: Brackets | None = None
    _num_scanned = 0
    _opening = ""

    def begin(self) -> bool:
        """A list is one of calls only where the answer begins, or behind the mark."""
        rest = self.text.lstrip()
        if not self.ended and (not rest or (START.startswith(rest) and rest != START)):
            return False
        if rest.startswith("["):
            self.prose(self.take(len(self.text) - len(rest)))
            self.state = self._list
        else:
            self.state = self._text
        return True

    def _text(self) -> bool:
        if self.prose_until((START,)) is None:
            return False
        self._opening, self.state = START, self._list
        return True

    def _list(self) -> bool:
        found = _LIST.match(self.text)
        if found is None or (found.end() == len(self.text) and self.ended):
            return self._fail(0)
        if found.end() == len(self.text) and not found[0].endswith("("):
            return False
        self._opening += self.take(self.text.index("[") + 1)
        self.state = self._call
        return True

    def _call(self) -> bool:
        found = _NAME.match(self.text)
        if found is None or (self.ended and found[2] is None):
            return self._fail_call(0)
        if found[2] is None:
            return False
        if found[1] not in self.tools:
            return self._fail_call(0)
        if self._brackets is None:
            self._brackets, self._num_scanned = Brackets("\"'"), found.end() - 1
        end = self._brackets.end(self.text, self._num_scanned)
        self._num_scanned = len(self.text)
        if end is None:
            return self._fail_call(len(self.text)) if self.ended else False
        arguments = _arguments(self.text[found.end() - 1 : end])
        if arguments is None:
            return self._fail_call(end)
        self._brackets = None
        self.take(end)
        self.start(found[1])
        self.argue(arguments)
        self._opening, self.state = "", self._between
        return True

    def _between(self) -> bool:
        rest = self.text.lstrip()
        if not rest:
            return False
        self.take(len(self.text) - len(rest))
        if rest.startswith(","):
            self._opening, self.state = self.take(1), self._call
        else:
            self.take(rest.startswith("]"))
            self.state = self._end
        return True

    def _end(self) -> bool:
        if not self.pass_mark(END):
            return False
        self.state = self._text
        return True

    def _fail_call(self, count: int) -> bool:
        self.num_failed_calls += 1
        return self._fail(count)

    def _fail(self, count: int) -> bool:
        self._brackets = None
        self.prose(self._opening + self.take(count))
        self._opening, self.state = "", self._text
        return True


def _arguments(text: str) -> str | None:
    """`(key=literal, …)` as a JSON object, or None."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about escapes that Python does not know
            call = ast.parse(f"f{text}", mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            return None
        named = {item.arg: _value(item.value) for item in call.keywords}
        if None in named or len(named) < len(call.keywords):
            return None
        return dump(named)
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        return None


def _value(node: ast.expr) -> object:
    """A literal; JSON's names are understood too."""
    return ast.literal_eval(_Names().visit(node))


class _Names(ast.NodeTransformer):
    def visit_Name(self, node: ast.Name) -> ast.expr:
        if node.id not in _JSON_NAMES:
            return node
        return ast.copy_location(ast.Constant(_JSON_NAMES[node.id]), node)


class Pythonic(Dialect):
    name = "pythonic"
    marks = (START, END)
    parser = PythonicParser

    def refusal(self, tool: Tool) -> str | None:
        return flat_refusal(tool.parameters, _is_name, "a name in Python")

    def calls(self, lark: Lark, tools: Toolset) -> str:
        one = lark.rule("call", " | ".join(self._call(lark, tool) for tool in tools.tools))
        calls = f'"[" {listed(tools, one, ", ")} "]"'
        if not lark.is_special(START):
            return calls
        return one_of([calls, f"{lark.mark(START)} {calls} {lark.mark(END)}"])

    def prose_or_calls(self, lark: Lark, tools: Toolset) -> str:
        """An answer that begins with a bracket is a call."""
        text = lark.free_text(START, not_first="[")
        return one_of([text, self.calls(lark, tools)])

    def _call(self, lark: Lark, tool: Tool) -> str:
        if not tool.strict:
            argument = lark.rule("argument", f'/[A-Za-z_][A-Za-z0-9_]*/ "=" {lark.json({})}')
            inner = f'({argument} (", " {argument})*)?'
        else:
            inner = self._arguments(lark, tool)
        return f'{quoted(tool.name + "(")} {inner} ")"'

    def _arguments(self, lark: Lark, tool: Tool) -> str:
        """In the schema's order; those that are not required may be missing. Values are JSON,
        which the parser takes, but for Python's names of true, false and null."""
        further = lark.rule("further", '""')
        first: list[str] = []
        for parameter in reversed(parameters_of(tool.parameters)):
            one = f"{quoted(parameter.key + '=')} {self._value(lark, parameter)}"
            if parameter.required:
                first = [f"{one} {further}"]
                further = lark.rule("further", f'", " {one} {further}')
            else:
                first = [f"{one} {further}", *first]
                further = lark.rule("further", f'(", " {one})? {further}')
        if not any(parameter.required for parameter in parameters_of(tool.parameters)):
            first.append('""')
        return lark.rule("arguments", " | ".join(first))

    def _value(self, lark: Lark, parameter: Parameter) -> str:
        if parameter.schema == {"type": "boolean"}:
            return one_of([quoted("True"), quoted("False")])
        return lark.json(parameter.schema)


def _is_name(key: str) -> bool:
    return key.isidentifier() and key.isascii() and not keyword.iskeyword(key)

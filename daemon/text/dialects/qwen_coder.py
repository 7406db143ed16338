"""Qwen3-Coder: one XML element per parameter.

`<tool_call><function=name><parameter=key>value</parameter>…</function></tool_call>`. Values stand
there as they are, without quotes; the tool's schema says which are strings. A parameter becomes
JSON at its end.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantd.daemon.text.dialects.flat import Parameter, flat_refusal, is_string, parameters_of
from quantd.daemon.text.dialects.hermes import CLOSE, OPEN, Hermes
from quantd.daemon.text.dialects.json_calls import dump, load
from quantd.daemon.text.dialects.scan import Brackets, CallParser, first_of
from quantd.daemon.text.lark import Lark, escaped, one_of, quoted
from quantd.daemon.text.tools import Tool, Toolset

FUNCTION, FUNCTION_END = "<function=", "</function>"
PARAMETER, PARAMETER_END = "<parameter=", "</parameter>"
_PYTHON = {"True": "true", "False": "false", "None": "null"}
"""Templates that print Python's values have taught models these."""
_OF_STRINGS = {"type", "enum", "const", "title", "description", "default", "examples"}


class QwenCoderParser(CallParser):
    _name = ""
    _key = ""
    _num_keys = 0
    _brackets: Brackets | None = None
    """Of a value in JSON."""
    _num_scanned = 0
    _json_end: int | None = None

    def begin(self) -> bool:
        if self.prose_until((OPEN,)) is None:
            return False
        self.state = self._function
        return True

    def _function(self) -> bool:
        rest = self.text.lstrip()
        name, bracket, _ = rest.removeprefix(FUNCTION).partition(">")
        begins = rest.startswith(FUNCTION)
        if not bracket and not self.ended and (begins or FUNCTION.startswith(rest)):
            return False
        if not begins or not bracket or name.strip() not in self.tools:
            self.num_failed_calls += 1
            self.prose(OPEN)
            self.state = self.begin
            return True
        self.take(self.text.index(">") + 1)
        self._name, self._num_keys = name.strip(), 0
        self.start(self._name)
        self.state = self._parameters
        return True

    def _parameters(self) -> bool:
        """Between parameters. What is neither one nor the end of the function is passed over."""
        found = first_of(self.text, (PARAMETER, FUNCTION_END, CLOSE))
        if found is None:
            if self.ended:
                self.take(len(self.text))
            return False
        place, mark = found
        if mark != PARAMETER:
            self.take(place + len(FUNCTION_END) * (mark == FUNCTION_END))
            self.argue("{}" if self._num_keys == 0 else "}")
            self.state = self._close
            return True
        key, bracket, _ = self.text[place + len(PARAMETER) :].partition(">")
        if not bracket:
            if self.ended:
                self.take(len(self.text))
            return False
        self.take(place + len(PARAMETER) + len(key) + 1)
        self._key = key.strip()
        self.argue(("{" if self._num_keys == 0 else ", ") + dump(self._key) + ": ")
        self._num_keys += 1
        self.state = self._value
        return True

    def _value(self) -> bool:
        end = self._value_end()
        if end < 0:
            if self.ended:  # cut off: as much of the JSON as there is
                value = self.take(len(self.text)).removeprefix("\n")
                self.argue(self._json(value).removesuffix('"'))
            return False
        self._brackets = self._json_end = None
        value = self.take(end).removeprefix("\n").removesuffix("\n")
        self.take(len(PARAMETER_END))
        self.argue(self._json(value))
        self.state = self._parameters
        return True

    def _value_end(self) -> int:
        """Where the parameter's end begins; negative: it is not there. In JSON it is text inside
        of a string, unless the JSON never ends."""
        rest = self.text.lstrip()
        if is_string(self._schema()) or not rest.startswith(("{", "[")):
            return self.text.find(PARAMETER_END)
        if self._brackets is None:
            self._brackets, self._num_scanned = Brackets(), len(self.text) - len(rest)
        if self._json_end is None:
            self._json_end = self._brackets.end(self.text, self._num_scanned)
            self._num_scanned = len(self.text)
        if self._json_end is None:
            return self.text.find(PARAMETER_END) if self.ended else -1
        return self.text.find(PARAMETER_END, self._json_end)

    def _close(self) -> bool:
        if not self.pass_mark(CLOSE):
            return False
        self.state = self.begin
        return True

    def _json(self, value: str) -> str:
        return as_json(value, self._schema())

    def _schema(self) -> object:
        properties = self.tools[self._name].parameters.get("properties")
        return properties.get(self._key) if isinstance(properties, Mapping) else None


def as_json(value: str, schema: Any) -> str:
    """A bare value as JSON: a string where only strings are allowed or where it is not JSON."""
    if is_string(schema):
        return dump(value)
    value = _PYTHON.get(value.strip(), value)
    try:
        load(value)
    except (ValueError, RecursionError):
        return dump(value)
    return value.strip()


class QwenCoder(Hermes):
    name = "qwen_coder"
    parser = QwenCoderParser

    def refusal(self, tool: Tool) -> str | None:
        reason = flat_refusal(tool.parameters, _is_key, "without line breaks, < and >")
        if reason is not None:
            return reason
        for parameter in parameters_of(tool.parameters):
            if is_string(parameter.schema):
                unknown = sorted(parameter.schema.keys() - _OF_STRINGS)
                if unknown:
                    return f"properties.{parameter.key}: {unknown[0]} of a string is not supported"
        return None

    def body(self, lark: Lark, tools: Toolset) -> str:
        return lark.rule("function", " | ".join(self._function(lark, t) for t in tools.tools))

    def _function(self, lark: Lark, tool: Tool) -> str:
        if tool.strict:
            inner = " ".join(
                one if parameter.required else f"({one})?"
                for parameter in parameters_of(tool.parameters)
                if (one := self._parameter(lark, parameter))
            )
        else:
            inner = f'("{PARAMETER}" /[^<>\\s]+/ ">\\n" {self._string(lark)})*'
        return f'{quoted(f"{FUNCTION}{tool.name}>")} "\\n" {inner} "{FUNCTION_END}"'

    def _parameter(self, lark: Lark, parameter: Parameter) -> str:
        """With the line end after it."""
        schema = parameter.schema
        if not is_string(schema):
            value = f'{lark.json(schema)} "\\n{PARAMETER_END}\\n"'
        elif "enum" in schema or "const" in schema:
            texts = schema.get("enum", [schema.get("const")])
            value = f'{one_of(map(quoted, texts))} "\\n{PARAMETER_END}\\n"'
        else:
            value = self._string(lark)
        return lark.rule("parameter", f'{quoted(f"{PARAMETER}{parameter.key}>")} "\\n" {value}')

    def _string(self, lark: Lark) -> str:
        """Up to the first end of a parameter, which a line end precedes."""
        body = f"{lark.free_text(PARAMETER_END)} /\\n{escaped(PARAMETER_END)}/"
        return f'{lark.rule("string[lazy]", lark.rule("STRING", body))} "\\n"'


def _is_key(key: str) -> bool:
    return bool(key) and key == key.strip() and not set(key) & set("<>\r\n")

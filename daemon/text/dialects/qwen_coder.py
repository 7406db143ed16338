"""Qwen3-Coder: one XML element per parameter.

`<tool_call><function=name><parameter=key>value</parameter>…</function></tool_call>`. Values stand
there as they are, without quotes; the tool's schema says which are strings. A parameter becomes
JSON at its end.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantd.daemon.text.dialects.json_calls import dump, load
from quantd.daemon.text.dialects.scan import CallParser, first_of

OPEN, CLOSE = "<tool_call>", "</tool_call>"
FUNCTION, FUNCTION_END = "<function=", "</function>"
PARAMETER, PARAMETER_END = "<parameter=", "</parameter>"


class QwenCoderParser(CallParser):
    _name = ""
    _key = ""
    _num_keys = 0

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
        end = self.text.find(PARAMETER_END)
        if end < 0:
            if self.ended:  # cut off: as much of the JSON as there is
                value = self.take(len(self.text)).removeprefix("\n")
                self.argue(self._json(value).removesuffix('"'))
            return False
        value = self.take(end).removeprefix("\n").removesuffix("\n")
        self.take(len(PARAMETER_END))
        self.argue(self._json(value))
        self.state = self._parameters
        return True

    def _close(self) -> bool:
        if not self.pass_mark(CLOSE):
            return False
        self.state = self.begin
        return True

    def _json(self, value: str) -> str:
        properties = self.tools[self._name].parameters.get("properties")
        schema = properties.get(self._key) if isinstance(properties, Mapping) else None
        return as_json(value, schema)


def as_json(value: str, schema: Any) -> str:
    """A bare value as JSON: a string where only strings are allowed or where it is not JSON."""
    if is_string(schema):
        return dump(value)
    try:
        load(value)
    except (ValueError, RecursionError):
        return dump(value)
    return value.strip()


def is_string(schema: Any) -> bool:
    """Does the schema allow strings only?"""
    if not isinstance(schema, Mapping):
        return False
    if "enum" in schema and isinstance(schema["enum"], list):
        return all(isinstance(item, str) for item in schema["enum"])
    if "const" in schema:
        return isinstance(schema["const"], str)
    return schema.get("type") in ("string", ["string"])

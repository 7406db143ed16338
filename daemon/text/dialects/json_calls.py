"""Calls that are JSON objects with a name and arguments: what Hermes, Llama 3 and Mistral share."""

from __future__ import annotations

import json
import re
from typing import Any

from quantd.daemon.text.dialects.scan import Brackets, CallParser

_HEAD = re.compile(
    r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)',
    re.DOTALL,
)
_SPACE = re.compile(r"\s*")


class JsonCallParser(CallParser):
    """Arguments are passed on as they come, byte for byte, where the name comes first; else the
    object is taken as a whole. What turns out to be no call is content, mark included."""

    opening = ""
    """What stood before the object, to be shown if it is no call."""
    _whole: Brackets | None = None
    _num_scanned = 0

    def after_object(self) -> bool:
        """The state after a call's object."""
        raise NotImplementedError

    def after_failure(self) -> bool:
        """The state after an object that is no call."""
        raise NotImplementedError

    def object(self) -> bool:
        """State: an object should begin here, maybe after white space."""
        head = _HEAD.match(self.text)
        name = _string(head[1]) if head else None
        if head and name in self.tools:
            self.take(head.end())
            self._whole = None
            self.start(name)
            self.arguments()
            return True
        return self._take_whole()

    def arguments(self) -> None:
        """To the state that passes arguments on; `text` begins with their brace."""
        self._arguments = Brackets()
        self.state = self._pass_arguments

    def _pass_arguments(self) -> bool:
        end = self._arguments.end(self.text)
        if end is None:
            self.argue(self.take(len(self.text)))
            return False
        self.argue(self.take(end))
        self.state = self._close
        return True

    def _close(self) -> bool:
        """Behind arguments that were passed on: the end of their object, maybe further keys."""
        rest = self.text.lstrip()
        if not rest:
            return False
        if rest.startswith(","):
            key = rest[1:].lstrip()
            if not key:
                return False
            if key.startswith('"'):
                self._arguments = Brackets(depth=1)
                self.state = self._skip_keys
                return True
        if rest.startswith("}"):
            self.take(len(self.text) - len(rest) + 1)
        self.state = self.after_object
        return True

    def _skip_keys(self) -> bool:
        """Ids, mostly; ours are others."""
        end = self._arguments.end(self.text)
        if end is None:
            self.take(len(self.text))
            return False
        self.take(end)
        self.state = self.after_object
        return True

    def _take_whole(self) -> bool:
        begin = _end(_SPACE, self.text)
        if begin == len(self.text):
            return False
        if not self.text.startswith("{", begin):
            return self._fail(begin)
        if self._whole is None:
            self._whole, self._num_scanned = Brackets(), begin
        end = self._whole.end(self.text, self._num_scanned)
        self._num_scanned = len(self.text)
        if end is None:
            return self._fail(len(self.text)) if self.ended else False
        found = self._call(self.text[begin:end])
        if found is None:
            return self._fail(end)
        self._whole = None
        self.take(end)
        self.start(found[0])
        self.argue(found[1])
        self.state = self.after_object
        return True

    def _fail(self, count: int) -> bool:
        self._whole = None
        self.num_failed_calls += bool(self.opening)  # else it was JSON, and maybe no call
        self.prose(self.opening + self.take(count))
        self.state = self.after_failure
        return True

    def _call(self, text: str) -> tuple[str, str] | None:
        """Name and arguments of an object whose keys come in another order, or None."""
        try:
            found: Any = load(text)
            arguments: Any = found.get("arguments", found.get("parameters", {}))
            if isinstance(arguments, str):
                arguments = load(arguments)
            name = found.get("name")
            if isinstance(name, str) and name in self.tools and isinstance(arguments, dict):
                return name, dump(arguments)
        except (ValueError, RecursionError):
            pass
        return None


def load(text: str) -> object:
    """Python's reader takes NaN and Infinity, which are not JSON. Raises ValueError."""
    value: object = json.loads(text, parse_constant=_refuse)
    return value


def _refuse(name: str) -> object:
    raise ValueError(f"{name} is not JSON")


def dump(value: object) -> str:
    """JSON as readable as can be sent: halves of UTF-16 pairs cannot. Raises ValueError."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value)
    return text


def _string(quoted: str) -> str | None:
    try:
        text: str = json.loads(quoted, strict=False)
    except ValueError:
        return None
    return text


def _end(pattern: re.Pattern[str], text: str) -> int:
    found = pattern.match(text)
    assert found is not None, "it matches the empty string"
    return found.end()

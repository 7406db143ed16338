"""Hermes, Qwen and many more: `<tool_call>{"name": …, "arguments": {…}}</tool_call>`."""

from __future__ import annotations

from quantd.daemon.text.dialects.json_calls import JsonCallParser

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
        """The object's own brace, if the arguments were passed on before it."""
        rest = self.text.lstrip()
        if rest.startswith("}"):
            self.take(len(self.text) - len(rest) + 1)
        elif not rest:
            return False
        self.state = self._close
        return True

    def _close(self) -> bool:
        if not self.pass_mark(CLOSE):
            return False
        self.state = self.begin
        return True

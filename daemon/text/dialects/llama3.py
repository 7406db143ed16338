"""Llama 3.1 to 4: the answer is `{"name": …, "parameters": {…}}`, maybe behind
`<|python_tag|>`; further calls come after `;`."""

from __future__ import annotations

from quantd.daemon.text.dialects.dialect import Dialect, json_object, listed
from quantd.daemon.text.dialects.json_calls import JsonCallParser
from quantd.daemon.text.lark import Lark, one_of
from quantd.daemon.text.tools import Toolset

TAG = "<|python_tag|>"
_BETWEEN = " \t\r\n;"


class Llama3Parser(JsonCallParser):
    def begin(self) -> bool:
        """An object without a tag is a call only where the answer begins, or after a call."""
        begin = len(self.text) - len(self.text.lstrip())
        if begin == len(self.text):
            return self._leave_to_prose() if self.ended else False
        if self.text.startswith("{", begin):
            self.prose(self.take(begin))
            self.opening, self.state = "", self.object
            return True
        return self._leave_to_prose()

    def _leave_to_prose(self) -> bool:
        self.state = self._text
        return True

    def _text(self) -> bool:
        if self.prose_until((TAG,)) is None:
            return False
        self.opening, self.state = TAG, self.object
        return True

    after_failure = _text

    def after_object(self) -> bool:
        rest = self.text.lstrip(_BETWEEN)
        if not rest and not self.ended:
            return False
        self.take(len(self.text) - len(rest))
        self.state = self.begin
        return True


class Llama3(Dialect):
    name = "llama3"
    marks = (TAG,)
    parser = Llama3Parser

    def calls(self, lark: Lark, tools: Toolset) -> str:
        one = json_object(lark, tools, "parameters")
        calls = listed(tools, one, "; ")
        return f"{lark.mark(TAG)}? {calls}" if lark.is_special(TAG) else calls

    def prose_or_calls(self, lark: Lark, tools: Toolset) -> str:
        """An answer that begins with a brace is a call."""
        text = lark.free_text(TAG, not_first="{")
        return one_of([text, self.calls(lark, tools)])

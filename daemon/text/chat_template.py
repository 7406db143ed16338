"""Chat templates: Jinja that comes with a model, in a sandbox and within bounds.

The environment is that of transformers (its `chat_template_utils`), for which templates are
written. A template cannot reach Python's internals (Jinja's sandbox), and it cannot run or grow
without end: every turn of a loop and every call of a macro looks at the clock, and the output and
whatever an operator, a filter or a method builds have a longest length (`text/bounds.py`).
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from quantd.daemon.errors import RequestError
from quantd.daemon.text.bounds import BoundExceeded, Bounds, dump_json
from quantd.daemon.text.messages import template_messages

if TYPE_CHECKING:
    from jinja2 import Template

_RESERVED = frozenset({"messages", "tools", "add_generation_prompt"})
_MARK = "ContinuesHere"


class ChatTemplate:
    """One template. Compiled at the first use, so that loading a model does not import Jinja."""

    def __init__(
        self,
        source: str,
        named_tokens: Mapping[str, str],
        *,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        """named_tokens: bos_token and the like, as variables of these names."""
        self._source = source
        self._named_tokens = named_tokens
        self._clock = clock
        self._now = now

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Raises RequestError: a template refuses messages that it was not made for (no system
        role, roles that do not alternate), and says so through its own exceptions."""
        variables = variables or {}
        if clash := sorted(_RESERVED.intersection(variables)):
            raise RequestError(
                f"chat_template_kwargs must not set {', '.join(clash)}",
                param="chat_template_kwargs",
            )
        if continue_final_message and add_generation_prompt:
            raise RequestError(
                "add_generation_prompt and continue_final_message exclude each other",
                param="continue_final_message",
            )
        converted = template_messages(messages)
        if not self._knows_developers:
            for message in converted:
                if message.get("role") == "developer":
                    message["role"] = "system"
        mark = _mark_final_message(converted) if continue_final_message else None
        text = self._run(
            {
                "documents": None,
                **self._named_tokens,
                **variables,
                "messages": converted,
                "tools": tools or None,
                "add_generation_prompt": add_generation_prompt,
            }
        )
        if mark is None:
            return text
        cut = text.rfind(mark)
        if cut < 0:
            raise RequestError(
                "continue_final_message: the chat template does not show the final message's text",
                param="continue_final_message",
            )
        return text[:cut]

    @functools.cached_property
    def _knows_developers(self) -> bool:
        """Else the role is shown as "system", whose newer name it is: many templates, Qwen's among
        them, pass over a role that they do not know, and the model never sees what it said."""
        return "developer" in self._source

    @functools.cached_property
    def _template(self) -> Template:
        from jinja2 import TemplateError

        from quantd.daemon.text.sandbox import compile_template

        try:
            return compile_template(self._source, tojson=_tojson, now=self._now)
        except TemplateError as error:
            line = getattr(error, "lineno", None)
            raise RequestError(
                f"this model's chat template is not valid: {error}"
                + (f" (line {line})" if line else ""),
                param="messages",
            ) from error

    def _run(self, variables: Mapping[str, Any]) -> str:
        from quantd.daemon.text.sandbox import helpers

        template = self._template
        account = Bounds(self._clock)
        try:
            with account.in_force():
                return template.render({**variables, **helpers(account)})
        except BoundExceeded as error:
            raise _failed(str(error)) from error
        except RecursionError as error:
            raise _failed("recursed too deeply") from error
        except Exception as error:  # whatever an expression on odd messages may raise
            raise _failed(
                f"refused these messages: {str(error) or type(error).__name__}"
            ) from error


def _failed(how: str) -> RequestError:
    return RequestError(f"this model's chat template {how}", param="messages")


def _mark_final_message(messages: list[dict[str, Any]]) -> str:
    """Append a mark to the final message's text and return it: where it comes out, the rest of
    the turn is cut off. Looking for the text itself would find an earlier, equal one."""
    content = messages[-1]["content"]
    if not isinstance(content, str):
        raise RequestError(
            "continue_final_message: the final message's content must be text",
            param="continue_final_message",
        )
    mark = _MARK
    while any(mark in str(message["content"]) for message in messages):
        mark += _MARK
    messages[-1] = {**messages[-1], "content": content + mark}
    return mark


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML and sorts keys; models were trained on neither."""
    return dump_json(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )

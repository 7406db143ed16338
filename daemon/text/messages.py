"""Chat messages in the shape that chat templates expect.

Templates were written for transformers: a text is a string, a tool call's arguments are an object,
reasoning is called reasoning_content. API requests have other shapes for the same things.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from quantd.daemon.errors import RequestError
from quantd.daemon.text.dialects.json_calls import load

_REASONING_NAMES = ("reasoning_content", "reasoning", "thinking")


def template_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """New messages; the given ones are not changed. Raises RequestError with param "messages"."""
    if not messages:
        raise RequestError("messages must not be empty", param="messages")
    return [_template_message(i, message) for i, message in enumerate(messages)]


def _template_message(index: int, message: Mapping[str, Any]) -> dict[str, Any]:
    converted = dict(message)
    converted["content"] = _content(message.get("content"))
    if message.get("tool_calls"):
        converted["tool_calls"] = [
            _tool_call(f"messages[{index}].tool_calls[{i}]", call)
            for i, call in enumerate(message["tool_calls"])
        ]
    reasoning = next((message[n] for n in _REASONING_NAMES if message.get(n) is not None), None)
    if reasoning is not None:
        converted = {"thinking": reasoning, **converted, "reasoning_content": reasoning}
    return converted


def _content(content: Any) -> Any:
    """Parts that are all text become one string, joined by line ends as in vLLM: few templates
    take parts. None becomes the empty string, or templates would print "None"."""
    if content is None:
        return ""
    if isinstance(content, list) and all(
        isinstance(part, dict) and isinstance(part.get("text"), str) for part in content
    ):
        return "\n".join(part["text"] for part in content)
    return content


def _tool_call(where: str, call: Mapping[str, Any]) -> dict[str, Any]:
    converted = dict(call)
    function = call.get("function")
    if isinstance(function, Mapping) and isinstance(function.get("arguments"), str):
        text = function["arguments"] or "{}"
        try:
            arguments = load(text)
            if "\\u" in text:  # half a pair of UTF-16 is no text
                json.dumps(arguments, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as error:
            raise RequestError(
                f"{where}.function.arguments is not valid JSON: {error}", param="messages"
            ) from error
        converted["function"] = {**function, "arguments": arguments}
    return converted

"""A body of Anthropic's as the chat that it means: what is checked without a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from quantd.daemon.errors import RequestError
from quantd.daemon.server import chat
from quantd.daemon.server.anthropic.content import read_messages
from quantd.daemon.server.anthropic.errors import THREADS_UNSUPPORTED
from quantd.daemon.server.anthropic.schemas import CountBody, MessagesBody, ToolChoice
from quantd.daemon.server.limits import POSITIVE
from quantd.daemon.server.sampling import Options, integer, out_of_range, refuse_unserved
from quantd.daemon.server.schemas import ChatBody, Json

_NAMES = (
    ("response_format.json_schema", "output_config.format"),
    ("response_format", "output_config.format"),
    ("max_completion_tokens", "max_tokens"),
    ("a stop string", "stop_sequences: a stop string"),
    ("stop has", "stop_sequences has"),
    (".function.parameters", ".input_schema"),
    (".function.", "."),
)
"""What errors say of a chat's fields → the same of this API's."""
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


@dataclass(frozen=True, slots=True)
class Wanted:
    """A checked body."""

    chat: ChatBody
    options: Options
    shows_thinking: bool


def check(body: CountBody) -> Wanted:
    """Raises RequestError; needs no model."""
    refuse_unserved(body, ("mcp_servers", "container"))
    if isinstance(body, MessagesBody) and body.thread is not None:
        raise RequestError(
            "thread: this server keeps no conversations; send all messages",
            param="thread",
            code=THREADS_UNSUPPORTED,
        )
    if not body.messages:
        raise RequestError("messages must have at least 1 message, got 0", param="messages")
    with renamed():
        made = _chat_of(body)
        # As with Anthropic's models of today, the context's end is an end and no error: clients
        # send the largest `max_tokens` that any model has.
        options = replace(chat.read_options_of(made), max_tokens_may_shrink=True)
        return Wanted(made, options, _shows_thinking(body))


def _chat_of(body: CountBody) -> ChatBody:
    fields: dict[str, Any] = {}
    if isinstance(body, MessagesBody):
        fields = {
            "max_completion_tokens": integer("max_tokens", body.max_tokens, 1, POSITIVE),
            "stop": body.stop_sequences,
            "stream": body.stream,
            "temperature": body.temperature,
            "top_p": body.top_p,
            "top_k": body.top_k,
        }
    choice = body.tool_choice
    messages = read_messages(body)
    config = body.output_config
    return ChatBody(
        **fields,
        model=body.model,
        messages=messages,
        # An assistant's message at the end is the beginning of the answer.
        continue_final_message=messages[-1].role == "assistant",
        tools=_tools(body.tools),
        tool_choice=None if choice is None else _tool_choice(choice),
        parallel_tool_calls=not (choice is not None and choice.disable_parallel_tool_use),
        reasoning_effort=None if config is None else config.effort,
        response_format=_format(body),
        chat_template_kwargs=_template_variables(body),
    )


def _tools(tools: list[dict[str, Json]] | None) -> list[dict[str, Json]] | None:
    made = []
    for index, tool in enumerate(tools or ()):
        kind = tool.get("type")
        if kind not in (None, "custom"):
            raise RequestError(
                f"tools[{index}].type: {kind!r:.200} runs at Anthropic's and is not supported by "
                "this server; tools with an input_schema are",
                param=f"tools[{index}].type",
                code="unsupported_parameter",
            )
        if "input_schema" not in tool:
            field = f"tools[{index}].input_schema"
            raise RequestError(f"{field}: this field is required", param=field)
        # In the order in which the other APIs' clients have them: models were trained on it.
        function = {
            ours: tool[theirs]
            for ours, theirs in (
                ("name", "name"),
                ("description", "description"),
                ("parameters", "input_schema"),
                ("strict", "strict"),
            )
            if theirs in tool
        }
        made.append({"type": "function", "function": function})
    return made or None


def _tool_choice(choice: ToolChoice) -> Json:
    if choice.type == "tool":
        if choice.name is None:
            raise RequestError("tool_choice.name: this field is required", param="tool_choice.name")
        return {"type": "function", "function": {"name": choice.name}}
    if choice.type not in _CHOICES:
        raise out_of_range("tool_choice.type", choice.type[:64], "'auto', 'any', 'tool' or 'none'")
    return _CHOICES[choice.type]


def _format(body: CountBody) -> Json:
    format = None if body.output_config is None else body.output_config.format
    if format is not None and body.output_format is not None:
        raise RequestError(
            "output_config.format and output_format both constrain the output; give one of them",
            param="output_format",
        )
    format = body.output_format if format is None else format
    if format is None:
        return None
    if format.get("type") != "json_schema" or "schema" not in format:
        raise RequestError(
            'output_config.format must be {"type": "json_schema", "schema": …}',
            param="output_config.format",
        )
    return {"type": "json_schema", "json_schema": {"name": "output", "schema": format["schema"]}}


def _template_variables(body: CountBody) -> dict[str, Json] | None:
    thinking = body.thinking
    if thinking is None or thinking.type == "adaptive":
        return None  # the model decides
    if thinking.type not in ("enabled", "disabled"):
        limit = "'enabled', 'disabled' or 'adaptive'"
        raise out_of_range("thinking.type", thinking.type[:64], limit)
    return {"enable_thinking": thinking.type == "enabled"}


def _shows_thinking(body: CountBody) -> bool:
    """Only to who has asked for it: many clients take the first block for the text."""
    thinking = body.thinking
    return thinking is not None and thinking.type != "disabled" and thinking.display != "omitted"


@contextmanager
def renamed() -> Iterator[None]:
    """Errors of the chat's fields under the names that they have here."""
    try:
        yield
    except RequestError as error:
        for theirs, ours in _NAMES:
            error.message = error.message.replace(theirs, ours)
        error.args = (error.message,)
        raise

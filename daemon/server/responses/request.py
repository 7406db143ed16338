"""The body of POST /v1/responses: what is checked without a model, and the chat that it means."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec

from quantd.daemon.errors import RequestError
from quantd.daemon.server import chat
from quantd.daemon.server.limits import LOGPROBS, METADATA, one_of
from quantd.daemon.server.metadata import check_metadata
from quantd.daemon.server.responses.items import (
    AnyItem,
    InputItem,
    Reference,
    messages_of,
    read_items,
)
from quantd.daemon.server.sampling import (
    Options,
    integer,
    out_of_range,
    refuse_unserved,
)
from quantd.daemon.server.schemas import (
    ChatBody,
    Count,
    GenerationBody,
    Integer,
    Json,
    Logprobs,
    Message,
    Refused,
)

_ENCRYPTED = "reasoning.encrypted_content"
_LOGPROBS = "message.output_text.logprobs"
_INCLUDABLE = (_LOGPROBS, _ENCRYPTED)
"""The second is taken from clients that always send it, and there is none: reasoning is in the
clear, in `content`."""
_UNSERVED = (
    "prompt",
    "context_management",
    "moderation",
    "background_options",
    "access_programs",
    "image",
    "max_tokens",
    "n",
    "best_of",
    "request_id",
    "return_token_ids",
)
_NAMES = (
    ("response_format.json_schema", "text.format"),
    ("response_format", "text.format"),
    ("max_completion_tokens", "max_output_tokens"),
    ("max_tokens", "max_output_tokens"),
    ("reasoning_effort", "reasoning.effort"),
    ("messages", "input"),
)
"""A chat's field → this API's, for errors."""


class ConversationRef(msgspec.Struct):
    id: str


class Reasoning(msgspec.Struct):
    effort: str | None = None
    summary: str | None = None
    generate_summary: str | None = None


class TextOptions(msgspec.Struct):
    format: dict[str, Json] | None = None
    verbosity: str | None = None


class ContextBody(GenerationBody, kw_only=True):
    """What both creating a response and counting its tokens take."""

    input: str | list[InputItem] | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    conversation: str | ConversationRef | None = None
    tools: list[dict[str, Json]] | None = None
    tool_choice: str | dict[str, Json] | None = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    text: TextOptions | None = None
    truncation: Annotated[str | None, one_of(None, "auto", "disabled")] = None


class ResponseBody(ContextBody, kw_only=True):
    max_output_tokens: Count | None = None
    metadata: Annotated[dict[str, str], METADATA] | None = None
    store: bool | None = None
    background: bool | None = None
    include: list[Annotated[str, one_of(*_INCLUDABLE)]] | None = None
    top_logprobs: Logprobs | None = None
    max_tool_calls: Integer | None = None
    """Of hosted tools, and there are none: without effect."""

    max_tokens: Annotated[Integer | None, one_of(None)] = None
    """Here it is max_output_tokens."""
    n: Annotated[Integer | None, one_of(None)] = None
    """Here there is one answer."""
    best_of: Annotated[Integer | None, one_of(None)] = None
    request_id: Annotated[str | None, one_of(None)] = None
    return_token_ids: Annotated[bool | None, one_of(None, False)] = None
    prompt: Refused = None
    context_management: Refused = None
    moderation: Refused = None
    background_options: Refused = None
    access_programs: Refused = None
    image: Refused = None


@dataclass(frozen=True, slots=True)
class Wanted:
    """A checked body."""

    body: ResponseBody
    items: list[AnyItem | Reference]
    chat: ChatBody
    """All but its messages and its id."""
    options: Options
    conversation: str | None

    @property
    def is_kept(self) -> bool:
        return self.body.store is not False

    @property
    def may_drop(self) -> bool:
        """Turns may be left out of the context where it is too long."""
        return self.body.truncation == "auto"


def check(body: ResponseBody) -> Wanted:
    """Raises RequestError; needs no model and no store."""
    refuse_unserved(body, _UNSERVED)
    conversation = check_context(body)
    check_metadata(body.metadata)
    if body.background and body.store is False:
        raise RequestError("background needs store to be true", param="background")
    for name in body.include or ():
        if name not in _INCLUDABLE:
            raise out_of_range("include", name[:64], "one of " + ", ".join(_INCLUDABLE))
    with renamed():
        made = chat_of(body, [Message(role="user", content="")])
        options = chat.read_options_of(made)
    return Wanted(body, read_items(body.input), made, options, conversation)


def check_context(body: ContextBody) -> str | None:
    """The conversation's id. Raises RequestError."""
    conversation = body.conversation
    if isinstance(conversation, ConversationRef):
        conversation = conversation.id
    if conversation is not None and body.previous_response_id is not None:
        raise RequestError(
            "conversation and previous_response_id cannot both be given",
            param="previous_response_id",
        )
    if body.truncation not in (None, "auto", "disabled"):
        raise out_of_range("truncation", body.truncation[:64], "'auto' or 'disabled'")
    reasoning = body.reasoning or Reasoning()
    for name in ("summary", "generate_summary"):
        value = getattr(reasoning, name)
        # "auto" leaves it to the model, which makes none.
        if value not in (None, "auto"):
            raise RequestError(
                f"reasoning.{name} {value[:64]!r} is not supported by this server",
                param=f"reasoning.{name}",
                code="unsupported_parameter",
            )
    return conversation


def chat_of(body: ContextBody, messages: Sequence[Message]) -> ChatBody:
    """The same request to the chat API, of which this one is another form."""
    fields: dict[str, Any] = {}
    if isinstance(body, ResponseBody):
        fields = {name: getattr(body, name) for name in GenerationBody.__struct_fields__}
        fields["max_completion_tokens"] = body.max_output_tokens
        wants_logprobs = _LOGPROBS in (body.include or ()) or bool(body.top_logprobs)
        if wants_logprobs:
            fields["logprobs"] = True
            fields["top_logprobs"] = integer("top_logprobs", body.top_logprobs, 0, LOGPROBS)
    text = body.text or TextOptions()
    fields |= {
        "model": body.model,
        "messages": list(messages),
        "tools": _tools(body.tools),
        "tool_choice": _tool_choice(body.tool_choice),
        "parallel_tool_calls": body.parallel_tool_calls,
        "reasoning_effort": None if body.reasoning is None else body.reasoning.effort,
        "response_format": _response_format(text.format),
        "verbosity": text.verbosity,
    }
    return ChatBody(**fields)


def all_messages(instructions: str | None, items: Sequence[AnyItem]) -> list[Message]:
    """Instructions are of this request alone, and come first."""
    first = [] if instructions is None else [Message(role="system", content=instructions)]
    return [*first, *messages_of(items)]


def _tools(tools: list[dict[str, Json]] | None) -> list[dict[str, Json]] | None:
    made = []
    for index, tool in enumerate(tools or ()):
        kind = tool.get("type")
        if kind != "function":
            raise RequestError(
                f"tools[{index}].type: {kind!r} is not supported by this server; 'function' is",
                param=f"tools[{index}].type",
                code="unsupported_parameter",
            )
        function = {name: value for name, value in tool.items() if name != "type"}
        made.append({"type": "function", "function": function})
    return made or None


def _tool_choice(choice: str | dict[str, Json] | None) -> Json:
    if not isinstance(choice, dict):
        return choice
    kind = choice.get("type")
    if kind == "function":
        return {"type": "function", "function": {"name": choice.get("name")}}
    if kind == "allowed_tools":
        tools = choice.get("tools")
        if isinstance(tools, list):
            tools = [
                {"type": "function", "function": {"name": tool.get("name")}}
                if isinstance(tool, dict) and tool.get("type") == "function"
                else tool
                for tool in tools
            ]
        allowed = {"mode": choice.get("mode"), "tools": tools}
        return {"type": "allowed_tools", "allowed_tools": allowed}
    raise RequestError(
        f"tool_choice.type: {kind!r} is not supported by this server",
        param="tool_choice.type",
        code="unsupported_parameter",
    )


def _response_format(format: dict[str, Json] | None) -> Json:
    if format is None or format.get("type") != "json_schema":
        return format
    return {
        "type": "json_schema",
        "json_schema": {name: value for name, value in format.items() if name != "type"},
    }


@contextmanager
def renamed() -> Iterator[None]:
    """Errors of the chat's fields under the names that they have here."""
    try:
        yield
    except RequestError as error:
        for theirs, ours in _NAMES:
            if error.param is not None and error.param.startswith(theirs):
                error.param = ours + error.param.removeprefix(theirs)
                error.message = error.message.replace(theirs, ours)
                error.args = (error.message,)
                break
        if error.param is not None and error.param.startswith("tools["):
            error.param = error.param.replace(".function", "")
            error.message = error.message.replace(".function", "")
            error.args = (error.message,)
        raise

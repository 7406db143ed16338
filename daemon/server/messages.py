"""Chat messages from the API's form into what chat templates take."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from quantd.daemon.errors import RequestError
from quantd.daemon.server.sampling import refuse_unserved
from quantd.daemon.server.schemas import ROLES, ChatBody, ContentPart, Json, Message, TokenizeBody

if TYPE_CHECKING:
    from quantd.daemon.text import TextModel

_MEDIA_PARTS = ("image_url", "input_audio", "audio_url", "video_url", "file", "image", "audio")
_UNSERVED = ("chat_template", "documents")
_UNSERVED_IN_MESSAGE = ("function_call", "audio")
_FIELDS = (
    "role",
    "content",
    "name",
    "tool_calls",
    "tool_call_id",
    "reasoning_content",
    "reasoning",
)
_RESERVED = ("messages", "tools", "add_generation_prompt", "continue_final_message")
LONG_TEXT = 20_000
"""Characters from which on tokenizing takes longer than a thread costs."""

T = TypeVar("T")


async def off_loop(num_chars: int, work: Callable[[], T]) -> T:
    """Runs `work` at once when the text is short, else in a thread."""
    return work() if num_chars <= LONG_TEXT else await asyncio.to_thread(work)


def check_messages(body: ChatBody | TokenizeBody, messages: Sequence[Message]) -> None:
    """Raises RequestError; needs no model."""
    refuse_unserved(body, _UNSERVED)
    if not messages:
        raise RequestError("messages must have at least 1 message, got 0", param="messages")
    for index, message in enumerate(messages):
        _check_message(message, f"messages[{index}]")
    for name in _RESERVED:
        if name in (body.chat_template_kwargs or ()):
            raise RequestError(
                f"chat_template_kwargs must not set {name}, which is a field of the body",
                param=f"chat_template_kwargs.{name}",
            )
    if body.continue_final_message:
        if body.add_generation_prompt:
            raise RequestError(
                "continue_final_message and add_generation_prompt cannot both be true",
                param="continue_final_message",
            )
        if messages[-1].role != "assistant":
            raise RequestError(
                f"continue_final_message needs an assistant message at the end, "
                f"got {messages[-1].role!r}",
                param="continue_final_message",
            )


def _check_message(message: Message, where: str) -> None:
    if message.role not in ROLES:
        raise RequestError(
            f"{where}.role must be one of {', '.join(ROLES)}, got {message.role!r}",
            param=f"{where}.role",
        )
    try:
        refuse_unserved(message, _UNSERVED_IN_MESSAGE)
    except RequestError as error:
        raise RequestError(
            f"{where}.{error.message}", param=f"{where}.{error.param}", code=error.error_code
        ) from None
    if message.content is None and message.role != "assistant":
        raise RequestError(
            f"{where}.content must be a string or a list of parts, got null",
            param=f"{where}.content",
        )
    for index, call in enumerate(message.tool_calls or ()):
        function = call.get("function")
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or not name:
            field = f"{where}.tool_calls[{index}].function.name"
            raise RequestError(f"{field}: this field is required, a string", param=field)
    if isinstance(message.content, list):
        for index, part in enumerate(message.content):
            _check_part(part, f"{where}.content[{index}]")


def _check_part(part: ContentPart, where: str) -> None:
    if part.type in _MEDIA_PARTS:
        # `messages` and not the whole path: what clients match on to tell a text-only model.
        raise RequestError(
            f"{where}: parts of type {part.type!r} are not supported, this model reads text only",
            param="messages",
            code="unsupported_content",
        )
    if part.type != "text":
        raise RequestError(f"{where}.type must be 'text', got {part.type!r}", param=f"{where}.type")
    if part.text is None:
        raise RequestError(f"{where}.text: this field is required", param=f"{where}.text")


def encode_messages(
    text: TextModel,
    body: ChatBody | TokenizeBody,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Json]] | None = None,
    extra: dict[str, Json] | None = None,
) -> list[int]:
    """The prompt's token ids. `extra` goes to the template beside chat_template_kwargs, which
    win. Raises RequestError when the model has no template or the template refuses."""
    continues = bool(body.continue_final_message)
    generates = body.add_generation_prompt
    return text.encode_chat(
        [_as_dict(message) for message in messages],
        tools=tools,
        add_generation_prompt=not continues if generates is None else generates,
        continue_final_message=continues,
        **{**(extra or {}), **(body.chat_template_kwargs or {})},
    )


def num_chars(
    messages: Sequence[Message], tools: Sequence[Mapping[str, Json]] | None = None
) -> int:
    """About how much text there is to tokenize."""
    return len(msgspec.json.encode(tools or ())) + sum(
        len(message.content)
        if isinstance(message.content, str)
        else sum(len(part.text or "") for part in message.content or ())
        for message in messages
    )


def _as_dict(message: Message) -> dict[str, Any]:
    """Only what was set: templates ask whether a field is there."""
    made: dict[str, Any] = {
        name: value for name in _FIELDS if (value := getattr(message, name)) is not None
    }
    if isinstance(message.content, list):
        made["content"] = [{"type": part.type, "text": part.text} for part in message.content]
    return made

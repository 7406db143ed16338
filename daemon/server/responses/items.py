"""Items of the Responses API: what clients send, what is kept, and what chat templates take.

Only this file knows their JSON. Kept ones have OpenAI's output form, with ids.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Literal

import msgspec

from quantd.daemon.errors import RequestError
from quantd.daemon.server import limits
from quantd.daemon.server.body import decode
from quantd.daemon.server.choice import is_object
from quantd.daemon.server.limits import one_of, shown_as
from quantd.daemon.server.sampling import out_of_range
from quantd.daemon.server.schemas import ContentPart, Json, Message
from quantd.daemon.store import Item
from quantd.daemon.store.rows import new_id

MAX_ITEMS = 10_000
ROLES = ("user", "assistant", "system", "developer")
_MEDIA = ("input_image", "input_file", "input_audio", "input_video")
PART_TYPES = (
    *("input_text", "output_text", "text"),
    *("refusal", "reasoning_text", "summary_text"),
)
_SERVED = ("message", "function_call", "function_call_output", "reasoning", "item_reference")
_ID = re.compile(limits.REQUEST_ID)

ItemId = Annotated[str, limits.pattern(limits.REQUEST_ID)]
Status = Literal["in_progress", "completed", "incomplete"]


# --- what is kept ---------------------------------------------------------------------------------


class InputText(msgspec.Struct, tag_field="type", tag="input_text"):
    text: str


class OutputText(msgspec.Struct, tag_field="type", tag="output_text"):
    text: str
    annotations: list[Json] = []
    logprobs: list[Json] = []


class Refusal(msgspec.Struct, tag_field="type", tag="refusal"):
    refusal: str


class ReasoningText(msgspec.Struct, tag_field="type", tag="reasoning_text"):
    text: str


class SummaryText(msgspec.Struct, tag_field="type", tag="summary_text"):
    text: str


class MessageItem(msgspec.Struct, tag_field="type", tag="message"):
    id: str
    role: str
    content: list[InputText | OutputText | Refusal]
    status: Status = "completed"


class CallItem(msgspec.Struct, tag_field="type", tag="function_call"):
    id: str
    call_id: str
    name: str
    arguments: str
    status: Status = "completed"


class CallOutputItem(msgspec.Struct, tag_field="type", tag="function_call_output"):
    id: str
    call_id: str
    output: str | list[InputText]
    status: Status = "completed"


class ReasoningItem(msgspec.Struct, tag_field="type", tag="reasoning"):
    id: str
    summary: list[SummaryText] = []
    content: list[ReasoningText] = []
    status: Status = "completed"


AnyItem = MessageItem | CallItem | CallOutputItem | ReasoningItem
_KEPT = msgspec.json.Decoder(AnyItem)


def keep(item: AnyItem) -> Item:
    return Item(item.id, msgspec.json.encode(item))


def kept(item: Item) -> AnyItem:
    decoded: AnyItem = _KEPT.decode(item.body)
    return decoded


# --- what clients send ----------------------------------------------------------------------------


class _Head(msgspec.Struct):
    type: str | None = None
    role: str | None = None


class InputPart(msgspec.Struct):
    type: Annotated[str, one_of(*PART_TYPES)]
    text: str | None = None
    refusal: str | None = None


class InputMessage(msgspec.Struct):
    role: Annotated[str, one_of(*ROLES)]
    content: str | list[InputPart]
    type: Literal["message"] | None = None
    id: ItemId | None = None
    status: Status | None = None


class InputCall(msgspec.Struct):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: ItemId | None = None
    status: Status | None = None


class InputCallOutput(msgspec.Struct):
    type: Literal["function_call_output"]
    call_id: str
    output: str | list[InputPart]
    id: ItemId | None = None


class InputReasoning(msgspec.Struct):
    type: Literal["reasoning"]
    id: ItemId | None = None
    summary: list[InputPart] = []
    content: list[InputPart] | None = None


class Reference(msgspec.Struct):
    """Another item that is kept: to be put in its place."""

    type: Literal["item_reference"]
    id: str


InputItem = Annotated[
    msgspec.Raw,
    shown_as(
        "responses.items.InputMessage",
        "responses.items.InputCall",
        "responses.items.InputCallOutput",
        "responses.items.InputReasoning",
        "responses.items.Reference",
    ),
]
"""Decoded by what `type` it says, so that errors are of that type's fields."""
ShownItem = Annotated[msgspec.Raw, shown_as("responses.items.AnyItem")]
"""As it is kept."""


_HEAD = msgspec.json.Decoder(_Head)
_MESSAGE = msgspec.json.Decoder(InputMessage)
_CALL = msgspec.json.Decoder(InputCall)
_CALL_OUTPUT = msgspec.json.Decoder(InputCallOutput)
_REASONING = msgspec.json.Decoder(InputReasoning)
_REFERENCE = msgspec.json.Decoder(Reference)


def read_items(
    value: str | Sequence[msgspec.Raw] | None, name: str = "input"
) -> list[AnyItem | Reference]:
    """Raises RequestError that names the field, as input[2].content[0].text."""
    if value is None:
        return []
    if isinstance(value, str):
        return [MessageItem(new_id("msg_"), "user", [InputText(value)])]
    if len(value) > MAX_ITEMS:
        raise RequestError(f"{name} has {len(value)} items; the limit is {MAX_ITEMS}", param=name)
    return _with_own_ids([_read(bytes(raw), f"{name}[{i}]") for i, raw in enumerate(value)])


def _with_own_ids(items: list[AnyItem | Reference]) -> list[AnyItem | Reference]:
    """One that comes twice gets a new id the second time."""
    seen: set[str] = set()
    for item in items:
        if isinstance(item, Reference):
            continue
        if item.id in seen:
            item.id = new_id(item.id.partition("_")[0] + "_")
        seen.add(item.id)
    return items


def _read(raw: bytes, where: str) -> AnyItem | Reference:
    try:
        head = decode(raw, _HEAD)
        kind = head.type or "message"
        if kind not in _SERVED:
            raise RequestError(
                f"type: items of type {kind[:64]!r} are not supported by this server; "
                f"{', '.join(_SERVED)} are",
                param="type",
                code="unsupported_parameter",
            )
        return _READERS[kind](raw)
    except RequestError as error:
        message = error.message.removeprefix("the body: ")
        separator = "." if error.param else ": "
        param = f"{where}.{error.param}" if error.param else where
        raise RequestError(
            f"{where}{separator}{message}", param=param, code=error.error_code
        ) from None


def _read_message(raw: bytes) -> MessageItem:
    message = decode(raw, _MESSAGE)
    if message.role not in ROLES:
        raise out_of_range("role", message.role, f"one of {', '.join(ROLES)}")
    is_ours = message.role == "assistant"
    content: list[InputText | OutputText | Refusal] = []
    if isinstance(message.content, str):
        content.append(OutputText(message.content) if is_ours else InputText(message.content))
    else:
        for index, part in enumerate(message.content):
            where = f"content[{index}]"
            if part.type == "refusal" and is_ours and part.refusal is not None:
                content.append(Refusal(part.refusal))
                continue
            text = _text(part, where, ("input_text", "output_text", "text"))
            content.append(OutputText(text) if is_ours else InputText(text))
    status = message.status or "completed"
    return MessageItem(_id(message.id, "msg_"), message.role, content, status)


def _read_call(raw: bytes) -> CallItem:
    call = decode(raw, _CALL)
    if not call.name:
        raise out_of_range("name", call.name, "a function's name")
    id, status = _id(call.id, "fc_"), call.status or "completed"
    item = CallItem(id, call.call_id, call.name, call.arguments, status)
    if call.arguments and not is_cut_off(item):
        _check_json("arguments", call.arguments)
    return item


def _check_json(name: str, text: str) -> None:
    try:
        msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        raise RequestError(f"{name}: no JSON: {error}", param=name) from None


def _read_call_output(raw: bytes) -> CallOutputItem:
    output = decode(raw, _CALL_OUTPUT)
    id = _id(output.id, "fco_")
    if isinstance(output.output, str):
        return CallOutputItem(id, output.call_id, output.output)
    parts = [
        InputText(_text(part, f"output[{index}]", ("input_text", "text")))
        for index, part in enumerate(output.output)
    ]
    return CallOutputItem(id, output.call_id, parts)


def _read_reasoning(raw: bytes) -> ReasoningItem:
    """Encrypted content, which only who has made it could read, has no meaning here."""
    item = decode(raw, _REASONING)
    return ReasoningItem(
        _id(item.id, "rs_"),
        [
            SummaryText(_text(part, f"summary[{index}]", ("summary_text",)))
            for index, part in enumerate(item.summary)
        ],
        [
            ReasoningText(_text(part, f"content[{index}]", ("reasoning_text", "text")))
            for index, part in enumerate(item.content or ())
        ],
    )


def _read_reference(raw: bytes) -> Reference:
    return decode(raw, _REFERENCE)


_READERS: Mapping[str, Callable[[bytes], AnyItem | Reference]] = {
    "message": _read_message,
    "function_call": _read_call,
    "function_call_output": _read_call_output,
    "reasoning": _read_reasoning,
    "item_reference": _read_reference,
}


def _text(part: InputPart, where: str, kinds: Sequence[str]) -> str:
    if part.type in _MEDIA:
        raise RequestError(
            f"{where}: parts of type {part.type!r} are not supported, this model reads text only",
            param=where,
            code="unsupported_content",
        )
    if part.type not in kinds:
        raise out_of_range(f"{where}.type", part.type[:64], f"one of {', '.join(kinds)}")
    if part.text is None:
        raise RequestError(f"{where}.text: this field is required", param=f"{where}.text")
    return part.text


def _id(given: str | None, prefix: str) -> str:
    if given is None:
        return new_id(prefix)
    if _ID.fullmatch(given) is None:
        raise out_of_range("id", given[:200], "1 to 128 letters, digits or . _ : -")
    return given


# --- what templates take --------------------------------------------------------------------------


def is_cut_off(item: AnyItem) -> bool:
    """A call that nobody could run."""
    return (
        isinstance(item, CallItem) and item.status == "incomplete" and not is_object(item.arguments)
    )


def messages_of(items: Iterable[AnyItem]) -> list[Message]:
    """Reasoning, text and calls that follow on one another are one assistant's message, as the
    model has said them. A call that was cut off is left out: templates take whole ones only."""
    made: list[Message] = []
    ours: Message | None = None
    """The assistant's message that is still open."""
    for item in items:
        if is_cut_off(item):
            continue
        if isinstance(item, CallOutputItem):
            ours = None
            content = item.output if isinstance(item.output, str) else _content(item.output)
            made.append(Message(role="tool", content=content, tool_call_id=item.call_id))
        elif isinstance(item, MessageItem) and item.role != "assistant":
            ours = None
            made.append(Message(role=item.role, content=_content(item.content)))
        else:
            if ours is None or _begins_anew(ours, item):
                ours = Message(role="assistant")
                made.append(ours)
            _add(ours, item)
    return made


def _begins_anew(ours: Message, item: AnyItem) -> bool:
    if isinstance(item, CallItem):
        return False
    if isinstance(item, ReasoningItem):
        return True
    return ours.content is not None or ours.tool_calls is not None


def _add(ours: Message, item: AnyItem) -> None:
    if isinstance(item, ReasoningItem):
        parts = item.content or item.summary
        ours.reasoning_content = "\n".join(part.text for part in parts) or None
    elif isinstance(item, CallItem):
        function = {"name": item.name, "arguments": item.arguments}
        call = {"id": item.call_id, "type": "function", "function": function}
        ours.tool_calls = [*(ours.tool_calls or ()), call]
    elif isinstance(item, MessageItem):
        ours.content = _content(item.content)


def _content(parts: Sequence[InputText | OutputText | Refusal]) -> str | list[ContentPart]:
    """One part as plain text: so a second turn's prompt begins as the first one's did."""
    texts = [part.refusal if isinstance(part, Refusal) else part.text for part in parts]
    if len(texts) <= 1:
        return "".join(texts)
    return [ContentPart("text", text) for text in texts]


def turns(items: Sequence[AnyItem]) -> list[int]:
    """Where turns begin: at each message of a user's that does not follow on another."""
    starts: list[int] = []
    before: AnyItem | None = None
    for index, item in enumerate(items):
        is_user = isinstance(item, MessageItem) and item.role == "user"
        was_user = isinstance(before, MessageItem) and before.role == "user"
        if is_user and not was_user:
            starts.append(index)
        before = item
    return starts

"""Messages made of blocks → the chat messages that templates take.

A user's message with results of tools becomes several: one for each result, in the order of the
blocks. A result must be of a call that was made before it.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from quantd.daemon.errors import RequestError
from quantd.daemon.server.anthropic.schemas import ROLES, Block, CountBody
from quantd.daemon.server.schemas import ContentPart, Json, Message

_MEDIA = ("image", "document", "search_result", "container_upload")


def read_messages(body: CountBody) -> list[Message]:
    """Raises RequestError that names the place."""
    made: list[Message] = []
    if body.system:
        made.append(Message("system", _system(body.system)))
    names: dict[str, str] = {}
    for index, message in enumerate(body.messages):
        where, content = f"messages[{index}]", message.content
        if message.role not in ROLES:
            raise RequestError(
                f"{where}.role must be 'user', 'assistant' or 'system', got {message.role[:64]!r}",
                param=f"{where}.role",
            )
        if message.role == "system":
            text = content if isinstance(content, str) else _texts(content, f"{where}.content")
            made.append(Message("system", text))
        elif isinstance(content, str):
            made.append(Message(message.role, content))
        elif message.role == "assistant":
            made.append(_assistant(content, f"{where}.content", names))
        else:
            made += _user(content, f"{where}.content", names)
    if made[-1].tool_calls:
        raise RequestError(
            f"messages[{len(body.messages) - 1}]: tool_use blocks need a message with their "
            "tool_result blocks behind them",
            param="messages",
        )
    return made


def _system(system: str | Sequence[Block]) -> str:
    return system if isinstance(system, str) else _texts(system, "system")


def _user(blocks: Sequence[Block], where: str, names: dict[str, str]) -> list[Message]:
    made: list[Message] = []
    for index, block in enumerate(blocks):
        place = f"{where}[{index}]"
        if block.type == "tool_result":
            made.append(_result(block, place, names))
            continue
        text = _text(block, place)
        last = made[-1] if made else None
        if last is not None and isinstance(last.content, list):
            last.content.append(ContentPart("text", text))
        else:
            made.append(Message("user", [ContentPart("text", text)]))
    for message in made:
        # One text is a string: there are templates that know no lists.
        if isinstance(message.content, list) and len(message.content) == 1:
            message.content = message.content[0].text
    return made or [Message("user", "")]


def _result(block: Block, where: str, names: dict[str, str]) -> Message:
    id = block.tool_use_id
    if id is None or id not in names:
        raise RequestError(
            f"{where}.tool_use_id: {id!r:.200} is not the id of a tool_use block before it",
            param=f"{where}.tool_use_id",
        )
    content = block.content or ""
    text = content if isinstance(content, str) else _texts(content, f"{where}.content")
    return Message("tool", text, name=names[id], tool_call_id=id)


def _assistant(blocks: Sequence[Block], where: str, names: dict[str, str]) -> Message:
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[dict[str, Json]] = []
    for index, block in enumerate(blocks):
        place = f"{where}[{index}]"
        if block.type == "thinking":
            thoughts.append(_field(block.thinking, f"{place}.thinking"))
        elif block.type == "tool_use":
            id, name = _field(block.id, f"{place}.id"), _field(block.name, f"{place}.name")
            names[id] = name
            arguments = msgspec.json.encode(block.input or {}).decode()
            function = {"name": name, "arguments": arguments}
            calls.append({"id": id, "type": "function", "function": function})
        else:
            texts.append(_text(block, place))
    return Message(
        "assistant",
        "".join(texts),
        tool_calls=calls or None,
        reasoning="\n".join(thoughts) or None,
    )


def _texts(blocks: Sequence[Block], where: str) -> str:
    return "\n".join(_text(block, f"{where}[{i}]") for i, block in enumerate(blocks))


def _text(block: Block, where: str) -> str:
    if block.type in _MEDIA:
        raise RequestError(
            f"{where}: blocks of type {block.type!r} are not supported, this model reads text only",
            param="messages",
            code="unsupported_content",
        )
    if block.type != "text":
        raise RequestError(
            f"{where}.type: {block.type[:64]!r} is not supported here", param=f"{where}.type"
        )
    return _field(block.text, f"{where}.text")


def _field(value: str | None, where: str) -> str:
    if value is None:
        raise RequestError(f"{where}: this field is required", param=where)
    return value

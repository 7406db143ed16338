"""What a request wants the model to read: its texts before there is a model, its tokens after."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol, Self

import msgspec

from quantd.daemon.server.schemas import Json, Message

if TYPE_CHECKING:
    from quantd.daemon.text import TextModel

Change = Callable[[str, bool], str]
"""(a text, whether it is written in JSON) → what the model shall read instead."""


class Prompt(NamedTuple):
    ids: tuple[int, ...]
    text: str | None = None
    """As the caller wrote it; None when it came as ids or messages."""


class Readable(Protocol):
    """What one request gives a model to read. Immutable."""

    @property
    def is_text(self) -> bool:
        """`mapped` sees all of it: nothing came as token ids."""
        ...

    def mapped(self, change: Change) -> Self:
        """With each text that the caller wrote changed; calls `change` for all, in order."""
        ...


class PromptSource(Readable, Protocol):
    """What is to be generated from."""

    async def encode(self, text: TextModel) -> Sequence[Prompt]:
        """Raises RequestError."""
        ...


@dataclass(frozen=True, slots=True)
class Texts:
    """Texts alone."""

    texts: Sequence[str | list[int]]

    @property
    def is_text(self) -> bool:
        return all(isinstance(text, str) for text in self.texts)

    def mapped(self, change: Change) -> Texts:
        return Texts([change(t, False) if isinstance(t, str) else t for t in self.texts])


def map_messages(messages: Sequence[Message], change: Change) -> list[Message]:
    return [_map_message(message, change) for message in messages]


def _map_message(message: Message, change: Change) -> Message:
    def text(value: str | None) -> str | None:
        return None if value is None else change(value, False)

    content = message.content
    if isinstance(content, list):
        # Joined as for the template, so that nothing hides by being cut into parts.
        joined = "\n".join(part.text or "" for part in content)
        changed = change(joined, False)
        content = content if changed == joined else changed
    elif content is not None:
        content = change(content, False)
    calls = message.tool_calls
    return msgspec.structs.replace(
        message,
        content=content,
        name=text(message.name),
        reasoning=text(message.reasoning),
        reasoning_content=text(message.reasoning_content),
        tool_calls=None if calls is None else [_map_call(call, change) for call in calls],
    )


def _map_call(call: dict[str, Json], change: Change) -> dict[str, Json]:
    function = call.get("function")
    if not isinstance(function, dict):
        return call
    arguments = function.get("arguments")
    changed = change(arguments, True) if isinstance(arguments, str) else map_json(arguments, change)
    name = map_json(function.get("name"), change)
    return {**call, "function": {**function, "name": name, "arguments": changed}}


def map_json(value: Json, change: Change) -> Json:
    """All texts that are values in it; the names of members stay."""
    if isinstance(value, str):
        return change(value, False)
    if isinstance(value, dict):
        return {name: map_json(item, change) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [map_json(item, change) for item in value]
    return value

"""What a model says, taken apart: content, reasoning and tool calls, out of one stream of text.

Each model family marks these in its own way (`text/dialects/`); the parts are the same for all, and
every API face writes down parts and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol


class Content(NamedTuple):
    text: str


class Reasoning(NamedTuple):
    text: str


class CallStart(NamedTuple):
    """Comes once per call, before its arguments. `call` counts from 0 without gaps."""

    call: int
    id: str
    name: str


class CallArguments(NamedTuple):
    """A piece of the call's JSON. The pieces of one call come before the next call starts."""

    call: int
    text: str


Part = Content | Reasoning | CallStart | CallArguments


class AnswerParser(Protocol):
    """One choice's text into parts.

    Invariant: the parts, with neighbours of one kind joined, are a function of the whole text and
    not of how it was split, down to single characters. Nothing that was fed is lost but the marks
    themselves and the white space around them.
    """

    def feed(self, text: str) -> list[Part]:
        """What is decided by now; what may still turn out to be a mark is held back."""
        ...

    def flush(self) -> list[Part]:
        """The end of the text, once: gives out what was held back."""
        ...

    @property
    def num_calls(self) -> int:
        """That have started."""
        ...

    @property
    def num_failed_calls(self) -> int:
        """That were begun and are none: not readable, or of a function that is not among the
        tools. Their text is content."""
        ...

    @property
    def reasoning_spans(self) -> Sequence[tuple[int, int]]:
        """Half-open ranges of characters of the fed text that were reasoning, marks included;
        complete after `flush`."""
        ...


class PlainAnswer:
    """All of the text is content: a model without reasoning, asked without tools."""

    num_calls = num_failed_calls = 0
    reasoning_spans: Sequence[tuple[int, int]] = ()

    def feed(self, text: str) -> list[Part]:
        return [Content(text)] if text else []

    def flush(self) -> list[Part]:
        return []


@dataclass(slots=True)
class Call:
    id: str
    name: str
    arguments: str
    """JSON as the model wrote it."""


@dataclass(slots=True)
class WholeAnswer:
    """An answer's parts put together."""

    content: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)


def whole(parts: Iterable[Part]) -> WholeAnswer:
    contents: list[str] = []
    reasonings: list[str] = []
    calls: list[tuple[CallStart, list[str]]] = []
    for part in parts:
        if isinstance(part, Content):
            contents.append(part.text)
        elif isinstance(part, Reasoning):
            reasonings.append(part.text)
        elif isinstance(part, CallStart):
            calls.append((part, []))
        else:
            calls[part.call][1].append(part.text)
    return WholeAnswer(
        "".join(contents),
        "".join(reasonings),
        [Call(start.id, start.name, "".join(pieces)) for start, pieces in calls],
    )


def joined(parts: Iterable[Part]) -> list[Part]:
    """Neighbours of one kind as one part."""
    made: list[Part] = []
    for part in parts:
        last = made[-1] if made else None
        if isinstance(part, Content) and isinstance(last, Content):
            made[-1] = Content(last.text + part.text)
        elif isinstance(part, Reasoning) and isinstance(last, Reasoning):
            made[-1] = Reasoning(last.text + part.text)
        elif isinstance(part, CallArguments) and isinstance(last, CallArguments):
            made[-1] = CallArguments(last.call, last.text + part.text)
        else:
            made.append(part)
    return made

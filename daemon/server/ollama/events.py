"""Answers as Ollama writes them: one object, or lines of them with the counts in the last."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from quantd.daemon.server.filtered import prompt_results, results_of
from quantd.daemon.server.logprobs import ChatTokenLogprob, chat_logprobs
from quantd.daemon.server.ollama.run import Watch
from quantd.daemon.server.schemas import Json
from quantd.daemon.text.answer import (
    Call,
    CallArguments,
    CallStart,
    Content,
    Part,
    Reasoning,
    whole,
)

if TYPE_CHECKING:
    from quantd.daemon.server.choice import Delta
    from quantd.daemon.server.context import Clock
    from quantd.daemon.server.generate import Generation

_encode = msgspec.json.encode
_REASONS = ("length", "content_filter")
"""Ends that are not "stop"."""


class Said(NamedTuple):
    """What one object says."""

    content: str = ""
    thinking: str = ""
    calls: tuple[dict[str, Json], ...] = ()


Shape = Callable[[Said], dict[str, Json]]
"""The members that differ between the two routes."""


def chat_shape(said: Said) -> dict[str, Json]:
    message: dict[str, Json] = {"role": "assistant", "content": said.content}
    if said.thinking:
        message["thinking"] = said.thinking
    if said.calls:
        message["tool_calls"] = said.calls
    return {"message": message}


def generate_shape(said: Said) -> dict[str, Json]:
    thinking = {"thinking": said.thinking} if said.thinking else {}
    return {"response": said.content, **thinking}


def timestamp(seconds: float) -> str:
    """`seconds` since the epoch, in RFC 3339."""
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")


def whole_answer(
    shape: Shape, watch: Watch, clock: Clock, made: Generation, result: Delta
) -> dict[str, Json]:
    """In one object."""
    answer = whole(result.parts)
    calls = (_call(i, call) for i, call in enumerate(answer.calls))
    said = Said(
        answer.content if made.submitter.takes_parts else result.text,
        answer.reasoning,
        tuple(call for call in calls if call is not None),
    )
    logprobs = _logprobs(made, result)
    return {
        "model": made.model,
        "created_at": timestamp(clock.wall()),
        **shape(said),
        **({"logprobs": logprobs} if logprobs else {}),
        **_done(watch, made, result),
    }


def without_answer(shape: Shape, clock: Clock, model: str, reason: str) -> dict[str, Json]:
    """For a request that was about the model alone."""
    return {
        "model": model,
        "created_at": timestamp(clock.wall()),
        **shape(Said()),
        "done": True,
        "done_reason": reason,
    }


def _done(watch: Watch, made: Generation, last: Delta) -> dict[str, Json]:
    """`content_filter` and what it found are not Ollama's."""
    reason = last.finish_reason if last.finish_reason in _REASONS else "stop"
    found = {
        "content_filter_results": results_of(last.filtered),
        "prompt_filter_results": prompt_results(made),
    }
    shown = {name: value for name, value in found.items() if value is not msgspec.UNSET}
    return {"done": True, "done_reason": reason, **shown, **watch.measures(made)}


def _call(number: int, call: Call) -> dict[str, Json] | None:
    """None: it was cut off, and nobody could run it."""
    try:
        arguments = msgspec.json.decode(call.arguments)
    except (msgspec.DecodeError, RecursionError):
        return None
    if not isinstance(arguments, dict):
        return None
    function = {"index": number, "name": call.name, "arguments": arguments}
    return {"id": call.id, "function": function}


def _logprobs(made: Generation, delta: Delta) -> list[ChatTokenLogprob]:
    found = chat_logprobs(made.text, made.options, delta.entries)
    return [] if found is None else found.content


class AnswerLines:
    """Deltas as lines; made anew for each stream. A call comes whole, in a line of its own."""

    def __init__(self, shape: Shape, watch: Watch, clock: Clock, made: Generation) -> None:
        self._shape = shape
        self._watch = watch
        self._clock = clock
        self._made = made
        self._open: tuple[CallStart, list[str]] | None = None
        """A call whose arguments are still coming."""
        self._last: Delta | None = None

    def encode(self, delta: Delta) -> bytes:
        if self._made.submitter.takes_parts:
            said = [*self._take(delta.parts)]
        else:
            said = [Said(delta.text)] if delta.text else []
        if delta.finish_reason is not None:
            said += self._close()
            self._last = delta
        logprobs = _logprobs(self._made, delta)
        if logprobs and not said:
            said = [Said()]
        lines = [self._line(one, logprobs if i == 0 else []) for i, one in enumerate(said)]
        return b"".join(lines)

    def end(self) -> bytes:
        assert self._last is not None, "the one choice has ended"
        return self._object({**self._shape(Said()), **_done(self._watch, self._made, self._last)})

    def _take(self, parts: Iterable[Part]) -> Iterator[Said]:
        for part in parts:
            if isinstance(part, CallArguments):
                assert self._open is not None
                self._open[1].append(part.text)
                continue
            yield from self._close()
            if isinstance(part, CallStart):
                self._open = part, []
            elif isinstance(part, Content):
                yield Said(content=part.text)
            else:
                assert isinstance(part, Reasoning)
                yield Said(thinking=part.text)

    def _close(self) -> Iterator[Said]:
        if self._open is None:
            return
        start, pieces = self._open
        self._open = None
        call = _call(start.call, Call(start.id, start.name, "".join(pieces)))
        if call is not None:
            yield Said(calls=(call,))

    def _line(self, said: Said, logprobs: list[ChatTokenLogprob]) -> bytes:
        members = {**self._shape(said), "done": False}
        return self._object({**members, "logprobs": logprobs} if logprobs else members)

    def _object(self, members: dict[str, Json]) -> bytes:
        head = {"model": self._made.model, "created_at": timestamp(self._clock.wall())}
        return _encode({**head, **members}) + b"\n"

"""One choice: a token stream on its way to text."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

import msgspec

from quantd.daemon.errors import DeadlineExceeded, QuantdError, RequestError, Unavailable
from quantd.daemon.server.sampling import Options
from quantd.daemon.text.answer import CallArguments, CallStart
from quantd.daemon.types import SamplingParams, TokenEvent, TokenLogprob

if TYPE_CHECKING:
    from quantd.daemon.engine.stream import TokenStream
    from quantd.daemon.server.outgoing import OutputScreen
    from quantd.daemon.text import OutputText
    from quantd.daemon.text.answer import AnswerParser, Part


Finish = Literal["stop", "length", "tool_calls", "content_filter"]


class TokenEntry(NamedTuple):
    """A token of the output, its logprob if asked for, and where its text begins."""

    token: int
    logprob: TokenLogprob | None
    offset: int


@dataclass(slots=True)
class Delta:
    """What a choice has new; added up, what it has said."""

    index: int
    text: str = ""
    """As generated, with the marks of reasoning and calls."""
    parts: list[Part] = field(default_factory=list)
    """The same taken apart, when the API asked for it."""
    entries: list[TokenEntry] = field(default_factory=list)
    """Only with logprobs or return_token_ids: the tokens whose text is out with this delta."""
    finish_reason: Finish | None = None
    stop_reason: str | int | None = None
    """The stop string or the caller's stop token; None for the model's own end."""
    filtered: Mapping[str, bool] | None = None
    """At the end, under a policy: each category that was found → whether its text was taken out."""

    def add(self, other: Delta) -> None:
        self.text += other.text
        self.parts += other.parts
        self.entries += other.entries
        self.finish_reason, self.stop_reason = other.finish_reason, other.stop_reason
        self.filtered = other.filtered


def failure_of(event: TokenEvent) -> QuantdError | None:
    """What ended the stream badly."""
    reason = event.finish_reason
    if reason == "timeout":
        return DeadlineExceeded(event.error or "the timeout is over", param="timeout")
    if reason == "excluded":
        return RequestError(event.error or "no token is left", code="nothing_to_sample")
    if reason in ("error", "abort"):
        return Unavailable(event.error or "the request was aborted")
    return None


def _singly(event: TokenEvent) -> Iterator[TokenEvent]:
    """The same as events of one token each; the end comes with the last."""
    last = len(event.tokens) - 1
    if last <= 0:
        yield event
        return
    for i, token in enumerate(event.tokens):
        reason = event.finish_reason if i == last else None
        logprobs = event.logprobs[i : i + 1]
        yield msgspec.structs.replace(
            event, tokens=(token,), logprobs=logprobs, finish_reason=reason
        )


def is_object(text: str) -> bool:
    """It is a JSON object, as the arguments of a call are that was not cut off."""
    try:
        return isinstance(msgspec.json.decode(text), dict)
    except (msgspec.DecodeError, RecursionError):
        return False


class Choice:
    """Reads one TokenStream; one reader calls `next` until `finish_reason` is set.

    What is counted and what is shown do not depend on how the stream merged its tokens: those
    behind a stop string are not counted, though the engine may have made some before the abort, or
    may have failed at one.
    """

    def __init__(
        self,
        index: int,
        stream: TokenStream,
        output: OutputText,
        parser: AnswerParser | None,
        sampling: SamplingParams,
        options: Options,
        screen: OutputScreen | None = None,
    ) -> None:
        """parser: None for an API that shows the text as it was generated. screen: what a policy
        lets through of it."""
        self.index = index
        self.num_tokens = 0
        """For usage: the generated ones, with the stop token or those of the stop string."""
        self.num_cached_tokens = 0
        self.num_reasoning_tokens = 0
        """Of num_tokens, once it has ended."""
        self.num_failed_calls = 0
        """As of the parser, once it has ended."""
        self.finish_reason: Finish | None = None
        self.prompt_logprobs: Sequence[TokenLogprob | None] = ()
        """Set by the first delta, when asked for."""
        self._stream = stream
        self._output = output
        self._parser = parser
        self._screen = screen
        self._failure: QuantdError | None = None
        """Behind what was read last."""
        self._offsets: list[int] = []
        """Where each token's text begins; with a parser."""
        self._arguments: list[str] = []
        """Of the last call."""
        self._own_stops = frozenset(options.stop_token_ids)
        self._prompt_only = options.max_tokens == 0
        self._wants_entries = sampling.logprobs is not None or options.return_token_ids
        self._keeps_all_entries = options.include_stop or options.return_token_ids
        self._logs_stop_token = options.logs_stop_token
        self._held: list[TokenEntry] = []
        """Entries whose text is not out yet."""
        self._num_chars = 0
        """Of text given out."""

    @property
    def started_at(self) -> float | None:
        """See `TokenStream`; None before the first token."""
        return self._stream.started_at

    @property
    def first_token_at(self) -> float | None:
        return self._stream.first_token_at

    def abort(self) -> None:
        """Its sequence is gone before the next step; no effect after the end."""
        self._stream.abort()

    async def next(self) -> Delta:
        """Waits until there is something to say: text or the end. Raises Unavailable when the
        engine gave the request up, and RequestError when its fields leave nothing to say."""
        while self._failure is None:
            event = await self._stream.__anext__()
            self._failure = failure_of(event)
            if self._failure is not None:  # its tokens come first: they may hold the end
                event = msgspec.structs.replace(event, finish_reason=None)
            if self._screen is None:
                delta = self._take(event)
            else:
                delta = await self._screened(self._screen, event)
            shown = delta.text if self._parser is None else delta.parts
            if shown or delta.entries or delta.finish_reason is not None:
                return delta
        raise self._failure

    async def _screened(self, screen: OutputScreen, event: TokenEvent) -> Delta:
        """Token by token: those behind a block are not counted either."""
        shown = Delta(self.index)
        for one in _singly(event):
            delta = self._take(one)
            await screen.take(delta)
            shown.add(delta)
            self.finish_reason = delta.finish_reason
            if delta.finish_reason is not None:
                self._stream.stop()
                break
        return shown

    def _take(self, event: TokenEvent) -> Delta:
        if event.prompt_logprobs:
            self.prompt_logprobs = event.prompt_logprobs
        self.num_cached_tokens = max(self.num_cached_tokens, event.num_cached_tokens)
        if self._prompt_only:
            self.finish_reason = None if event.finish_reason is None else "length"
            return Delta(self.index, finish_reason=self.finish_reason)
        return self._take_tokens(event)

    def _take_tokens(self, event: TokenEvent) -> Delta:
        tokens = event.tokens
        ended = event.finish_reason == "stop" and not event.complete  # by a stop token
        fed = self._output.feed(tokens, ends_with_stop_token=ended)
        delta = Delta(self.index, fed.text)
        self.num_tokens += fed.tokens_consumed
        if self._wants_entries:
            self._hold(event, fed.offsets)
        stopped = fed.stopped
        if stopped is None and event.finish_reason is not None:
            flushed = self._output.flush()
            delta.text += flushed.text
            stopped = flushed.stopped
        self._num_chars += len(delta.text)
        if stopped is not None:
            self._stream.stop()
            delta.finish_reason, delta.stop_reason = "stop", stopped
        elif event.finish_reason is not None:
            delta.finish_reason = "stop" if event.finish_reason == "stop" else "length"
            if ended and tokens[-1] in self._own_stops:
                delta.stop_reason = tokens[-1]
        if self._parser is not None:
            self._parse(self._parser, delta, fed.offsets)
        self.finish_reason = delta.finish_reason
        if self._held:
            delta.entries = self._released(ended, stopped is not None)
        return delta

    def _parse(self, parser: AnswerParser, delta: Delta, offsets: Sequence[int]) -> None:
        """Fill in the delta's parts; at the end, count what was reasoning."""
        if delta.text:
            delta.parts = parser.feed(delta.text)
        self._offsets += offsets
        if delta.finish_reason is not None:
            delta.parts = [*delta.parts, *parser.flush()]
        for part in delta.parts:
            if isinstance(part, CallStart):
                self._arguments = []
            elif isinstance(part, CallArguments):
                self._arguments.append(part.text)
        if delta.finish_reason is not None:
            self.num_failed_calls = parser.num_failed_calls
            # A call that the caller's stop string has cut off is none to be run.
            is_whole = delta.stop_reason is None or is_object("".join(self._arguments))
            if delta.finish_reason == "stop" and parser.num_calls and is_whole:
                delta.finish_reason = "tool_calls"
            self.num_reasoning_tokens = sum(
                bisect_left(self._offsets, stop) - bisect_left(self._offsets, start)
                for start, stop in parser.reasoning_spans
            )

    def _hold(self, event: TokenEvent, offsets: Sequence[int]) -> None:
        """Those behind a stop string are not in `offsets` and fall away here."""
        logprobs: Sequence[TokenLogprob | None] = event.logprobs or (None,) * len(event.tokens)
        for token, logprob, offset in zip(event.tokens, logprobs, offsets, strict=False):
            self._held.append(TokenEntry(token, logprob, offset))

    def _released(self, ended: bool, stopped: bool) -> list[TokenEntry]:
        """The entries whose text has begun to show; at the end all, but for those of the text
        that was cut off: the tokens of a stop string and, unless it is logged, a stop token."""
        held, shown = self._held, self._num_chars
        if self.finish_reason is None:
            count = next((i for i, entry in enumerate(held) if entry.offset >= shown), len(held))
            self._held = held[count:]
            return held[:count]
        self._held = []
        if self._keeps_all_entries:
            return held
        if stopped:
            return [entry for entry in held if entry.offset < shown]
        return held[:-1] if ended and not self._logs_stop_token else held

"""What a caller of the engine holds: the tokens of one request as they come."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Literal

from quantd.daemon.types import FinishReason, TokenEvent, TokenLogprob

Leaving = Literal["abort", "stop"]
"""How a reader ends a stream before the engine does."""


class TokenStream:
    """An async iterator of `TokenEvent`; it ends after the event that has a finish_reason.

    Invariant: at most one event waits for the reader. What comes before it is read is added to
    it, so a slow reader gets fewer and longer events, and holds up nobody. One reader; event
    loop only. A reader that leaves early must call `abort`, `stop` or `aclose`: until then the
    sequence goes on, and an iterator is not told of a `break`.
    """

    __slots__ = (
        "_on_leave",
        "_arrived",
        "_tokens",
        "_logprobs",
        "_prompt_logprobs",
        "_finish_reason",
        "_error",
        "_complete",
        "_exhausted",
        "num_cached_tokens",
        "started_at",
        "first_token_at",
        "vector",
    )

    def __init__(self, on_leave: Callable[[Leaving], None]) -> None:
        """`on_leave` is called when the reader has left a stream that goes on."""
        self._on_leave = on_leave
        self._arrived = asyncio.Event()
        self._tokens: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._prompt_logprobs: Sequence[TokenLogprob | None] = ()
        self._finish_reason: FinishReason | None = None
        self._error: str | None = None
        self._complete = False
        self._exhausted = False
        self.num_cached_tokens = 0
        """Goes out with every event; the engine sets it."""
        self.started_at: float | None = None
        """When it was first in a batch. This and the next: seconds of the engine's clock; the
        engine sets them with the first token."""
        self.first_token_at: float | None = None
        self.vector: bytes | None = None
        """See `Sampled.vector`; the engine sets it, before `finish`."""

    @property
    def is_finished(self) -> bool:
        """Nothing more will come, though the reader may not have seen the last of it."""
        return self._finish_reason is not None

    def push(
        self,
        tokens: Sequence[int],
        logprobs: Sequence[TokenLogprob] = (),
        prompt_logprobs: Sequence[TokenLogprob | None] = (),
    ) -> None:
        """Adds to the waiting event. The engine only; never after `finish`."""
        assert self._finish_reason is None
        self._tokens += tokens
        self._logprobs += logprobs
        if prompt_logprobs:
            self._prompt_logprobs = prompt_logprobs
        self._arrived.set()

    def finish(
        self, reason: FinishReason, error: str | None = None, complete: bool = False
    ) -> None:
        """Ends the stream with what waits for the reader. The engine only; once."""
        assert self._finish_reason is None
        self._finish_reason = reason
        self._error = error
        self._complete = complete
        self._arrived.set()

    def abort(self) -> None:
        """The caller wants no more: its sequence is gone before the next step. Idempotent; the
        reader, if it still reads, gets a last event with "abort"."""
        self._leave("abort")

    def stop(self) -> None:
        """The caller found the end in the text (a stop string): as `abort`, but the request ran to
        its end and counts so."""
        self._leave("stop")

    async def aclose(self) -> None:
        """`abort`, for `contextlib.aclosing`."""
        self.abort()

    def _leave(self, reason: Leaving) -> None:
        if self._finish_reason is None:
            self._on_leave(reason)

    def __aiter__(self) -> TokenStream:
        return self

    async def __anext__(self) -> TokenEvent:
        if self._exhausted:
            raise StopAsyncIteration
        await self._arrived.wait()
        self._arrived.clear()
        self._exhausted = self._finish_reason is not None
        event = TokenEvent(
            tokens=tuple(self._tokens),
            logprobs=tuple(self._logprobs),
            prompt_logprobs=tuple(self._prompt_logprobs),
            finish_reason=self._finish_reason,
            error=self._error,
            num_cached_tokens=self.num_cached_tokens,
            complete=self._complete,
        )
        self._tokens.clear()
        self._logprobs.clear()
        self._prompt_logprobs = ()
        return event

"""A model that judges texts: what it is asked, and what its answer means."""

from __future__ import annotations

import asyncio
import math
import re
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from quantd.daemon.config import GuardSettings
from quantd.daemon.errors import QuantdError
from quantd.daemon.types import Request, SamplingParams, TokenLogprob

if TYPE_CHECKING:
    from quantd.daemon.fleet import Fleet, Lease
    from quantd.daemon.text import TextModel

_MAX_TOKENS = 64
"""Of an answer: a word, and a few labels."""
_TOP = 20
Messages = Sequence[dict[str, str]]


class GuardFailed(Exception):
    """It gave no answer, or one that means nothing."""


class Verdict(NamedTuple):
    categories: tuple[str, ...]
    """What was found."""
    score: float
    """How likely the guard holds the text to be unsafe, in [0, 1]."""


class Asking(NamedTuple):
    """On whose account a guard works."""

    fleet: Fleet
    arrival: float
    """By the engine's clock."""
    caller: str
    is_batch: bool
    held: Mapping[str, Lease] = MappingProxyType({})
    """Guard → its model's lease, where there is one already."""


class Guard:
    """Immutable; any number of judgements at once."""

    def __init__(self, settings: GuardSettings) -> None:
        self.settings = settings
        self.name = settings.name
        self.categories = frozenset((settings.name, *settings.labels.values()))

    def windows(self, text: str) -> Iterator[str]:
        """The text in pieces, each with the one before it: what a border cuts is seen whole."""
        size = self.settings.window_chars
        for stop in range(size, len(text) + size, size):
            yield self.window(text, min(stop, len(text)))

    def window(self, text: str, stop: int) -> str:
        """The one that ends there."""
        return text[max(0, stop - 2 * self.settings.window_chars) : stop]

    @asynccontextmanager
    async def lease(self, fleet: Fleet) -> AsyncIterator[Lease | None]:
        """Of its model, so that it can still judge when the fleet lends no more. None: it could
        not be had, which judging will tell."""
        async with AsyncExitStack() as stack:
            lease = None
            with suppress(QuantdError, TimeoutError):
                async with asyncio.timeout(self.settings.timeout_seconds):
                    lease = await fleet.lease(self.settings.model)
            if lease is not None:
                await stack.enter_async_context(lease)
            yield lease

    async def judge(self, asking: Asking, text: str, asked: str | None = None) -> Verdict:
        """One window. asked: `text` answers this, if anything. Raises GuardFailed; a cancellation
        passes."""
        given = self.settings
        if given.prompt:
            messages = [{"role": "user", "content": given.prompt.replace("{text}", text)}]
        elif asked is None:
            messages = [{"role": "user", "content": text}]
        else:
            question = {"role": "user", "content": asked[-2 * given.window_chars :]}
            messages = [question, {"role": "assistant", "content": text}]
        waiting = asyncio.timeout(given.timeout_seconds)
        held = asking.held.get(self.name)
        try:
            async with waiting:
                if held is not None:
                    return await self._ask(asking, held, messages)
                async with await asking.fleet.lease(given.model) as lease:
                    return await self._ask(asking, lease, messages)
        except QuantdError as error:
            raise GuardFailed(error.message) from error
        except TimeoutError:
            if not waiting.expired():
                raise
            raise GuardFailed(f"no answer within {given.timeout_seconds:g} s") from None

    async def _ask(self, asking: Asking, lease: Lease, messages: Messages) -> Verdict:
        variables: dict[str, Any] = dict(self.settings.variables)
        prompt = lease.text.encode_chat(messages, add_generation_prompt=True, **variables)
        if lease.info.pooling is not None:
            raise GuardFailed("its model generates no text")
        request = Request(
            id=f"guard-{uuid.uuid4().hex}",
            prompt=tuple(prompt),
            sampling=SamplingParams(
                max_tokens=_MAX_TOKENS,
                temperature=0.0,
                stop_token_ids=tuple(lease.text.eos_token_ids),
                logprobs=_TOP,
            ),
            arrival=asking.arrival,
            caller=asking.caller,
            is_batch=asking.is_batch,
        )
        stream = lease.engine.submit(request)
        tokens: list[int] = []
        logprobs: list[TokenLogprob] = []
        try:
            async for event in stream:
                tokens += event.tokens
                logprobs += event.logprobs
                if event.finish_reason not in (None, "stop", "length"):
                    raise GuardFailed(event.error or f"it ended by {event.finish_reason}")
        finally:
            stream.abort()
        return self._read(lease.text, tokens, logprobs)

    def _read(
        self, text: TextModel, tokens: Sequence[int], logprobs: Sequence[TokenLogprob]
    ) -> Verdict:
        answer = text.decode(tokens, skip_special_tokens=True).strip()
        said, given = answer.casefold(), self.settings
        if said.startswith(given.unsafe.casefold()):
            rest = answer[len(given.unsafe) :]
            named = [category for label, category in given.labels.items() if _has(rest, label)]
            found = tuple(dict.fromkeys(named)) or (self.name,)
            return Verdict(found, self._score(text, logprobs, 1.0))
        if said.startswith(given.safe.casefold()):
            return Verdict((), self._score(text, logprobs, 0.0))
        expected = f"{given.safe!r} or {given.unsafe!r}"
        raise GuardFailed(f"its answer begins with neither {expected}: {answer[:80]!r}")

    def _score(self, text: TextModel, logprobs: Sequence[TokenLogprob], default: float) -> float:
        """The share of "unsafe" at the first token that tells one answer from the other."""
        before = ""
        for entry in logprobs:
            mass = {True: 0.0, False: 0.0}
            for token, logprob in {entry.token: entry.logprob, **dict(entry.top)}.items():
                side = self._side(before + text.token_text(token))
                if side is not None:
                    mass[side] += math.exp(logprob)
            before += text.token_text(entry.token)
            if self._side(before) is not None and sum(mass.values()) > 0:
                return mass[True] / sum(mass.values())
        return default

    def _side(self, begun: str) -> bool | None:
        """True: it can only become "unsafe"; None: both, or neither."""
        begun = begun.strip().casefold()
        unsafe, safe = (
            answer.startswith(begun) or begun.startswith(answer)
            for answer in (self.settings.unsafe.casefold(), self.settings.safe.casefold())
        )
        return unsafe if unsafe is not safe else None


def _has(text: str, label: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(label)}(?!\w)", text, re.IGNORECASE) is not None

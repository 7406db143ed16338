"""From a checked body to the text of its choices: the path that all text APIs share.

One HTTP request is a `Generation`: prompts times n choices, each a request of the engine. What an
API adds is how the deltas are written down.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from quantd.daemon.errors import DeadlineExceeded, RequestError
from quantd.daemon.server.choice import Choice, Delta
from quantd.daemon.server.context import Asker
from quantd.daemon.server.pooled import refuse_pooled
from quantd.daemon.server.prompts import Prompt, PromptSource
from quantd.daemon.server.sampling import Options, check_ids
from quantd.daemon.server.submit import Submitter

if TYPE_CHECKING:
    from quantd.daemon.fleet import Fleet, Lease
    from quantd.daemon.server.screening import Screening
    from quantd.daemon.text import TextModel
    from quantd.daemon.types import Grammar


class Api(NamedTuple):
    """In what one API differs from another before there is any text."""

    id_prefix: str
    fields: Mapping[str, str] = MappingProxyType({})
    """The engine's name for a field → this API's, for errors."""
    takes_parts: bool = False
    """Deltas have parts: content, reasoning, calls. Else the text as it was generated."""


class CachedTokens(msgspec.Struct):
    cached_tokens: int


class ReasoningTokens(msgspec.Struct):
    reasoning_tokens: int


class Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens
    completion_tokens_details: ReasoningTokens


@dataclass(frozen=True, slots=True)
class Generation:
    """Running choices. Made by `generation`, whose exit aborts what has not ended."""

    id: str
    created: int
    model: str
    """The model's own name, also when an alias was asked for."""
    text: TextModel
    options: Options
    prompts: Sequence[Prompt]
    submitter: Submitter
    choices: list[Choice]
    """Prompt by prompt: choice i belongs to prompt i // n."""
    replaced: dict[int, Choice] = field(default_factory=dict)
    """Choices that were made again, by index: the first one of each."""

    @property
    def prompt_filtered(self) -> Mapping[str, bool]:
        """Each category that the policy found in the prompt → whether it was taken out."""
        screening = self.submitter.screening
        return {} if screening is None else screening.prompt_filtered

    def prompt_of(self, index: int) -> Prompt:
        return self.prompts[index // self.options.n]

    def usage(self) -> Usage:
        """A prompt counts once, however many choices it has; so do its cached tokens, as its first
        choice found them."""
        num_prompt = sum(len(prompt.ids) for prompt in self.prompts)
        every = [*self.choices, *self.replaced.values()]
        num_completion = sum(choice.num_tokens for choice in every)
        num_cached = sum(
            self.replaced.get(choice.index, choice).num_cached_tokens
            for choice in self.choices[:: self.options.n]
        )
        return Usage(
            num_prompt,
            num_completion,
            num_prompt + num_completion,
            CachedTokens(num_cached),
            ReasoningTokens(sum(choice.num_reasoning_tokens for choice in every)),
        )

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """What all choices say, as it comes. Raises what ended a choice badly."""
        if len(self.choices) == 1:
            choice = self.choices[0]
            while choice.finish_reason is None:
                yield await choice.next()
        else:
            async for delta in _interleave(self.choices):
                yield delta

    async def again(self, index: int) -> Choice:
        """A choice that has ended once more, from the same prompt, with calls that can be read. It
        takes the place of the first one, whose tokens stay counted."""
        prompt = self.prompt_of(index).ids
        grammar = self.submitter.grammar(prompt, enforced=True)
        if grammar is not None:
            await self.submitter.prepare(grammar)
        choice = self.submitter.submit(
            index, prompt, self.submitter.shared(), grammar, f"{self.id}-{index}-again"
        )
        self.replaced[index], self.choices[index] = self.choices[index], choice
        return choice

    def abort(self) -> None:
        for choice in self.choices:
            choice.abort()


async def _interleave(choices: Sequence[Choice]) -> AsyncIterator[Delta]:
    """One place for all: a choice is not read on before its delta is taken, so a slow reader
    holds back each of them, and their streams merge."""
    arrived: asyncio.Queue[Delta | Exception] = asyncio.Queue(maxsize=1)

    async def pump(choice: Choice) -> None:
        try:
            while choice.finish_reason is None:
                await arrived.put(await choice.next())
        except Exception as error:
            await arrived.put(error)

    pumps = [asyncio.create_task(pump(choice)) for choice in choices]
    try:
        num_running = len(choices)
        while num_running:
            delta = await arrived.get()
            if isinstance(delta, Exception):
                raise delta
            num_running -= delta.finish_reason is not None
            yield delta
    finally:
        for task in pumps:
            task.cancel()


class Admitted(NamedTuple):
    """What the model may read. Made by `admitted` alone."""

    source: PromptSource
    screening: Screening[PromptSource] | None
    """None: no policy holds."""


@asynccontextmanager
async def admitted(
    asker: Asker, model: str | None, source: PromptSource, api: Api
) -> AsyncIterator[Admitted]:
    """What the caller's policy makes of a prompt; to be asked before there is a lease, and kept
    until the answer has ended. Raises ContentFiltered, ModelNotFound."""
    if asker.state.policies is None:
        yield Admitted(source, None)
        return
    from quantd.daemon.server.screening import screened  # most daemons have no policies

    screening = await screened(asker, model, source, api.fields.get("prompt", "prompt"))
    if screening is None:
        yield Admitted(source, None)
        return
    async with screening.guarding():
        yield Admitted(screening.source, screening)


@asynccontextmanager
async def generation(
    asker: Asker, model: str | None, options: Options, api: Api, source: PromptSource
) -> AsyncIterator[Generation]:
    """Asks the caller's policy, waits for the model, encodes, submits; gives the model back at the
    end, and what still runs is aborted whatever the reason: a client that left, a stop string, an
    error."""
    came = asker.clock.monotonic()
    for given in options.grammars():
        await asker.context.check_grammar(given)
    deadline = None if options.timeout is None else came + options.timeout
    async with (
        admitted(asker, model, source, api) as prompt,
        await _lease(asker.fleet, model, options.timeout) as lease,
        generation_by(lease, asker, options, api, prompt, deadline) as made,
    ):
        yield made


@asynccontextmanager
async def generation_by(
    lease: Lease,
    asker: Asker,
    options: Options,
    api: Api,
    prompt: Admitted,
    deadline: float | None = None,
) -> AsyncIterator[Generation]:
    """As `generation`, for who holds the model already and has checked the grammars. A second lease
    beside the first would wait for an unload that waits for the first."""
    refuse_pooled(lease)
    source, screening = prompt
    if screening is not None:
        screening.lend(lease)
    clock = asker.clock
    arrival = clock.monotonic()
    vocab_size = lease.info.vocab_size
    prompts = [_checked(p, options, vocab_size, api) for p in await source.encode(lease.text)]
    id = api.id_prefix + (options.request_id or uuid.uuid4().hex)
    made = Generation(
        id=id,
        created=int(clock.wall()),
        model=lease.name,
        text=lease.text,
        options=options,
        prompts=prompts,
        submitter=Submitter(
            lease, options, api.takes_parts, id, arrival, deadline, asker, screening
        ),
        choices=[],
    )
    try:
        try:
            await _submit(made)
        except RequestError as error:
            error.param = api.fields.get(error.param or "", error.param)
            raise
        yield made
    finally:
        made.abort()


def _checked(prompt: Prompt, options: Options, vocab_size: int, api: Api) -> Prompt:
    ids, name = prompt.ids, api.fields.get("prompt", "prompt")
    if options.truncate_prompt_tokens is not None:
        ids = ids[-options.truncate_prompt_tokens :]
    if not ids:
        raise RequestError("the prompt has no tokens; at least 1 is needed", param=name)
    check_ids(name, (min(ids), max(ids)), vocab_size)
    return Prompt(ids, prompt.text if len(ids) == len(prompt.ids) else None)


async def _lease(fleet: Fleet, model: str | None, timeout: float | None) -> Lease:
    """Waits while the model loads, but not longer than the caller would."""
    waiting = asyncio.timeout(timeout)
    try:
        async with waiting:
            return await fleet.lease(model)
    except TimeoutError:
        if not waiting.expired():
            raise
        raise DeadlineExceeded(
            f"the timeout of {timeout:g} s is over: the model was still being loaded",
            param="timeout",
        ) from None


async def _submit(made: Generation) -> None:
    """All or none: when a later one is refused, the caller's `finally` aborts the earlier ones."""
    submitter, shared = made.submitter, made.submitter.shared()
    ready: Grammar | None = None
    for prompt in made.prompts:
        grammar = submitter.grammar(prompt.ids)
        if grammar is not None and grammar is not ready:
            await submitter.prepare(grammar)
            ready = grammar
        for _ in range(made.options.n):
            number = len(made.choices)
            made.choices.append(submitter.submit(number, prompt.ids, shared, grammar))


async def collect(made: Generation) -> list[Delta]:
    """Everything that each choice says, for a response in one piece."""
    results = [Delta(choice.index) for choice in made.choices]
    async with aclosing(made.deltas()) as deltas:
        async for delta in deltas:
            results[delta.index].add(delta)
    return results

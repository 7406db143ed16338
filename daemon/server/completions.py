"""POST /v1/completions."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import msgspec
from aiohttp import web

from quantd.daemon.errors import RequestError
from quantd.daemon.server import limits
from quantd.daemon.server.body import decode, read_body
from quantd.daemon.server.choice import Delta, TokenEntry
from quantd.daemon.server.context import Asker, asker
from quantd.daemon.server.filtered import PromptResult, Results, prompt_results, results_of
from quantd.daemon.server.generate import Api, Generation, Usage, collect, generation
from quantd.daemon.server.logprobs import CompletionLogprobs, completion_logprobs
from quantd.daemon.server.messages import off_loop
from quantd.daemon.server.models import json_response
from quantd.daemon.server.prompts import Change, Prompt, Texts
from quantd.daemon.server.sampling import (
    Options,
    integer,
    read_options,
    refuse_unserved,
)
from quantd.daemon.server.schemas import CompletionBody
from quantd.daemon.server.stream import ChunkTemplate, stream_generation, token_ids
from quantd.daemon.text import OutputText

if TYPE_CHECKING:
    from quantd.daemon.text import TextModel

_DECODER = msgspec.json.Decoder(CompletionBody)
_API = Api("cmpl-")
_UNSERVED = ("suffix", "prompt_embeds")
DEFAULT_MAX_TOKENS = 16
"""OpenAI's, for this API only."""
MAX_PROMPTS = 2048


class CompletionChoice(msgspec.Struct):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str
    stop_reason: str | int | None
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET
    prompt_token_ids: Sequence[int] | msgspec.UnsetType = msgspec.UNSET
    content_filter_results: Results | msgspec.UnsetType = msgspec.UNSET


class CompletionReply(msgspec.Struct):
    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    service_tier: str | msgspec.UnsetType = msgspec.UNSET
    prompt_filter_results: list[PromptResult] | msgspec.UnsetType = msgspec.UNSET
    object: str = "text_completion"


async def completions(request: web.Request) -> web.StreamResponse:
    body = await read_body(request, _DECODER)
    options = _read_options(body)
    source = TextPrompts(body, _read_prompt(body.prompt))
    running = generation(asker(request), body.model, options, _API, source)
    if options.stream:
        return await stream_generation(request, running, partial(CompletionChunks, body.echo))
    return json_response(await _answer(running, body))


async def answer(raw: bytes, asker: Asker) -> CompletionReply:
    """The whole answer to a body that does not come with an HTTP request of its own."""
    body = decode(raw, _DECODER)
    options = _read_options(body)
    source = TextPrompts(body, _read_prompt(body.prompt))
    return await _answer(generation(asker, body.model, options, _API, source), body)


async def _answer(
    running: AbstractAsyncContextManager[Generation], body: CompletionBody
) -> CompletionReply:
    async with running as made:
        return _reply(made, await collect(made), bool(body.echo))


def _read_options(body: CompletionBody) -> Options:
    refuse_unserved(body, _UNSERVED)
    # With echo, 0 asks for the prompt and its logprobs alone.
    within = limits.NATURAL if body.echo else limits.POSITIVE
    max_tokens = integer("max_tokens", body.max_tokens, DEFAULT_MAX_TOKENS, within)
    logprobs = None
    if body.logprobs is not None:
        logprobs = integer("logprobs", body.logprobs, 0, limits.LOGPROBS)
    options = read_options(
        body,
        max_tokens=max_tokens,
        max_tokens_may_shrink=body.max_tokens is None,
        logprobs=logprobs,
        prompt_logprobs=logprobs if body.echo else None,
    )
    # As vLLM does: lm-eval takes the last one for what was generated behind the prompt.
    return dataclasses.replace(options, logs_stop_token=True)


def _read_prompt(prompt: str | list[str | int | list[int]]) -> list[str | list[int]]:
    """One entry per prompt. Raises RequestError for what is neither of OpenAI's four forms."""
    if isinstance(prompt, str):
        return [prompt]
    texts = [item for item in prompt if isinstance(item, str)]
    ids = [item for item in prompt if isinstance(item, int)]
    lists = [item for item in prompt if isinstance(item, list)]
    if len(prompt) > MAX_PROMPTS and not ids:
        raise RequestError(
            f"prompt has {len(prompt)} entries; the limit is {MAX_PROMPTS}", param="prompt"
        )
    for kind in (texts, lists):
        if kind and len(kind) == len(prompt):
            return list(kind)
    if ids and len(ids) == len(prompt):
        return [ids]
    raise RequestError(
        "prompt must be a string, a list of strings, a list of token ids, or a list of such lists"
        + ("; got an empty list" if not prompt else ""),
        param="prompt",
    )


@dataclass(frozen=True, slots=True)
class TextPrompts:
    """A body's prompts as the PromptSource that they are."""

    body: CompletionBody
    prompts: Sequence[str | list[int]]

    @property
    def is_text(self) -> bool:
        return Texts(self.prompts).is_text

    def mapped(self, change: Change) -> TextPrompts:
        return TextPrompts(self.body, Texts(self.prompts).mapped(change).texts)

    async def encode(self, text: TextModel) -> list[Prompt]:
        return await _encode(self.body, self.prompts, text)


async def _encode(
    body: CompletionBody, prompts: Sequence[str | list[int]], text: TextModel
) -> list[Prompt]:
    special = body.add_special_tokens is not False

    def encode() -> list[Prompt]:
        return [
            Prompt(tuple(text.encode(prompt, add_special_tokens=special)), prompt)
            if isinstance(prompt, str)
            else Prompt(tuple(prompt))
            for prompt in prompts
        ]

    num_chars = sum(len(prompt) for prompt in prompts if isinstance(prompt, str))
    return await off_loop(num_chars, encode)


class Echo:
    """A prompt as the beginning of its choice's text. `entries` needs the first event to be in."""

    def __init__(self, made: Generation, index: int) -> None:
        prompt = made.prompt_of(index)
        self._ids = prompt.ids
        self._choice = made.choices[index]
        shown = OutputText(made.text, (), skip_special_tokens=made.options.skip_special_tokens)
        fed = shown.feed(prompt.ids)
        self._offsets: Sequence[int] = fed.offsets
        if prompt.text is None:
            # Half a character at the end comes whole with the output, if there is one.
            tail = shown.flush().text if made.options.max_tokens == 0 else ""
            self.text = fed.text + tail
        else:
            self.text = prompt.text
            if fed.text != self.text:
                self._offsets = self._of_special_tokens(made.text) or fed.offsets

    def _of_special_tokens(self, text: TextModel) -> list[int] | None:
        """Where the caller has written special tokens, which the text then has; those that the
        tokenizer has put around it have no place of their own. None: that is not why it differs."""
        fed = OutputText(text, (), skip_special_tokens=False).feed(self._ids)
        start = fed.text.find(self.text)
        return None if start < 0 else [max(0, offset - start) for offset in fed.offsets]

    def entries(self) -> list[TokenEntry]:
        logprobs = self._choice.prompt_logprobs or (None,) * len(self._ids)
        limit = len(self.text)  # a normalizing tokenizer's text may be longer than the caller's
        return [
            TokenEntry(token, logprob, min(offset, limit))
            for token, logprob, offset in zip(self._ids, logprobs, self._offsets, strict=True)
        ]


def _reply(made: Generation, results: Sequence[Delta], echoes: bool) -> CompletionReply:
    return CompletionReply(
        id=made.id,
        created=made.created,
        model=made.model,
        choices=[_choice(made, result, echoes) for result in results],
        usage=made.usage(),
        service_tier=made.options.service_tier or msgspec.UNSET,
        prompt_filter_results=prompt_results(made),
    )


def _choice(made: Generation, result: Delta, echoes: bool) -> CompletionChoice:
    text, options = result.text, made.options
    logprobs = None
    if not echoes:
        logprobs = completion_logprobs(made.text, options, result.entries, 0)
    else:
        echo = Echo(made, result.index)
        text = echo.text + text
        logprobs = _echoed_logprobs(made, echo, result)
    prompt_ids = made.prompt_of(result.index).ids
    return CompletionChoice(
        index=result.index,
        text=text,
        logprobs=logprobs,
        finish_reason=result.finish_reason or "stop",
        stop_reason=result.stop_reason,
        token_ids=token_ids(options, result),
        prompt_token_ids=prompt_ids if options.return_token_ids else msgspec.UNSET,
        content_filter_results=results_of(result.filtered),
    )


def _echoed_logprobs(made: Generation, echo: Echo, delta: Delta) -> CompletionLogprobs | None:
    if made.options.base.logprobs is None:
        return None
    base = len(echo.text)
    output = [entry._replace(offset=base + entry.offset) for entry in delta.entries]
    return completion_logprobs(made.text, made.options, [*echo.entries(), *output], 0)


class CompletionChunks:
    """Deltas as text_completion events."""

    def __init__(self, echoes: bool | None, made: Generation) -> None:
        self._made = made
        self._template = ChunkTemplate(made, "text_completion")
        self._echoes = bool(echoes)
        self._bases: dict[int, int] = {}
        """Choice → characters of echoed prompt before its output."""

    def encode(self, delta: Delta) -> bytes:
        """The events of one delta, in one piece: the echoed prompt, text, finish."""
        template, index, made = self._template, delta.index, self._made
        text, logprobs, prompt_ids = delta.text, None, b""
        is_first = index not in self._bases
        if is_first:
            self._bases[index] = 0
            prompt_ids = template.prompt_ids(index)
        if is_first and self._echoes:
            echo = Echo(made, index)
            self._bases[index] = len(echo.text)
            text = echo.text + text
            logprobs = _echoed_logprobs(made, echo, delta)
        elif delta.entries:
            base = self._bases[index]
            logprobs = completion_logprobs(made.text, made.options, delta.entries, base)
        data = b""
        if text or delta.entries or logprobs is not None or prompt_ids:
            data = template.chunk(
                index,
                b'"text":' + msgspec.json.encode(text),
                b"null" if logprobs is None else msgspec.json.encode(logprobs),
                extra=template.token_ids(delta) + prompt_ids,
            )
        if delta.finish_reason is not None:
            data += template.finish(b'"text":""', delta)
        return data

    def end(self) -> bytes:
        """After the last choice: usage if asked for, and the mark of the end."""
        return self._template.end()

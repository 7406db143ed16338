"""POST /v1/chat/completions."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING

import msgspec
from aiohttp import web

from quantd.daemon.errors import RequestError
from quantd.daemon.server import limits
from quantd.daemon.server.body import decode, read_body
from quantd.daemon.server.context import Asker, asker
from quantd.daemon.server.filtered import PromptResult, Results, prompt_results, results_of
from quantd.daemon.server.generate import Api, Generation, Usage, generation
from quantd.daemon.server.logprobs import ChatLogprobs, chat_logprobs
from quantd.daemon.server.messages import check_messages, encode_messages, num_chars, off_loop
from quantd.daemon.server.models import json_response
from quantd.daemon.server.prompts import Change, Prompt, map_json, map_messages
from quantd.daemon.server.reply import ReplyMessage, delta_member, message
from quantd.daemon.server.retry import collect_valid
from quantd.daemon.server.sampling import (
    Options,
    integer,
    read_options,
    refuse_unserved,
)
from quantd.daemon.server.schemas import ChatBody
from quantd.daemon.server.stream import ChunkTemplate, stream_generation, token_ids
from quantd.daemon.server.tools import read_tools
from quantd.daemon.text.answer import Reasoning, whole

if TYPE_CHECKING:
    from quantd.daemon.server.choice import Delta
    from quantd.daemon.text import TextModel

_DECODER = msgspec.json.Decoder(ChatBody)
_API = Api("chatcmpl-", MappingProxyType({"prompt": "messages"}), takes_parts=True)
_UNSERVED = (
    "functions",
    "function_call",
    "modalities",
    "audio",
    "moderation",
    "web_search_options",
    "thinking_token_budget",
    "add_special_tokens",
)


class ChatChoice(msgspec.Struct):
    index: int
    message: ReplyMessage
    logprobs: ChatLogprobs | None
    finish_reason: str
    stop_reason: str | int | None
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET
    tool_call_retries: int | msgspec.UnsetType = msgspec.UNSET
    """How often it was made again because of a call that was not valid."""
    content_filter_results: Results | msgspec.UnsetType = msgspec.UNSET
    """Only under a policy that has found something in it."""


class ChatReply(msgspec.Struct):
    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    service_tier: str | msgspec.UnsetType = msgspec.UNSET
    prompt_token_ids: Sequence[int] | msgspec.UnsetType = msgspec.UNSET
    prompt_filter_results: list[PromptResult] | msgspec.UnsetType = msgspec.UNSET
    object: str = "chat.completion"


async def chat_completions(request: web.Request) -> web.StreamResponse:
    body = await read_body(request, _DECODER)
    options = read_options_of(body)
    who = asker(request)
    running = generation(who, body.model, options, _API, ChatPrompt(body, options))
    if options.stream:
        chunks = partial(ChatChunks, hides_reasoning=body.include_reasoning is False)
        return await stream_generation(request, running, chunks)
    return json_response(await _answer(who, running, body))


async def answer(raw: bytes, asker: Asker) -> ChatReply:
    """The whole answer to a body that does not come with an HTTP request of its own."""
    body = decode(raw, _DECODER)
    options = read_options_of(body)
    running = generation(asker, body.model, options, _API, ChatPrompt(body, options))
    return await _answer(asker, running, body)


async def _answer(
    asker: Asker, running: AbstractAsyncContextManager[Generation], body: ChatBody
) -> ChatReply:
    async with running as made:
        results = await collect_valid(made, asker.context.metrics)
        return _reply(made, results, hides_reasoning=body.include_reasoning is False)


def read_options_of(body: ChatBody) -> Options:
    check_messages(body, body.messages)
    refuse_unserved(body, _UNSERVED)
    max_tokens = None
    # The newer name wins where a client sends both for the sake of older servers.
    for name in ("max_tokens", "max_completion_tokens"):
        value = getattr(body, name)
        if value is not None:
            max_tokens = integer(name, value, 1, limits.POSITIVE)
    num_top = integer("top_logprobs", body.top_logprobs, 0, limits.LOGPROBS)
    if num_top and not body.logprobs:
        raise RequestError("top_logprobs needs logprobs to be true", param="top_logprobs")
    tools = read_tools(body.tools, body.tool_choice, body.parallel_tool_calls)
    options = read_options(body, max_tokens=max_tokens, logprobs=num_top if body.logprobs else None)
    return dataclasses.replace(options, tools=tools)


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A chat as the PromptSource that it is."""

    body: ChatBody
    options: Options

    is_text = True

    def mapped(self, change: Change) -> ChatPrompt:
        body, tools = self.body, self.options.tools
        if tools is not None:
            # Only what the model sees: what calls are held to is as the caller declared it.
            shown = tuple(map_json(tools.shown, change))
            tools = dataclasses.replace(tools, shown=shown)
        effort = body.reasoning_effort
        made = msgspec.structs.replace(
            body,
            reasoning_effort=None if effort is None else change(effort, False),
            messages=map_messages(body.messages, change),
            chat_template_kwargs=map_json(body.chat_template_kwargs, change),
        )
        return ChatPrompt(made, dataclasses.replace(self.options, tools=tools))

    async def encode(self, text: TextModel) -> list[Prompt]:
        return await encode(self.body, self.options, text)


async def encode(body: ChatBody, options: Options, text: TextModel) -> list[Prompt]:
    tools = None
    if options.tools is not None:
        options.tools.check(text.format)
        tools = options.tools.shown
    extra = {} if body.reasoning_effort is None else {"reasoning_effort": body.reasoning_effort}
    work = partial(encode_messages, text, body, body.messages, tools, extra)
    return [Prompt(tuple(await off_loop(num_chars(body.messages, tools), work)))]


def _reply(made: Generation, results: Sequence[Delta], *, hides_reasoning: bool) -> ChatReply:
    options = made.options
    return ChatReply(
        id=made.id,
        created=made.created,
        model=made.model,
        choices=[
            ChatChoice(
                index=result.index,
                message=message(whole(result.parts), hides_reasoning=hides_reasoning),
                logprobs=chat_logprobs(made.text, options, result.entries),
                finish_reason=result.finish_reason or "stop",
                stop_reason=result.stop_reason,
                token_ids=token_ids(options, result),
                tool_call_retries=1 if result.index in made.replaced else msgspec.UNSET,
                content_filter_results=results_of(result.filtered),
            )
            for result in results
        ],
        usage=made.usage(),
        service_tier=options.service_tier or msgspec.UNSET,
        prompt_token_ids=made.prompts[0].ids if options.return_token_ids else msgspec.UNSET,
        prompt_filter_results=prompt_results(made),
    )


class ChatChunks:
    """Deltas as chat.completion.chunk events."""

    def __init__(self, made: Generation, *, hides_reasoning: bool) -> None:
        self._made = made
        self._hides_reasoning = hides_reasoning
        self._template = ChunkTemplate(made, "chat.completion.chunk")
        self._begun: set[int] = set()

    def encode(self, delta: Delta) -> bytes:
        """The events of one delta, in one piece: role if it is the first, text, finish."""
        parts: list[bytes] = []
        index, template = delta.index, self._template
        if index not in self._begun:
            first = template.chunk(index, b'"delta":{"role":"assistant","content":""}')
            if not self._begun:  # a member of the chunk, as of a whole reply
                first = first[: -len(b"}\n\n")] + template.prompt_ids(index) + b"}\n\n"
            self._begun.add(index)
            parts.append(first)
        shown = delta.parts
        if self._hides_reasoning:
            shown = [part for part in shown if not isinstance(part, Reasoning)]
        if delta.entries:
            parts.append(self._chunk_of_tokens(delta, delta_member(*shown[:1])))
            shown = shown[1:]
        for part in shown:
            parts.append(template.chunk(index, delta_member(part)))
        if delta.finish_reason is not None:
            parts.append(template.finish(b'"delta":{}', delta))
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _chunk_of_tokens(self, delta: Delta, member: bytes) -> bytes:
        """With the log probabilities and ids of all the delta's tokens."""
        logprobs = chat_logprobs(self._made.text, self._made.options, delta.entries)
        return self._template.chunk(
            delta.index,
            member,
            b"null" if logprobs is None else msgspec.json.encode(logprobs),
            extra=self._template.token_ids(delta),
        )

    def end(self) -> bytes:
        """After the last choice: usage if asked for, and the mark of the end."""
        return self._template.end()

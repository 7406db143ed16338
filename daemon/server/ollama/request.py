"""A body of Ollama's as the chat, or bare text, that it means: what is checked without a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from quantd.daemon.errors import RequestError
from quantd.daemon.server import chat
from quantd.daemon.server.generate import Api
from quantd.daemon.server.limits import LOGPROBS
from quantd.daemon.server.messages import off_loop
from quantd.daemon.server.ollama.options import (
    check_integers,
    generation_fields,
    keep_alive_seconds,
)
from quantd.daemon.server.ollama.schemas import (
    AnswerRequest,
    ChatMessage,
    ChatRequest,
    GenerateRequest,
    MadeCall,
)
from quantd.daemon.server.prompts import Change, Prompt, PromptSource
from quantd.daemon.server.sampling import (
    Options,
    integer,
    out_of_range,
    read_options,
    refuse_unserved,
)
from quantd.daemon.server.schemas import ChatBody, GenerationBody, Json, Message

if TYPE_CHECKING:
    from quantd.daemon.text import TextModel

_CHAT = Api("chat-", {"prompt": "messages"}, takes_parts=True)
_TEMPLATED = Api("gen-", takes_parts=True)
_RAW = Api("gen-")
_LEVELS = ("low", "medium", "high")
_BESIDE_RAW = ("system", "template", "context")


@dataclass(frozen=True, slots=True)
class Wanted:
    """A checked body that wants an answer."""

    sent: AnswerRequest
    options: Options
    api: Api
    source: PromptSource


def read_chat(sent: ChatRequest) -> Wanted | None:
    """None: it has no messages, so it is about the model's being in memory. Raises RequestError."""
    _check(sent)
    if not sent.messages:
        return None
    messages = [*_messages(sent.messages)]
    return _chat(sent, messages, _CHAT, sent.tools)


def read_generate(sent: GenerateRequest) -> Wanted | None:
    """None: it has no prompt. Raises RequestError."""
    _check(sent)
    if sent.raw:
        for name in _BESIDE_RAW:
            if getattr(sent, name):
                raise RequestError(f"{name} cannot be given beside raw", param=name)
    refuse_unserved(sent, ("suffix", "template"))
    if sent.context:
        raise RequestError(
            "context is not supported by this server, and its answers have none: send the "
            "conversation to /api/chat",
            param="context",
            code="unsupported_parameter",
        )
    _refuse_images(sent.images, "images")
    if not sent.prompt:
        return None
    if sent.raw:
        return _raw(sent, sent.prompt)
    messages = [Message("system", sent.system)] if sent.system else []
    return _chat(sent, [*messages, Message("user", sent.prompt)], _TEMPLATED)


def _check(sent: AnswerRequest) -> None:
    """What is wrong whatever is asked for."""
    keep_alive_seconds(sent.keep_alive)
    check_integers(sent.options)
    integer("top_logprobs", sent.top_logprobs, 0, LOGPROBS)


def _chat(
    sent: AnswerRequest,
    messages: list[Message],
    api: Api,
    tools: list[dict[str, Json]] | None = None,
) -> Wanted:
    last = messages[-1]
    body = ChatBody(
        **generation_fields(sent),
        messages=messages,
        # An assistant's message at the end is the beginning of the answer.
        continue_final_message=last.role == "assistant" and not last.tool_calls,
        tools=tools,
        logprobs=sent.logprobs,
        top_logprobs=sent.top_logprobs,
        **_thinking(sent.think),
    )
    options = dataclasses.replace(chat.read_options_of(body), max_tokens_may_shrink=True)
    return Wanted(sent, options, api, chat.ChatPrompt(body, options))


def _raw(sent: GenerateRequest, prompt: str) -> Wanted:
    if sent.think:
        raise RequestError("think cannot be given beside raw", param="think")
    fields = generation_fields(sent)
    num_top = integer("top_logprobs", sent.top_logprobs, 0, LOGPROBS)
    options = read_options(
        GenerationBody(**fields),
        max_tokens=fields["max_tokens"],
        max_tokens_may_shrink=True,
        logprobs=num_top if sent.logprobs else None,
    )
    return Wanted(sent, options, _RAW, _RawPrompt(prompt))


@dataclass(frozen=True, slots=True)
class _RawPrompt:
    """A text as the PromptSource that it is."""

    prompt: str

    is_text = True

    def mapped(self, change: Change) -> _RawPrompt:
        return _RawPrompt(change(self.prompt, False))

    async def encode(self, text: TextModel) -> list[Prompt]:
        encode = partial(text.encode, self.prompt)
        return [Prompt(tuple(await off_loop(len(self.prompt), encode)), self.prompt)]


def _thinking(think: bool | str | None) -> dict[str, Any]:
    """Fields of a chat; without a word the template decides."""
    if think is None:
        return {}
    if isinstance(think, bool):
        return {"chat_template_kwargs": {"enable_thinking": think}}
    if think not in _LEVELS:
        raise out_of_range("think", think[:64], "true, false, 'low', 'medium' or 'high'")
    return {"chat_template_kwargs": {"enable_thinking": True}, "reasoning_effort": think}


def _messages(sent: Sequence[ChatMessage]) -> Iterator[Message]:
    """Calls get ids, which some templates want and Ollama's clients do not send: the same ones
    whenever the conversation comes again, so that what was computed is found."""
    calls: list[tuple[str, str]] = []
    open: list[tuple[str, str]] = []
    for index, message in enumerate(sent):
        where = f"messages[{index}]"
        _refuse_images(message.images, f"{where}.images")
        if message.role == "tool":
            yield _result(message, open)
            continue
        made = [_call(call, len(calls) + i) for i, call in enumerate(message.tool_calls or ())]
        named = [(call["id"], call["function"]["name"]) for call in made]
        calls += named
        open += named
        yield Message(
            message.role,
            message.content or "",
            tool_calls=made or None,
            reasoning=message.thinking or None,
        )


def _call(call: MadeCall, number: int) -> dict[str, Json]:
    # Nine letters and digits: Mistral's templates take no others.
    id = call.id or f"call{number:05d}"
    function = {"name": call.function.name, "arguments": call.function.arguments or {}}
    return {"id": id, "type": "function", "function": function}


def _result(message: ChatMessage, open: list[tuple[str, str]]) -> Message:
    """Of the first call that has none yet, by the id or the name that the message says."""
    given = message.tool_call_id
    name = message.tool_name
    for call in open:
        if (given is None or given == call[0]) and (name is None or name == call[1]):
            open.remove(call)
            given, name = call
            break
    return Message("tool", message.content or "", name=name, tool_call_id=given)


def _refuse_images(images: Sequence[Json] | None, where: str) -> None:
    if images:
        raise RequestError(
            f"{where}: images are not supported, this model reads text only",
            param=where,
            code="unsupported_content",
        )

"""What the events of OpenAI's older streams say, for the schema. The streams themselves are written
from constant bytes (`stream.py`); tests hold them to these types."""

from __future__ import annotations

from msgspec import UNSET, Struct, UnsetType

from quantd.daemon.server.filtered import PromptResult, Results
from quantd.daemon.server.generate import Usage
from quantd.daemon.server.logprobs import ChatLogprobs, CompletionLogprobs


class FunctionDelta(Struct):
    arguments: str
    name: str | UnsetType = UNSET


class CallDelta(Struct):
    index: int
    function: FunctionDelta
    id: str | UnsetType = UNSET
    type: str | UnsetType = UNSET


class MessageDelta(Struct):
    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[CallDelta] | UnsetType = UNSET


class ChatChunkChoice(Struct):
    index: int
    delta: MessageDelta
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: str | int | None | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET
    content_filter_results: Results | UnsetType = UNSET


class ChatChunk(Struct):
    id: str
    object: str
    created: int
    model: str
    choices: list[ChatChunkChoice]
    """Empty in the one with the usage."""
    usage: Usage | None | UnsetType = UNSET
    service_tier: str | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    """In the first one."""
    prompt_filter_results: list[PromptResult] | UnsetType = UNSET


class CompletionChunkChoice(Struct):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    stop_reason: str | int | None | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    content_filter_results: Results | UnsetType = UNSET


class CompletionChunk(Struct):
    id: str
    object: str
    created: int
    model: str
    choices: list[CompletionChunkChoice]
    """Empty in the one with the usage."""
    usage: Usage | None | UnsetType = UNSET
    service_tier: str | UnsetType = UNSET
    prompt_filter_results: list[PromptResult] | UnsetType = UNSET

"""The response object, as it is answered, streamed and kept."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from quantd.daemon.errors import QuantdError, QueueFull, RequestError
from quantd.daemon.server.filtered import PromptResult, Results
from quantd.daemon.server.generate import Usage
from quantd.daemon.server.responses.items import AnyItem
from quantd.daemon.server.responses.request import Reasoning, TextOptions, Wanted
from quantd.daemon.server.schemas import Json


class ResponseError(msgspec.Struct):
    code: str
    message: str


class IncompleteDetails(msgspec.Struct):
    reason: str


class ConversationId(msgspec.Struct):
    id: str


class InputDetails(msgspec.Struct):
    cached_tokens: int
    cache_write_tokens: int = 0
    """What OpenAI bills for; here nothing is."""


class OutputDetails(msgspec.Struct):
    reasoning_tokens: int


class ResponseUsage(msgspec.Struct):
    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class ResponseObject(msgspec.Struct, kw_only=True):
    id: str
    object: str = "response"
    created_at: int
    status: str
    background: bool
    completed_at: int | None = None
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | float | None
    max_tool_calls: int | float | None
    model: str
    output: list[AnyItem] = []
    parallel_tool_calls: bool
    previous_response_id: str | None
    conversation: ConversationId | None
    reasoning: dict[str, Json]
    service_tier: str = "default"
    store: bool
    temperature: float
    text: dict[str, Json]
    tool_choice: Json
    tools: Sequence[Json]
    top_logprobs: int | float
    top_p: float
    truncation: str
    usage: ResponseUsage | None = None
    user: Json
    safety_identifier: Json
    prompt_cache_key: Json
    metadata: dict[str, str]
    dropped_items: list[str] | msgspec.UnsetType = msgspec.UNSET
    """Ours, with truncation "auto": the ids of what was left out of the context, if anything."""
    content_filter_results: Results | msgspec.UnsetType = msgspec.UNSET
    prompt_filter_results: list[PromptResult] | msgspec.UnsetType = msgspec.UNSET
    """Ours: what the safety filter has found, if anything."""


def new_object(id: str, created_at: int, model: str, wanted: Wanted, status: str) -> ResponseObject:
    body, base = wanted.body, wanted.options.base
    text, reasoning = body.text or TextOptions(), body.reasoning or Reasoning()
    verbosity = {"verbosity": text.verbosity} if text.verbosity else {}
    return ResponseObject(
        id=id,
        created_at=created_at,
        status=status,
        background=bool(body.background),
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        max_tool_calls=body.max_tool_calls,
        model=model,
        parallel_tool_calls=body.parallel_tool_calls is not False,
        previous_response_id=body.previous_response_id,
        conversation=None if wanted.conversation is None else ConversationId(wanted.conversation),
        reasoning={"effort": reasoning.effort, "summary": None},
        store=wanted.is_kept,
        temperature=base.temperature,
        text={"format": text.format or {"type": "text"}} | verbosity,
        tool_choice=body.tool_choice or "auto",
        tools=[{"strict": True} | tool for tool in body.tools or ()],
        top_logprobs=body.top_logprobs or 0,
        top_p=base.top_p,
        truncation=body.truncation or "disabled",
        user=body.user,
        safety_identifier=body.safety_identifier,
        prompt_cache_key=body.prompt_cache_key,
        metadata=body.metadata or {},
    )


def usage_of(usage: Usage) -> ResponseUsage:
    return ResponseUsage(
        usage.prompt_tokens,
        InputDetails(usage.prompt_tokens_details.cached_tokens),
        usage.completion_tokens,
        OutputDetails(usage.completion_tokens_details.reasoning_tokens),
        usage.total_tokens,
    )


def fail(response: ResponseObject, error: QuantdError) -> None:
    """In place: what has ended it, in the few codes that clients know."""
    code = "server_error"
    if isinstance(error, QueueFull):
        code = "rate_limit_exceeded"
    elif isinstance(error, RequestError):
        code = "invalid_prompt"
    response.status = "failed"
    response.error = ResponseError(code, error.message)

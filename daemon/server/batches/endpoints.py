"""What a line of a batch may ask for: a body, as an API takes it, to a reply in one piece."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from quantd.daemon.errors import RequestError
from quantd.daemon.server import chat, completions, embeddings, moderations
from quantd.daemon.server.context import Asker
from quantd.daemon.server.responses import routes as responses
from quantd.daemon.server.responses.object import ResponseObject
from quantd.daemon.server.state import State


class Counts(NamedTuple):
    """Of tokens, under the names of the newer APIs."""

    input: int
    cached: int
    output: int
    reasoning: int


class Endpoint(NamedTuple):
    answer: Callable[[bytes, Asker], Awaitable[Any]]
    """From the body to the reply's struct; raises what the route would answer with."""
    counts: Callable[[Any], Counts]
    """Of a reply."""
    check_model: Callable[[Asker, str | None], object]
    """Raises RequestError for a model that is not served, and where none may be left out."""


def _counts(reply: chat.ChatReply | completions.CompletionReply) -> Counts:
    usage = reply.usage
    return Counts(
        usage.prompt_tokens,
        usage.prompt_tokens_details.cached_tokens,
        usage.completion_tokens,
        usage.completion_tokens_details.reasoning_tokens,
    )


def _response_counts(reply: ResponseObject) -> Counts:
    usage = reply.usage
    assert usage is not None, "it has ended"
    return Counts(
        usage.input_tokens,
        usage.input_tokens_details.cached_tokens,
        usage.output_tokens,
        usage.output_tokens_details.reasoning_tokens,
    )


def _embedding_counts(reply: embeddings.EmbeddingReply) -> Counts:
    return Counts(reply.usage.prompt_tokens, 0, 0, 0)


def _no_counts(reply: moderations.ModerationReply) -> Counts:
    return Counts(0, 0, 0, 0)


def _check_model(asker: Asker, model: str | None) -> None:
    if model is None:
        raise RequestError("model: this field is required", code="invalid_request")
    asker.fleet.resolve(model)


MODERATIONS = "/v1/moderations"
ENDPOINTS: Mapping[str, Endpoint] = MappingProxyType(
    {
        "/v1/chat/completions": Endpoint(chat.answer, _counts, _check_model),
        "/v1/completions": Endpoint(completions.answer, _counts, _check_model),
        "/v1/embeddings": Endpoint(embeddings.answer, _embedding_counts, _check_model),
        "/v1/responses": Endpoint(responses.answer, _response_counts, _check_model),
        MODERATIONS: Endpoint(moderations.answer, _no_counts, moderations.check_model),
    }
)
"""By URL. A new one needs no more than its line here."""


def served(state: State) -> list[str]:
    """Where lines may go; without a safety filter there is nothing that moderates."""
    policies = state.policies
    moderates = policies is not None and bool(policies.by_name or policies.guards)
    return [url for url in ENDPOINTS if url != MODERATIONS or moderates]

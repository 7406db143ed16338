"""What a line of a batch may ask for: a body, as an API takes it, to a reply in one piece."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from quantd.daemon.server import chat, completions, embeddings
from quantd.daemon.server.context import Asker
from quantd.daemon.server.responses import routes as responses
from quantd.daemon.server.responses.object import ResponseObject


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


ENDPOINTS: Mapping[str, Endpoint] = MappingProxyType(
    {
        "/v1/chat/completions": Endpoint(chat.answer, _counts),
        "/v1/completions": Endpoint(completions.answer, _counts),
        "/v1/embeddings": Endpoint(embeddings.answer, _embedding_counts),
        "/v1/responses": Endpoint(responses.answer, _response_counts),
    }
)
"""By URL. A new one needs no more than its line here."""

"""Texts to vectors: what embeddings and rerankings share."""

from __future__ import annotations

import uuid
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeVar

import msgspec

from quantd.daemon.errors import ContextLengthExceeded, QueueFull, RequestError, Unavailable
from quantd.daemon.server.context import Asker
from quantd.daemon.server.limits import POSITIVE, PRIORITY, TEXTS
from quantd.daemon.server.messages import off_loop
from quantd.daemon.server.prompts import Texts
from quantd.daemon.server.sampling import check_ids, integer, refuse_unserved
from quantd.daemon.server.schemas import PooledBody
from quantd.daemon.types import Pooling, Request, SamplingParams

if TYPE_CHECKING:
    from quantd.daemon.engine.engine import Engine
    from quantd.daemon.engine.stream import TokenStream
    from quantd.daemon.fleet import Lease

T = TypeVar("T")
_AT_ONCE = 128
"""Of one request in the queue: a large one leaves places to others."""
_ONE_TOKEN = SamplingParams(max_tokens=1)
"""In whose place the vector comes."""

_KINDS = {"embed": "an embedding model", "rerank": "a reranker"}


class PooledUsage(msgspec.Struct):
    prompt_tokens: int
    total_tokens: int


class Text(NamedTuple):
    ids: Sequence[int]
    second: int | None = None
    """Where the second of a pair begins, if the model is told."""


class Options(NamedTuple):
    """What a checked body asks for beside its texts."""

    most: int | None
    """Tokens to which a text is cut; None: it is not."""
    priority: int


def read_options(body: PooledBody) -> Options:
    """Raises RequestError that names the field; needs no model."""
    refuse_unserved(body, ("timeout",))
    most = body.truncate_prompt_tokens
    return Options(
        None if most is None else integer("truncate_prompt_tokens", most, 0, POSITIVE),
        integer("priority", body.priority, 0, PRIORITY),
    )


def check_count(name: str, count: int) -> None:
    """Raises RequestError for none and for too many."""
    low, high = TEXTS
    if not low <= count <= high:
        raise RequestError(f"{name} must have {low} to {high} entries, got {count}", param=name)


def check_task(lease: Lease, task: Literal["embed", "rerank"]) -> Pooling:
    """Raises RequestError when the model is made for something else."""
    pooling = lease.info.pooling
    if pooling is not None and pooling.task == task:
        return pooling
    hint = ""
    if pooling is None and task == "embed":
        hint = ' Set task = "embed" in its configuration to have embeddings of it.'
    made_for = "it generates text" if pooling is None else f"it is {_KINDS[pooling.task]}"
    raise RequestError(
        f"The model {lease.name!r} is not {_KINDS[task]}: {made_for}.{hint}",
        param="model",
        code="unsupported_task",
    )


def refuse_pooled(lease: Lease) -> None:
    """Raises RequestError for a model that does not generate."""
    pooling = lease.info.pooling
    if pooling is not None:
        route = "/v1/embeddings" if pooling.task == "embed" else "/v1/rerank"
        kind = _KINDS[pooling.task]
        raise RequestError(
            f"The model {lease.name!r} is {kind} and generates no text: use {route}.",
            param="model",
            code="unsupported_task",
        )


def check_text(name: str, ids: Sequence[int], lease: Lease) -> None:
    """Raises RequestError for what the model cannot take; nothing is cut unasked."""
    if not ids:
        raise RequestError(f"{name} has no tokens; at least 1 is needed", param=name)
    field = name.partition("[")[0]
    check_ids(field, (min(ids), max(ids)), lease.info.vocab_size)
    limit = lease.info.max_context
    if len(ids) > limit:
        raise ContextLengthExceeded(
            f"This model's maximum context length is {limit} tokens. However, {name} has "
            f"{len(ids)} tokens. Please shorten it, or ask for truncate_prompt_tokens.",
            param=field,
        )


async def screened_texts(
    asker: Asker, model: str | None, field: str, texts: Sequence[str | list[int]]
) -> Sequence[str | list[int]]:
    """As the caller's policy lets the model read them. Raises ContentFiltered, ModelNotFound."""
    if asker.state.policies is None:
        return texts
    from quantd.daemon.server.screening import screened  # most daemons have no policies

    screening = await screened(asker, model, Texts(texts), field)
    return texts if screening is None else screening.source.texts


async def encoded(field: str, num_chars: int, encode: Callable[[], T]) -> T:
    """What `encode` gives, in a thread when the texts are long; its errors name the field."""
    try:
        return await off_loop(num_chars, encode)
    except RequestError as error:
        error.param = error.param or field
        raise


async def vectors(
    asker: Asker,
    lease: Lease,
    field: str,
    texts: Sequence[Text],
    options: Options,
) -> list[bytes]:
    """One for each text, in order; `field` is where they stand in the body. Raises QueueFull,
    Unavailable and what admission refuses; what still runs at the end, for whatever reason, is
    aborted."""
    id, arrival = uuid.uuid4().hex, asker.clock.monotonic()
    requests = (
        Request(
            id=f"pool-{id}-{index}",
            prompt=tuple(text.ids),
            sampling=_ONE_TOKEN,
            priority=options.priority,
            arrival=arrival,
            caller=asker.caller,
            is_batch=asker.is_batch,
            second=text.second,
        )
        for index, text in enumerate(texts)
    )
    streams: deque[TokenStream] = deque()
    found: list[bytes] = []

    async def wait_for_first() -> None:
        found.append(await _vector(streams[0]))
        streams.popleft()

    try:
        for request in requests:
            while len(streams) >= _AT_ONCE:
                await wait_for_first()
            while (stream := _submit(lease.engine, request, bool(streams))) is None:
                await wait_for_first()
            streams.append(stream)
        while streams:
            await wait_for_first()
        return found
    except RequestError as error:
        error.param = None if error.param is None else field
        raise
    finally:
        for stream in streams:
            stream.abort()


def _submit(engine: Engine, request: Request, may_wait: bool) -> TokenStream | None:
    """None when the queue is full, and some of our own in it will make room."""
    try:
        return engine.submit(request)
    except QueueFull:
        if may_wait:
            return None
        raise


async def _vector(stream: TokenStream) -> bytes:
    async for event in stream:
        if event.finish_reason not in (None, "stop", "length"):
            reason = event.error or f"it ended by {event.finish_reason}"
            raise Unavailable(f"the text was not computed: {reason}")
    assert stream.vector is not None
    return stream.vector

"""/v1/batches: making, looking at and cancelling them. They run in `batch_runner.py`."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated

import msgspec
from aiohttp import web

from quantd.daemon.errors import Conflict, NotFound, RequestError
from quantd.daemon.server import query
from quantd.daemon.server.body import read_body
from quantd.daemon.server.context import CALLER, CONTEXT
from quantd.daemon.server.files import BATCH_SECONDS, lifetime
from quantd.daemon.server.limits import EXPIRY_SECONDS, METADATA, PAGE, pattern, shown_as
from quantd.daemon.server.metadata import check_metadata
from quantd.daemon.server.models import json_response
from quantd.daemon.server.sampling import out_of_range, whole

if TYPE_CHECKING:
    from quantd.daemon.store import Batch

MAX_WINDOW = 7 * 86400
_WINDOW = re.compile(r"([1-9][0-9]{0,5})([smhd])")
_UNIT_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


class OutputExpiry(msgspec.Struct):
    anchor: str | None = None
    seconds: Annotated[int | float, EXPIRY_SECONDS.meta] | None = None


class BatchBody(msgspec.Struct):
    input_file_id: str
    endpoint: str
    completion_window: Annotated[str, pattern(_WINDOW.pattern)]
    """At most 7d."""
    metadata: Annotated[dict[str, str], METADATA] | None = None
    output_expires_after: OutputExpiry | None = None


_DECODER = msgspec.json.Decoder(BatchBody)


class RequestCounts(msgspec.Struct):
    total: int
    completed: int
    failed: int


class InputDetails(msgspec.Struct):
    cached_tokens: int


class OutputDetails(msgspec.Struct):
    reasoning_tokens: int


class BatchUsage(msgspec.Struct):
    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class BatchObject(msgspec.Struct):
    id: str
    endpoint: str
    errors: Annotated[msgspec.Raw, shown_as("batches.input.BatchErrors")] | None
    input_file_id: str
    completion_window: str
    status: str
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    usage: BatchUsage
    model: str | None
    metadata: Annotated[msgspec.Raw, shown_as("schemas.Metadata")] | None
    object: str = "batch"


class BatchList(msgspec.Struct):
    data: list[BatchObject]
    has_more: bool
    first_id: str | None
    last_id: str | None
    object: str = "list"


def batch_object(batch: Batch) -> BatchObject:
    return BatchObject(
        id=batch.id,
        endpoint=batch.endpoint,
        errors=None if batch.errors is None else msgspec.Raw(batch.errors),
        input_file_id=batch.input_file_id,
        completion_window=batch.completion_window,
        status=batch.status,
        output_file_id=batch.output_file_id,
        error_file_id=batch.error_file_id,
        created_at=batch.created_at,
        in_progress_at=batch.in_progress_at,
        expires_at=batch.expires_at,
        finalizing_at=batch.finalizing_at,
        completed_at=batch.completed_at,
        failed_at=batch.failed_at,
        expired_at=batch.expired_at,
        cancelling_at=batch.cancelling_at,
        cancelled_at=batch.cancelled_at,
        request_counts=RequestCounts(batch.total, batch.completed, batch.failed),
        usage=BatchUsage(
            batch.input_tokens,
            InputDetails(batch.cached_tokens),
            batch.output_tokens,
            OutputDetails(batch.reasoning_tokens),
            batch.input_tokens + batch.output_tokens,
        ),
        model=batch.model,
        metadata=None if batch.metadata is None else msgspec.Raw(batch.metadata),
    )


async def create_batch(request: web.Request) -> web.Response:
    from quantd.daemon.server.batches.endpoints import served
    from quantd.daemon.store import Batch
    from quantd.daemon.store.rows import new_id

    context = request.app[CONTEXT]
    body = await read_body(request, _DECODER)
    endpoints = served(context.state)
    if body.endpoint not in endpoints:
        raise out_of_range("endpoint", body.endpoint[:100], "one of " + ", ".join(endpoints))
    check_metadata(body.metadata)
    now, owner = int(context.clock.wall()), request[CALLER]
    try:
        file = await context.state.store.files.get(owner, body.input_file_id, now)
    except NotFound as error:
        error.param = "input_file_id"
        raise
    if file.purpose != "batch":
        raise RequestError(
            f"the file {file.id} has the purpose {file.purpose!r}; an input needs 'batch'",
            param="input_file_id",
        )
    batch = Batch(
        id=new_id("batch_"),
        owner=owner,
        endpoint=body.endpoint,
        input_file_id=file.id,
        completion_window=body.completion_window,
        created_at=now,
        expires_at=now + _window(body.completion_window),
        metadata=None if body.metadata is None else msgspec.json.encode(body.metadata),
        output_seconds=_output_seconds(body.output_expires_after),
    )
    await context.state.store.batches.add(batch)
    context.state.batches.start(batch)
    return json_response(batch_object(batch))


def _window(text: str) -> int:
    found = _WINDOW.fullmatch(text)
    seconds = int(found[1]) * _UNIT_SECONDS[found[2]] if found else 0
    if not 1 <= seconds <= MAX_WINDOW:
        raise out_of_range("completion_window", text[:40], "like '24h', '30m' or '7d', at most 7d")
    return seconds


def _output_seconds(expiry: OutputExpiry | None) -> int:
    if expiry is None:
        return BATCH_SECONDS
    seconds = whole("output_expires_after.seconds", expiry.seconds)
    if seconds is None:
        name = "output_expires_after.seconds"
        raise RequestError(f"{name}: this field is required", param=name)
    return lifetime("output_expires_after", expiry.anchor, seconds)


async def list_batches(request: web.Request) -> web.Response:
    page = await request.app[CONTEXT].state.store.batches.page(
        request[CALLER],
        after=query.after(request),
        limit=query.page_limit(request, 20, PAGE),
    )
    batches = [batch_object(batch) for batch in page.items]
    first, last = (batches[0].id, batches[-1].id) if batches else (None, None)
    return json_response(BatchList(batches, page.has_more, first, last))


async def get_batch(request: web.Request) -> web.Response:
    store = request.app[CONTEXT].state.store
    batch = await store.batches.get(request[CALLER], request.match_info["id"])
    return json_response(batch_object(batch))


async def cancel_batch(request: web.Request) -> web.Response:
    """Lines that run are given up at once; those that have finished are kept."""
    context = request.app[CONTEXT]
    now = int(context.clock.wall())
    id = request.match_info["id"]
    batch = await context.state.store.batches.cancel(request[CALLER], id, now)
    if batch.status not in ("cancelling", "cancelled"):
        raise Conflict(f"the batch {id} cannot be cancelled any more: it is {batch.status}")
    context.state.batches.cancel(batch)
    return json_response(batch_object(batch))

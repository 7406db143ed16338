"""Routes for the administrator, on the Unix socket only; `unix_guard` checks who the peer is."""

from __future__ import annotations

import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import structlog
from aiohttp import web

from quantd.daemon.config.rules import Size
from quantd.daemon.errors import ConfigError, RequestError
from quantd.daemon.server.body import read_body
from quantd.daemon.server.context import CONTEXT
from quantd.daemon.server.limits import shown_as
from quantd.daemon.server.models import json_response
from quantd.daemon.types import ModelInfo

if TYPE_CHECKING:
    from quantd.daemon.engine import Engine

_log = structlog.get_logger("quantd.admin")


class ModelBody(msgspec.Struct):
    model: str


class ModelState(msgspec.Struct):
    model: str
    state: str


class Changes(msgspec.Struct):
    changes: list[str]
    """A line for each."""


class Draining(msgspec.Struct):
    status: str


class ModelDetails(msgspec.Struct):
    """What `quantd ps` shows of a model; its engine's numbers are in /admin/state."""

    name: str
    path: str
    state: str
    reason: str | None
    """Why it failed; while it is loading again, why it had to."""
    stage: str
    """What loading is at; empty unless it is loading."""
    progress: float
    """Of that stage, 0 to 1."""
    retry_seconds: float | None
    """When a failed model is tried again; null: not by itself."""
    info: ModelInfo | None
    aliases: Sequence[str]
    max_context: int | None
    created: int
    num_leases: int
    pid: int | None


class ModelStates(msgspec.Struct):
    models: list[ModelDetails]


class EngineState(msgspec.Struct):
    running: int
    waiting: int
    kv: Annotated[dict[str, Any], shown_as("quantd.daemon.kv.stats.KvStats")]
    preemptions: Mapping[str, int]
    """By reason."""
    steps: int
    finished: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    requests: list[Annotated[dict[str, Any], shown_as("quantd.daemon.engine.stats.RequestState")]]


class DaemonState(msgspec.Struct):
    uptime_seconds: float
    engines: dict[str, EngineState]
    """By model."""


class Recount(msgspec.Struct):
    wrong: dict[str, str]
    """What does not hold, by model."""


class BatchState(msgspec.Struct):
    id: str
    caller: str
    status: str
    model: str | None
    endpoint: str
    total: int
    completed: int
    failed: int


class Batches(msgspec.Struct):
    batches: list[BatchState]


_MODEL = msgspec.json.Decoder(ModelBody)


@dataclass(frozen=True, slots=True)
class AdminActions:
    """What the service lends to the administrator."""

    reload: Callable[[], Awaitable[list[str]]]
    """Reads the configuration again; returns a line for each thing that changed. Raises
    ConfigError, and then nothing has changed."""
    drain: Callable[[], None]
    """Begins to shut down; returns at once."""


ACTIONS = web.AppKey("actions", AdminActions)


async def reload(request: web.Request) -> web.Response:
    try:
        changes = await request.app[ACTIONS].reload()
    except ConfigError as error:
        raise RequestError(error.message, code="config_error") from None
    return json_response(Changes(changes))


async def drain(request: web.Request) -> web.Response:
    request.app[ACTIONS].drain()
    return json_response(Draining("draining"), status=202)


async def models(request: web.Request) -> web.Response:
    """Everything there is to know of each model, for `quantd ps`."""
    statuses = request.app[CONTEXT].fleet.models()
    names = ModelDetails.__struct_fields__
    return json_response(
        ModelStates(
            [ModelDetails(**{name: getattr(status, name) for name in names}) for status in statuses]
        )
    )


async def load_model(request: web.Request) -> web.Response:
    """Returns when the model is in memory; 503 with the reason when it cannot be."""
    body = await read_body(request, _MODEL)
    fleet = request.app[CONTEXT].fleet
    await fleet.load(body.model)
    return json_response(ModelState(fleet.resolve(body.model), "ready"))


async def unload_model(request: web.Request) -> web.Response:
    """Returns when the model's memory is free: requests that run on it are waited for."""
    body = await read_body(request, _MODEL)
    fleet = request.app[CONTEXT].fleet
    await fleet.unload(body.model)
    return json_response(ModelState(fleet.resolve(body.model), "cold"))


async def state(request: web.Request) -> web.Response:
    """How long the daemon has been there; queue, batch, requests and KV blocks of each model in
    memory, by name."""
    context = request.app[CONTEXT]
    engines = {name: context.fleet.engine_of(name) for name in context.fleet.loaded()}
    return json_response(
        DaemonState(
            context.clock.monotonic() - context.started,
            {name: _state(engine) for name, engine in engines.items()},
        )
    )


def _state(engine: Engine) -> EngineState:
    stats = engine.stats()
    requests = [line._asdict() for line in engine.requests()]
    return EngineState(**{**stats._asdict(), "kv": stats.kv._asdict(), "requests": requests})


async def check(request: web.Request) -> web.Response:
    """Recounts the sequences and KV blocks of each model in memory: what does not hold, by name. A
    500 if there is anything."""
    fleet = request.app[CONTEXT].fleet
    wrong = {}
    for name in fleet.loaded():
        try:
            fleet.engine_of(name).check()
        except AssertionError:
            _log.exception("a recount found what does not hold", model=name)
            wrong[name] = traceback.format_exc(limit=-1)
    return json_response(Recount(wrong), status=500 if wrong else 200)


async def batches(request: web.Request) -> web.Response:
    """Everybody's batches that have not ended; empty without a look at the disk when none runs."""
    state = request.app[CONTEXT].state
    found = await state.store.batches.unfinished() if state.num_batches else []
    shown = [
        BatchState(
            id=batch.id,
            caller=batch.owner,
            status=batch.status,
            model=batch.model,
            endpoint=batch.endpoint,
            total=batch.total,
            completed=batch.completed,
            failed=batch.failed,
        )
        for batch in found
    ]
    return json_response(Batches(shown))


class KvBody(msgspec.Struct):
    model: str
    kv_bytes: int | str | None = None
    """A string is a size as in the configuration: "16MiB"."""
    shrink: bool = False


_KV = msgspec.json.Decoder(KvBody)


async def kv(request: web.Request) -> web.Response:
    """Changes a loaded model's budget for KV blocks, or has it give back what no request needs."""
    body = await read_body(request, _KV)
    if body.kv_bytes is None and not body.shrink:
        raise RequestError("kv_bytes or shrink is needed", param="kv_bytes")
    engine = request.app[CONTEXT].fleet.engine_of(body.model)
    if body.kv_bytes is not None:
        engine.resize(_size("kv_bytes", body.kv_bytes))
    if body.shrink:
        engine.shrink()
    return json_response(engine.stats().kv._asdict())


def _size(name: str, value: int | str) -> int:
    rule = Size(low=1)
    try:
        size = rule.read(value, Path())
    except ValueError:
        raise RequestError(f"{name} is {value!r}, must be {rule.allowed}", param=name) from None
    assert isinstance(size, int)
    return size

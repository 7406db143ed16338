"""Routes for the administrator, on the Unix socket only; `unix_guard` checks who the peer is."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import msgspec
from aiohttp import web

from quantd.daemon.errors import ConfigError, RequestError
from quantd.daemon.server.body import read_body
from quantd.daemon.server.context import CONTEXT
from quantd.daemon.server.models import json_response


class ModelBody(msgspec.Struct):
    model: str


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
    return json_response({"changes": changes})


async def drain(request: web.Request) -> web.Response:
    request.app[ACTIONS].drain()
    return json_response({"status": "draining"}, status=202)


async def models(request: web.Request) -> web.Response:
    """Everything there is to know of each model, for `quantd ps`."""
    statuses = request.app[CONTEXT].fleet.models()
    return json_response({"models": [status._asdict() for status in statuses]})


async def load_model(request: web.Request) -> web.Response:
    """Returns when the model is in memory; 503 with the reason when it cannot be."""
    body = await read_body(request, _MODEL)
    fleet = request.app[CONTEXT].fleet
    await fleet.load(body.model)
    return json_response({"model": fleet.resolve(body.model), "state": "ready"})


async def unload_model(request: web.Request) -> web.Response:
    """Returns when the model's memory is free: requests that run on it are waited for."""
    body = await read_body(request, _MODEL)
    fleet = request.app[CONTEXT].fleet
    await fleet.unload(body.model)
    return json_response({"model": fleet.resolve(body.model), "state": "cold"})


async def state(request: web.Request) -> web.Response:
    """Queue, batch and KV pool of each model in memory, by name."""
    statuses = request.app[CONTEXT].fleet.models()
    engines = {
        status.name: status.stats._asdict() for status in statuses if status.stats is not None
    }
    return json_response({"engines": engines})

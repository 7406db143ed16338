"""Is it there, is it ready, what is it, what does it count. None of these wakes a model."""

from __future__ import annotations

import functools
import importlib.metadata

import msgspec
from aiohttp import web

from quantd.daemon.server.context import CONTEXT
from quantd.daemon.server.models import json_response
from quantd.daemon.telemetry.metrics import CONTENT_TYPE


class Health(msgspec.Struct):
    status: str


class ModelProgress(msgspec.Struct):
    id: str
    state: str
    progress: float
    """Of loading, 0 to 1."""


class Readiness(msgspec.Struct):
    status: str
    """ready or loading."""
    models: list[ModelProgress]


class Version(msgspec.Struct):
    version: str


async def health(request: web.Request) -> web.Response:
    """200 as soon as the process serves, whatever the models do."""
    return json_response(Health("ok"))


async def ready(request: web.Request) -> web.Response:
    """503 until every preloaded model is awake, or while one has failed. Reasons are not told
    here, because the route needs no key: /v1/models has them."""
    fleet = request.app[CONTEXT].fleet
    is_ready = fleet.ready()
    models = [
        ModelProgress(status.name, status.state, round(status.progress, 3))
        for status in fleet.models()
    ]
    body = Readiness("ready" if is_ready else "loading", models)
    return json_response(body, status=200 if is_ready else 503)


async def version(request: web.Request) -> web.Response:
    return json_response(Version(package_version()))


@functools.cache
def package_version() -> str:
    return importlib.metadata.version("quantd")


async def metrics(request: web.Request) -> web.Response:
    body = request.app[CONTEXT].metrics.render()
    return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE})

"""GET /v1/models and /v1/models/{id}; an id may hold slashes. Wakes no model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
from aiohttp import web

from quantd.daemon.errors import ModelNotFound
from quantd.daemon.server.context import CONTEXT

if TYPE_CHECKING:
    from quantd.daemon.fleet import ModelStatus


class ModelObject(msgspec.Struct):
    """OpenAI's four fields, and ours."""

    id: str
    created: int
    owned_by: str
    max_model_len: int | None
    """None: not known before the model has been loaded once."""
    aliases: list[str]
    state: str
    progress: float
    """Of loading, 0 to 1."""
    reason: str | None
    """Why it failed."""
    object: str = "model"


class ModelList(msgspec.Struct):
    data: list[ModelObject]
    object: str = "list"


def model_object(status: ModelStatus) -> ModelObject:
    return ModelObject(
        id=status.name,
        created=int(status.created),
        owned_by="quantd",
        max_model_len=status.max_context,
        aliases=list(status.aliases),
        state=status.state,
        progress=round(status.progress, 3),
        reason=status.reason,
    )


def json_response(value: object, status: int = 200) -> web.Response:
    return web.Response(
        status=status, body=msgspec.json.encode(value), content_type="application/json"
    )


async def list_models(request: web.Request) -> web.Response:
    statuses = request.app[CONTEXT].fleet.models()
    return json_response(ModelList([model_object(status) for status in statuses]))


async def get_model(request: web.Request) -> web.Response:
    fleet = request.app[CONTEXT].fleet
    name = fleet.resolve(request.match_info["model"])
    for status in fleet.models():
        if status.name == name:
            return json_response(model_object(status))
    raise ModelNotFound(f"no model is called {name!r}", param="model")

"""The two applications: one for TCP, one for the Unix socket, which also has the admin routes."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from aiohttp import web
from aiohttp.typedefs import Handler

from quantd.daemon.config import ServerSettings
from quantd.daemon.server import admin as admin_routes
from quantd.daemon.server import (
    chat,
    completions,
    middleware,
    models,
    system,
    tokens,
)
from quantd.daemon.server.admin import ACTIONS, AdminActions
from quantd.daemon.server.auth import ApiKeys, HostRule
from quantd.daemon.server.context import CONTEXT, Clock, Context
from quantd.daemon.server.grammar import GrammarCheck
from quantd.daemon.server.state import State, no_state

if TYPE_CHECKING:
    from quantd.daemon.fleet import Fleet
    from quantd.daemon.telemetry.metrics import Metrics


def create_app(
    settings: ServerSettings,
    fleet: Fleet,
    metrics: Metrics,
    *,
    keys: ApiKeys | None = None,
    admin: AdminActions | None = None,
    clock: Clock | None = None,
    state: State | None = None,
) -> web.Application:
    """`admin` given: the application of the Unix socket. It has the admin routes, asks for no key
    and does not look at Host and Origin, because no browser can get there. Without `state`
    nothing is kept."""
    if admin is None:
        rule = HostRule(settings.host, settings.allowed_hosts, settings.allowed_origins)
        guard = middleware.tcp_guard(rule)
    else:
        guard = middleware.unix_guard
    app = web.Application(
        client_max_size=settings.body_limit_bytes, middlewares=[middleware.errors, guard]
    )
    clock = clock or Clock()
    state = state or no_state(settings, fleet, metrics, clock)
    app[CONTEXT] = Context(
        settings,
        fleet,
        metrics,
        keys or ApiKeys(),
        clock,
        clock.monotonic(),
        GrammarCheck(),
        state,
    )
    app.on_response_prepare.append(middleware.add_headers)
    app.add_routes(_ROUTES)
    if admin is not None:
        app[ACTIONS] = admin
        app.add_routes(_ADMIN_ROUTES)
    return app


def create_runner(app: web.Application) -> web.AppRunner:
    """The only way these applications may be run, on the sockets that the caller serves with
    `connections(runner)`: `handler_cancellation` is what ends the work of a client that has left.
    """
    return web.AppRunner(
        app,
        handler_cancellation=True,
        # By then the fleet has drained: nothing but the last bytes of responses is under way.
        shutdown_timeout=2.0,
    )


def _later(module: str, name: str) -> Handler:
    """A handler whose module is imported by its first request: most daemons never get one, and
    these would be a tenth of the start."""

    async def handle(request: web.Request) -> web.StreamResponse:
        handler: Handler = getattr(import_module(f"quantd.daemon.server.{module}"), name)
        return await handler(request)

    return handle


_CONVERSATIONS = "responses.conversations"
_OLLAMA_MODELS = "ollama.models"
_ROUTES = [
    web.get("/v1/models", models.list_models),
    web.get("/v1/models/{model:.+}", models.get_model),
    web.post("/v1/completions", completions.completions),
    web.post("/v1/chat/completions", chat.chat_completions),
    web.post("/v1/responses", _later("responses.routes", "create")),
    web.post("/v1/responses/input_tokens", _later("responses.routes", "input_tokens")),
    web.get("/v1/responses/{id}", _later("responses.routes", "get")),
    web.delete("/v1/responses/{id}", _later("responses.routes", "delete")),
    web.post("/v1/responses/{id}/cancel", _later("responses.routes", "cancel")),
    web.get("/v1/responses/{id}/input_items", _later("responses.routes", "input_items")),
    web.post("/v1/messages", _later("anthropic.routes", "create")),
    web.post("/v1/messages/count_tokens", _later("anthropic.routes", "count_tokens")),
    web.post("/v1/conversations", _later(_CONVERSATIONS, "create")),
    web.get("/v1/conversations/{id}", _later(_CONVERSATIONS, "get")),
    web.post("/v1/conversations/{id}", _later(_CONVERSATIONS, "update")),
    web.delete("/v1/conversations/{id}", _later(_CONVERSATIONS, "delete")),
    web.post("/v1/conversations/{id}/items", _later(_CONVERSATIONS, "create_items")),
    web.get("/v1/conversations/{id}/items", _later(_CONVERSATIONS, "list_items")),
    web.get("/v1/conversations/{id}/items/{item}", _later(_CONVERSATIONS, "get_item")),
    web.delete("/v1/conversations/{id}/items/{item}", _later(_CONVERSATIONS, "delete_item")),
    web.post("/v1/files", _later("files", "create_file")),
    web.get("/v1/files", _later("files", "list_files")),
    web.get("/v1/files/{id}", _later("files", "get_file")),
    web.get("/v1/files/{id}/content", _later("files", "get_content")),
    web.delete("/v1/files/{id}", _later("files", "delete_file")),
    web.post("/v1/batches", _later("batches.routes", "create_batch")),
    web.get("/v1/batches", _later("batches.routes", "list_batches")),
    web.get("/v1/batches/{id}", _later("batches.routes", "get_batch")),
    web.post("/v1/batches/{id}/cancel", _later("batches.routes", "cancel_batch")),
    web.post("/v1/embeddings", _later("embeddings", "embeddings")),
    web.post("/v1/moderations", _later("moderations", "moderations")),
    web.post("/v1/rerank", _later("rerank", "rerank")),
    web.post("/v2/rerank", _later("rerank", "rerank")),
    web.post("/rerank", _later("rerank", "rerank")),
    web.get("/", _later(_OLLAMA_MODELS, "home")),
    web.get("/api/version", _later(_OLLAMA_MODELS, "version")),
    web.get("/api/tags", _later(_OLLAMA_MODELS, "tags")),
    web.get("/api/ps", _later(_OLLAMA_MODELS, "ps")),
    web.post("/api/show", _later(_OLLAMA_MODELS, "show")),
    web.post("/api/chat", _later("ollama.routes", "chat")),
    web.post("/api/generate", _later("ollama.routes", "generate")),
    web.post("/api/embed", _later("ollama.embed", "embed")),
    web.post("/api/embeddings", _later("ollama.embed", "embeddings")),
    web.post("/api/pull", _later("ollama.routes", "refuse")),
    web.post("/api/push", _later("ollama.routes", "refuse")),
    web.post("/api/create", _later("ollama.routes", "refuse")),
    web.post("/api/copy", _later("ollama.routes", "refuse")),
    web.delete("/api/delete", _later("ollama.routes", "refuse")),
    web.head("/api/blobs/{digest}", _later("ollama.routes", "refuse")),
    web.post("/api/blobs/{digest}", _later("ollama.routes", "refuse")),
    web.post("/tokenize", tokens.tokenize),
    web.post("/detokenize", tokens.detokenize),
    web.get("/health", system.health),
    web.get("/ready", system.ready),
    web.get("/ping", system.health),
    web.get("/version", system.version),
    web.get("/metrics", system.metrics),
]
_ADMIN_ROUTES = [
    web.post("/admin/reload", admin_routes.reload),
    web.post("/admin/drain", admin_routes.drain),
    web.post("/admin/kv", admin_routes.kv),
    web.get("/admin/models", admin_routes.models),
    web.post("/admin/models/load", admin_routes.load_model),
    web.post("/admin/models/unload", admin_routes.unload_model),
    web.get("/admin/state", admin_routes.state),
    web.get("/admin/batches", admin_routes.batches),
    web.get("/admin/check", admin_routes.check),
]

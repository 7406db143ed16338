"""The table of routes. Each entry says what is served and, for `/openapi.json`, what goes in and
out.

A type is named as "module.Name" in this package, so that a line imports nothing: most daemons are
never asked for most of these. So is the handler of what most are not asked for: its module is
imported by the first request, and these would be a tenth of the start.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Annotated, Any, NamedTuple

from aiohttp import web
from aiohttp.typedefs import Handler

from quantd.daemon.server import admin, chat, completions, limits, models, system, tokens
from quantd.daemon.server.limits import pattern

JSON = "application/json"
SSE = "text/event-stream"
NDJSON = "application/x-ndjson"


class Query(NamedTuple):
    """A parameter in the URL, behind the question mark."""

    name: str
    type: Any
    says: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """One operation. `errors` need not list what the other fields imply: 400 and 413 of a body or
    of parameters, 401, 403 and 500 of all."""

    method: str
    path: str
    handler: Handler | str
    says: str
    """In one sentence."""
    reply: str | None = None
    """None: nothing, or no JSON."""
    body: str | None = None
    events: Sequence[str] = ()
    """What a stream is made of, where the body may ask for one."""
    query: Sequence[Query] = ()
    statuses: Sequence[int] = (200,)
    """Those that come with the reply."""
    errors: Sequence[int] = ()
    error: str = "errors.ErrorBody"
    """The shape of the face's errors."""
    body_format: str = JSON
    reply_format: str = JSON
    events_format: str = SSE
    """Of any other format, `events` are its lines."""
    example: Mapping[str, Any] = field(default_factory=dict)
    """A body that is answered, whatever the model."""

    def as_aiohttp(self) -> web.RouteDef:
        handler = _later(self.handler) if isinstance(self.handler, str) else self.handler
        return web.route(self.method, self.path, handler)


def _later(name: str) -> Handler:
    module, _, function = name.rpartition(".")

    async def handle(request: web.Request) -> web.StreamResponse:
        handler: Handler = getattr(import_module(f"quantd.daemon.server.{module}"), function)
        return await handler(request)

    return handle


def get(path: str, handler: Handler | str, says: str, reply: str | None, **more: Any) -> Route:
    return Route(method="GET", path=path, handler=handler, says=says, reply=reply, **more)


def post(path: str, handler: Handler | str, says: str, reply: str | None, **more: Any) -> Route:
    return Route(method="POST", path=path, handler=handler, says=says, reply=reply, **more)


def delete(path: str, handler: Handler | str, says: str, reply: str | None, **more: Any) -> Route:
    return Route(method="DELETE", path=path, handler=handler, says=says, reply=reply, **more)


# --- what several routes share --------------------------------------------------------------------

_MODEL = (404, 503)
"""Errors of what needs a model in memory."""
_RUNS = (404, 422, 429, 503)
"""Of what a model computes."""
_KEPT = (404, 503)
"""Of what the store is asked for."""
_KEEPS = (404, 503, 507)
"""Of what the store is to keep."""
_AFTER = Query("after", str, "The id behind which the list goes on.")
_ORDER = Query("order", Annotated[str, pattern("(asc|desc)?")], "asc or desc, by time.")
_LIMIT = Query("limit", Annotated[int, limits.PAGE.meta], "How many there are at most.")
_PAGE = (_AFTER, _LIMIT, _ORDER)
_HELLO = [{"role": "user", "content": "What is the capital of France?"}]
_RERANK = {"query": "a fruit", "documents": ["an apple", "a car"]}
_CHAT_EVENTS = ("chunks.ChatChunk", "errors.ErrorBody")
_COMPLETION_EVENTS = ("chunks.CompletionChunk", "errors.ErrorBody")
_RESPONSE_EVENTS = tuple(
    f"responses.event_types.{name}"
    for name in (
        *("OfResponse", "ItemChanged", "PartChanged", "TextDelta", "TextDone", "ReasoningDelta"),
        *("ReasoningDone", "ArgumentsDelta", "ArgumentsDone", "Failed"),
    )
)
_RESPONSE_PATH = "/v1/responses/{id:(?!input_tokens$)[^/]+}"
_RESPONSE = "responses.object.ResponseObject"
_ITEMS = "responses.routes.ItemList"
_ITEM = "responses.items.AnyItem"
_CONVERSATION = "responses.conversations.ConversationObject"
_FILE = "files.FileObject"
_BATCH = "batches.routes.BatchObject"
_DELETED = "files.Deleted"
_ANTHROPIC_ERROR = "anthropic.errors.ErrorBody"
_OLLAMA_ERROR = "ollama.errors.ErrorBody"


def _rerank(path: str) -> Route:
    return post(
        path,
        "rerank.rerank",
        "Sorts documents by how well they answer a query.",
        "rerank.RerankReply",
        body="schemas.RerankBody",
        errors=_RUNS,
        example=_RERANK,
    )


def _ollama(method: str, path: str, handler: str, says: str, reply: str, **more: Any) -> Route:
    return Route(
        method=method,
        path=path,
        handler=f"ollama.{handler}",
        says=says,
        reply=f"ollama.reply_types.{reply}",
        error=_OLLAMA_ERROR,
        **more,
    )


# --- the table ------------------------------------------------------------------------------------

ROUTES: Mapping[str, Sequence[Route]] = {
    "Models": (
        get("/v1/models", models.list_models, "Lists the models.", "models.ModelList"),
        get(
            "/v1/models/{model:.+}",
            models.get_model,
            "Shows one model; its name may hold slashes.",
            "models.ModelObject",
            errors=(404,),
        ),
    ),
    "Chats and text": (
        post(
            "/v1/chat/completions",
            chat.chat_completions,
            "Answers a chat.",
            "chat.ChatReply",
            body="schemas.ChatBody",
            events=_CHAT_EVENTS,
            errors=_RUNS,
            example={"messages": _HELLO, "max_tokens": 64},
        ),
        post(
            "/v1/completions",
            completions.completions,
            "Goes on with a text.",
            "completions.CompletionReply",
            body="schemas.CompletionBody",
            events=_COMPLETION_EVENTS,
            errors=_RUNS,
            example={"prompt": "Once upon a time", "max_tokens": 16},
        ),
        post(
            "/tokenize",
            tokens.tokenize,
            "Tokens of a text or of a chat.",
            "tokens.TokenizeReply",
            body="schemas.TokenizeBody",
            errors=_MODEL,
            example={"prompt": "Hello"},
        ),
        post(
            "/detokenize",
            tokens.detokenize,
            "The text of tokens.",
            "tokens.DetokenizeReply",
            body="schemas.DetokenizeBody",
            errors=_MODEL,
            example={"tokens": [1, 2, 3]},
        ),
    ),
    "Responses": (
        post(
            "/v1/responses",
            "responses.routes.create",
            "Makes a response: at once, streamed, or in the background.",
            _RESPONSE,
            body="responses.request.ResponseBody",
            events=_RESPONSE_EVENTS,
            errors=(*_RUNS, 507),
            example={"input": "What is the capital of France?", "max_output_tokens": 64},
        ),
        post(
            "/v1/responses/input_tokens",
            "responses.routes.input_tokens",
            "Counts the tokens of a response's prompt.",
            "responses.routes.InputTokens",
            body="responses.request.ContextBody",
            errors=_MODEL,
            example={"input": "Hello"},
        ),
        get(
            _RESPONSE_PATH,
            "responses.routes.get",
            "Shows a response, or follows its events.",
            _RESPONSE,
            events=_RESPONSE_EVENTS,
            query=(
                Query("stream", bool, "Its events: only of one made with background and stream."),
                Query("starting_after", limits.EVENT_NUMBER, "The event behind which they begin."),
            ),
            errors=_KEPT,
        ),
        delete(
            _RESPONSE_PATH,
            "responses.routes.delete",
            "Deletes a response, with what was said in it.",
            _DELETED,
            errors=_KEPT,
        ),
        post(
            "/v1/responses/{id}/cancel",
            "responses.routes.cancel",
            "Ends a response that is made in the background.",
            _RESPONSE,
            errors=(400, *_KEPT),
        ),
        get(
            "/v1/responses/{id}/input_items",
            "responses.routes.input_items",
            "Lists the items that a response was made of.",
            _ITEMS,
            query=_PAGE,
            errors=_KEPT,
        ),
    ),
    "Conversations": (
        post(
            "/v1/conversations",
            "responses.conversations.create",
            "Makes a conversation.",
            _CONVERSATION,
            body="responses.conversations.CreateBody",
            errors=_KEEPS,
            example={"metadata": {"topic": "trains"}},
        ),
        get(
            "/v1/conversations/{id}",
            "responses.conversations.get",
            "Shows a conversation.",
            _CONVERSATION,
            errors=_KEPT,
        ),
        post(
            "/v1/conversations/{id}",
            "responses.conversations.update",
            "Changes its metadata.",
            _CONVERSATION,
            body="responses.conversations.UpdateBody",
            errors=_KEEPS,
            example={"metadata": {"topic": "trains"}},
        ),
        delete(
            "/v1/conversations/{id}",
            "responses.conversations.delete",
            "Deletes a conversation with its items.",
            _DELETED,
            errors=_KEPT,
        ),
        post(
            "/v1/conversations/{id}/items",
            "responses.conversations.create_items",
            "Appends items.",
            _ITEMS,
            body="responses.conversations.ItemsBody",
            errors=_KEEPS,
            example={"items": [{"role": "user", "content": "Hello"}]},
        ),
        get(
            "/v1/conversations/{id}/items",
            "responses.conversations.list_items",
            "Lists its items.",
            _ITEMS,
            query=_PAGE,
            errors=_KEPT,
        ),
        get(
            "/v1/conversations/{id}/items/{item}",
            "responses.conversations.get_item",
            "Shows one item.",
            _ITEM,
            errors=_KEPT,
        ),
        delete(
            "/v1/conversations/{id}/items/{item}",
            "responses.conversations.delete_item",
            "Deletes one item.",
            _CONVERSATION,
            errors=_KEPT,
        ),
    ),
    "Anthropic's messages": (
        post(
            "/v1/messages",
            "anthropic.routes.create",
            "Answers messages, in Anthropic's form.",
            "anthropic.events.MessageObject",
            body="anthropic.schemas.MessagesBody",
            events=("anthropic.event_types.AnyEvent",),
            errors=_RUNS,
            error=_ANTHROPIC_ERROR,
            example={"messages": _HELLO, "max_tokens": 64},
        ),
        post(
            "/v1/messages/count_tokens",
            "anthropic.routes.count_tokens",
            "Counts the tokens of a message's prompt.",
            "anthropic.routes.InputTokens",
            body="anthropic.schemas.CountBody",
            errors=_MODEL,
            error=_ANTHROPIC_ERROR,
            example={"messages": _HELLO},
        ),
    ),
    "Ollama's API": (
        get(
            "/",
            "ollama.models.home",
            "Says that somebody is there.",
            None,
            reply_format="text/plain",
            error=_OLLAMA_ERROR,
        ),
        _ollama("GET", "/api/version", "models.version", "The API's release.", "ApiVersion"),
        _ollama("GET", "/api/tags", "models.tags", "Lists the models.", "Tags"),
        _ollama("GET", "/api/ps", "models.ps", "Lists the models in memory.", "Running"),
        _ollama(
            "POST",
            "/api/show",
            "models.show",
            "Shows one model.",
            "ShownModel",
            body="ollama.schemas.ShowRequest",
            errors=(404,),
        ),
        _ollama(
            "POST",
            "/api/chat",
            "routes.chat",
            "Answers a chat; without messages, loads the model or lets it go.",
            "ChatAnswer",
            body="ollama.schemas.ChatRequest",
            events=("ollama.reply_types.ChatAnswer", _OLLAMA_ERROR),
            events_format=NDJSON,
            errors=_RUNS,
            example={"messages": _HELLO, "stream": False},
        ),
        _ollama(
            "POST",
            "/api/generate",
            "routes.generate",
            "Answers a prompt; without one, loads the model or lets it go.",
            "GenerateAnswer",
            body="ollama.schemas.GenerateRequest",
            events=("ollama.reply_types.GenerateAnswer", _OLLAMA_ERROR),
            events_format=NDJSON,
            errors=_RUNS,
            example={"prompt": "What is the capital of France?", "stream": False},
        ),
        _ollama(
            "POST",
            "/api/embed",
            "embed.embed",
            "Turns texts into vectors of length 1.",
            "EmbedAnswer",
            body="ollama.schemas.EmbedRequest",
            errors=_RUNS,
            example={"input": "Hello"},
        ),
        _ollama(
            "POST",
            "/api/embeddings",
            "embed.embeddings",
            "Turns a text into a vector.",
            "EmbeddingAnswer",
            body="ollama.schemas.EmbeddingsRequest",
            errors=_RUNS,
            example={"prompt": "Hello"},
        ),
        *(
            Route(
                method=method,
                path=path,
                handler="ollama.routes.refuse",
                says="Not served: models are files on this machine.",
                reply=_OLLAMA_ERROR,
                statuses=(501,),
                error=_OLLAMA_ERROR,
            )
            for method, path in (
                *(("POST", f"/api/{name}") for name in ("pull", "push", "create", "copy")),
                ("DELETE", "/api/delete"),
                ("HEAD", "/api/blobs/{digest}"),
                ("POST", "/api/blobs/{digest}"),
            )
        ),
    ),
    "Embeddings and rerankings": (
        post(
            "/v1/embeddings",
            "embeddings.embeddings",
            "Turns texts into vectors.",
            "embeddings.EmbeddingReply",
            body="schemas.EmbeddingBody",
            errors=_RUNS,
            example={"input": "Hello"},
        ),
        post(
            "/v1/moderations",
            "moderations.moderations",
            "Judges texts by the rules and guards of the configuration.",
            "moderations.ModerationReply",
            body="moderations.ModerationBody",
            errors=_RUNS,
            example={"input": "Hello"},
        ),
        _rerank("/v1/rerank"),
        _rerank("/v2/rerank"),
        _rerank("/rerank"),
    ),
    "Files": (
        post(
            "/v1/files",
            "files.create_file",
            "Uploads a file.",
            _FILE,
            body="files.Form",
            body_format="multipart/form-data",
            errors=(503, 507),
        ),
        get(
            "/v1/files",
            "files.list_files",
            "Lists the files.",
            "files.FileList",
            query=(
                _AFTER,
                Query("limit", Annotated[int, limits.FILES_PAGE.meta], _LIMIT.says),
                _ORDER,
                Query("purpose", str, "Only files that have it."),
            ),
            errors=_KEPT,
        ),
        get("/v1/files/{id}", "files.get_file", "Shows a file's data.", _FILE, errors=_KEPT),
        delete(
            "/v1/files/{id}",
            "files.delete_file",
            "Deletes a file.",
            _DELETED,
            errors=(*_KEPT, 409),
        ),
        get(
            "/v1/files/{id}/content",
            "files.get_content",
            "Downloads a file, or the range of it that the header Range asks for.",
            None,
            reply_format="application/octet-stream",
            statuses=(200, 206),
            errors=_KEPT,
        ),
    ),
    "Batches": (
        post(
            "/v1/batches",
            "batches.routes.create_batch",
            "Runs the requests in a file.",
            _BATCH,
            body="batches.routes.BatchBody",
            errors=_KEEPS,
            example={
                "input_file_id": "file-…",
                "endpoint": "/v1/chat/completions",
                "completion_window": "24h",
            },
        ),
        get(
            "/v1/batches",
            "batches.routes.list_batches",
            "Lists the batches, the newest first.",
            "batches.routes.BatchList",
            query=(_AFTER, _LIMIT),
            errors=_KEPT,
        ),
        get("/v1/batches/{id}", "batches.routes.get_batch", "Shows a batch.", _BATCH, errors=_KEPT),
        post(
            "/v1/batches/{id}/cancel",
            "batches.routes.cancel_batch",
            "Ends a batch; what is done is kept.",
            _BATCH,
            errors=(*_KEPT, 409),
        ),
    ),
    "The daemon": (
        get("/health", system.health, "200 as soon as the process serves.", "system.Health"),
        get("/ping", system.health, "The same as /health.", "system.Health"),
        get(
            "/ready",
            system.ready,
            "503 until all models that are preloaded are in memory.",
            "system.Readiness",
            statuses=(200, 503),
        ),
        get("/version", system.version, "quantd's version.", "system.Version"),
        get(
            "/metrics",
            system.metrics,
            "Counters and gauges in Prometheus' text format.",
            None,
            reply_format="text/plain",
        ),
        get("/openapi.json", "pages.openapi", "This document.", None, reply_format=JSON),
        get("/docs", "pages.docs", "This document as a page.", None, reply_format="text/html"),
    ),
}
ADMIN_ROUTES: Mapping[str, Sequence[Route]] = {
    "Administration": (
        post(
            "/admin/reload",
            admin.reload,
            "Reads the configuration again.",
            "admin.Changes",
            errors=(400,),
        ),
        post(
            "/admin/drain",
            admin.drain,
            "Ends the daemon when what runs has finished.",
            "admin.Draining",
            statuses=(202,),
        ),
        post(
            "/admin/kv",
            admin.kv,
            "Changes a model's budget for KV blocks.",
            "quantd.daemon.kv.stats.KvStats",
            body="admin.KvBody",
            errors=_MODEL,
            example={"shrink": True},
        ),
        get("/admin/models", admin.models, "All there is to know of models.", "admin.ModelStates"),
        post(
            "/admin/models/load",
            admin.load_model,
            "Loads a model, and returns when it is in memory.",
            "admin.ModelState",
            body="admin.ModelBody",
            errors=_MODEL,
        ),
        post(
            "/admin/models/unload",
            admin.unload_model,
            "Ends a model's worker when its requests have finished.",
            "admin.ModelState",
            body="admin.ModelBody",
            errors=_MODEL,
        ),
        get(
            "/admin/state",
            admin.state,
            "What the models in memory are at: requests, KV blocks, counts.",
            "admin.DaemonState",
        ),
        get("/admin/batches", admin.batches, "Batches that have not ended.", "admin.Batches"),
        get(
            "/admin/check",
            admin.check,
            "Recounts sequences and KV blocks.",
            "admin.Recount",
            statuses=(200, 500),
        ),
    ),
}


def every(sections: Mapping[str, Sequence[Route]]) -> list[Route]:
    return [route for routes in sections.values() for route in routes]

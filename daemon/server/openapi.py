"""The OpenAPI 3.1 document: the table of routes, and the types that it names as JSON Schema
(`schema.py`). Imported by the first request for it; making it imports every face."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from http import HTTPStatus
from typing import Any

from quantd.daemon.server.middleware import OPEN_PATHS
from quantd.daemon.server.routes import ADMIN_ROUTES, JSON, ROUTES, SSE, Query, Route, every
from quantd.daemon.server.schema import Types
from quantd.daemon.server.system import package_version

_SAYS = {
    400: "A field is wrong: the message says which, the limit and the value.",
    401: "No API key, or one that is not known.",
    403: "Host, Origin or peer is refused.",
    404: "No such model, object or URL.",
    409: "Not in this state.",
    413: "The body is over the limit.",
    422: "The request's own `timeout` is over.",
    429: "The queue is full.",
    500: "A bug; the daemon's log has the request's id.",
    503: "Not now: the model cannot be loaded, the daemon ends, or the store cannot be used.",
    507: "No room on the disk, or within the limit.",
}
_HEADERS: Mapping[int, tuple[str, str]] = {
    401: ("WWW-Authenticate", "Which keys are taken."),
    429: ("Retry-After", "Seconds."),
}
_INFO = (
    "Null is as if the field were not there, and unknown fields are accepted. Any request may "
    "have the header x-request-id; the reply has the same, or a new one. What is no HTTP, an "
    "unknown URL and a wrong method get errors of the same shape."
)
_KEYS = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
}


def document(*, has_admin: bool, needs_key: bool) -> dict[str, Any]:
    """`has_admin`: of the Unix socket, where nobody needs a key."""
    sections = {**ROUTES, **ADMIN_ROUTES} if has_admin else ROUTES
    routes = every(sections)
    types = Types(
        bodies=[route.body for route in routes if route.body is not None],
        replies=[name for route in routes for name in _reply_names(route)],
    )
    paths: dict[str, dict[str, Any]] = {}
    for section, members in sections.items():
        for route in members:
            made = _operation(route, types)
            made["tags"] = [section]
            if not has_admin and route.path not in OPEN_PATHS:
                names: list[dict[str, list[str]]] = [{name: []} for name in _KEYS]
                made["security"] = names if needs_key else [*names, {}]
            paths.setdefault(_plain(route.path), {})[route.method.lower()] = made
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "quantd",
            "version": package_version(),
            "description": _INFO,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "tags": [{"name": section} for section in sections],
        "paths": paths,
        "components": {"schemas": types.components, "securitySchemes": _KEYS},
    }


def _reply_names(route: Route) -> Iterator[str]:
    if route.reply is not None:
        yield route.reply
    yield from route.events
    yield route.error


def _plain(path: str) -> str:
    """Without the expressions of aiohttp's: {model:.+}."""
    return re.sub(r"\{(\w+):[^}]*\}", r"{\1}", path)


def _operation(route: Route, types: Types) -> dict[str, Any]:
    path = _plain(route.path)
    made: dict[str, Any] = {
        "operationId": "_".join([route.method.lower(), *re.findall(r"\w+", path)]),
        "summary": route.says,
    }
    parameters = [_in_path(name) for name in re.findall(r"\{(\w+)\}", path)]
    parameters += [_in_query(query, types) for query in route.query]
    if parameters:
        made["parameters"] = parameters
    if route.body is not None:
        content: dict[str, Any] = {"schema": types.schema([route.body])}
        if route.example:
            content["example"] = dict(route.example)
        made["requestBody"] = {"required": True, "content": {route.body_format: content}}
    made["responses"] = _responses(route, types)
    return made


def _in_path(name: str) -> dict[str, Any]:
    schema = {"type": "string", "minLength": 1}
    return {"name": name, "in": "path", "required": True, "schema": schema}


def _in_query(query: Query, types: Types) -> dict[str, Any]:
    schema = types.schema_of(query.type)
    return {"name": query.name, "in": "query", "description": query.says, "schema": schema}


def _responses(route: Route, types: Types) -> dict[str, Any]:
    reply = {} if route.reply is None else {"schema": types.schema([route.reply])}
    content: dict[str, Any] = {route.reply_format: reply}
    if route.events:
        data = types.schema(route.events)
        content[route.events_format] = {
            "schema": _event(data) if route.events_format == SSE else data
        }
    found: dict[int, Any] = {
        status: {"description": HTTPStatus(status).phrase, "content": content}
        for status in route.statuses
    }
    for status in {*route.errors, *_implied(route)} - found.keys():
        shape = {"schema": types.schema([route.error])}
        found[status] = {"description": _SAYS[status], "content": {JSON: shape}}
        if status in _HEADERS:
            name, says = _HEADERS[status]
            found[status]["headers"] = {name: {"description": says, "schema": {"type": "string"}}}
    return {str(status): found[status] for status in sorted(found)}


def _event(data: Any) -> dict[str, Any]:
    """OpenAPI has the schema of an event stream be that of each event."""
    encoded = {"contentMediaType": JSON, "contentSchema": data}
    return {
        "type": "object",
        "description": "One event of the stream.",
        "properties": {
            "event": {"type": "string"},
            "data": {"type": "string", "anyOf": [{"const": "[DONE]"}, encoded]},
        },
        "required": ["data"],
    }


def _implied(route: Route) -> Sequence[int]:
    keys = () if route.path in OPEN_PATHS else (401, 403)
    checks = (400,) if route.query or route.body is not None else ()
    return (*keys, *checks, *((413,) if route.body is not None else ()), 500)

"""The document: valid, the same each time, of all routes; and what it says of limits is true."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

import pytest
from openapi_spec_validator import validate
from server_fakes import FakeFleet, serving

from quantd.daemon.config import ServerSettings
from quantd.daemon.server.app import create_app
from quantd.daemon.server.auth import ApiKeys
from quantd.daemon.server.openapi import document
from quantd.daemon.server.pages import _page
from quantd.daemon.server.routes import ADMIN_ROUTES, ROUTES, Route, every
from quantd.daemon.telemetry.metrics import Metrics

DOCUMENT = document(has_admin=False, needs_key=False)
SCHEMAS = DOCUMENT["components"]["schemas"]


@pytest.mark.parametrize("has_admin", [False, True])
def test_it_is_valid(has_admin: bool) -> None:
    validate(document(has_admin=has_admin, needs_key=True))


def test_it_is_the_same_each_time() -> None:
    program = (
        "import json; from quantd.daemon.server.openapi import document; "
        "print(json.dumps(document(has_admin=True, needs_key=True)))"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(printed) == 1


async def test_every_route_is_in_it() -> None:
    app = create_app(ServerSettings(), FakeFleet(), Metrics())  # type: ignore[arg-type]
    routes = {
        (route.method.lower(), route.resource.canonical)
        for route in app.router.routes()
        if route.method != "HEAD" and route.resource is not None
    }
    described = {
        (method, path)
        for path, methods in DOCUMENT["paths"].items()
        for method in methods
        if method != "head"  # aiohttp answers it wherever there is a GET
    }
    assert described == routes


@pytest.mark.parametrize("route", every({**ROUTES, **ADMIN_ROUTES}), ids=lambda r: r.path)
def test_a_route_says_what_it_is(route: Route) -> None:
    assert route.says.endswith(".") and len(route.says) > 10
    takes_body = (
        route.method == "POST"
        and route.statuses != (501,)
        and not route.path.endswith(("/cancel", "/reload", "/drain"))
    )
    assert (route.body is not None) == takes_body


def test_administration_is_on_the_unix_socket_alone() -> None:
    assert not [path for path in DOCUMENT["paths"] if path.startswith("/admin")]
    whole = document(has_admin=True, needs_key=False)
    assert "/admin/kv" in whole["paths"]
    assert "security" not in whole["paths"]["/v1/models"]["get"]


def test_keys() -> None:
    def security(needs_key: bool, path: str) -> Any:
        paths = document(has_admin=False, needs_key=needs_key)["paths"]
        return paths[path]["get"].get("security")

    assert security(True, "/v1/models") == [{"bearer": []}, {"x-api-key": []}]
    assert {} in security(False, "/v1/models")
    assert security(True, "/health") is security(True, "/openapi.json") is None


def test_errors_have_the_shape_of_their_face() -> None:
    def shape(path: str) -> str:
        reply = DOCUMENT["paths"][path]["post"]["responses"]["400"]
        return str(reply["content"]["application/json"]["schema"]["$ref"])

    assert shape("/v1/messages").endswith("/anthropic.errors.ErrorBody")
    assert shape("/v1/chat/completions").endswith("/errors.ErrorBody")


def test_null_unset_and_whole_numbers() -> None:
    chat = SCHEMAS["ChatBody"]["properties"]
    assert chat["stream"]["anyOf"] == [{"type": "boolean"}, {"type": "null"}]
    assert chat["top_k"]["anyOf"][0] == {
        "type": "integer",
        "minimum": -1,
        "maximum": 2**31 - 1,
    }
    assert SCHEMAS["ChatBody"]["required"] == ["messages"]
    choice = SCHEMAS["ChatChoice"]
    assert "finish_reason" in choice["required"] and "token_ids" not in choice["required"]
    assert "object" in SCHEMAS["ChatReply"]["required"]
    assert SCHEMAS["ChatReply"]["properties"]["choices"]["items"]["$ref"].endswith("/ChatChoice")


def test_lines_under_fields_are_in_it() -> None:
    assert SCHEMAS["ModelObject"]["properties"]["progress"]["description"] == "Of loading, 0 to 1."
    assert "prefix cache" in SCHEMAS["ChatBody"]["properties"]["cache_salt"]["description"]


def test_what_is_decoded_later_has_its_types() -> None:
    [given, *_] = [
        one for one in SCHEMAS["ResponseBody"]["properties"]["input"]["anyOf"] if "items" in one
    ]
    names = {one["$ref"].rpartition("/")[2] for one in given["items"]["anyOf"]}
    assert {"responses.items.InputMessage", "InputCall", "Reference"} <= names


# --- limits ---------------------------------------------------------------------------------------

CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1, "logprobs": True}


def bounds(schema: dict[str, Any]) -> Iterator[tuple[Any, Any, str]]:
    """(a value at a limit, one past it, the limit as an error says it)."""
    for one in schema.get("anyOf", [schema]):
        step = 1 if one.get("type") == "integer" else 0.01
        if "minimum" in one:
            yield one["minimum"], one["minimum"] - step, f"{one['minimum']:.15g}"
        if "exclusiveMinimum" in one:
            yield one["exclusiveMinimum"] + step, one["exclusiveMinimum"], "above 0"
        if "maximum" in one:
            yield one["maximum"], one["maximum"] + step, f"{one['maximum']:.15g}"
        if one.get("type") == "string" and "maxLength" in one:
            most = one["maxLength"]
            yield "x" * most, "x" * (most + 1), str(most)
            yield "x", "", "1"


BOUNDS = [
    (name, good, bad, limit)
    for name, schema in SCHEMAS["ChatBody"]["properties"].items()
    for good, bad, limit in bounds(schema)
]
NEEDS_MORE = {"max_tokens", "max_completion_tokens", "min_tokens", "best_of", "n"}
"""What is at a limit of theirs may be over another one."""


def test_there_are_limits() -> None:
    names = {name for name, *_ in BOUNDS}
    assert {"temperature", "top_p", "top_k", "min_p", "n", "seed", "stop", "timeout"} <= names


@pytest.mark.parametrize(("name", "good", "bad", "limit"), BOUNDS)
async def test_a_limit_is_where_it_says(name: str, good: Any, bad: Any, limit: str) -> None:
    if name == "max_tokens":
        limit, bad = ("1", 0) if bad == -1 else (limit, bad)  # 0 is for text completions
    async with serving() as served:
        status, reply = await served.post("/v1/chat/completions", {**CHAT, name: bad})
        assert (status, reply["error"]["param"]) == (400, name)
        if name != "seed":
            assert limit in reply["error"]["message"], reply
        if name not in NEEDS_MORE:
            status, reply = await served.post("/v1/chat/completions", {**CHAT, name: good})
            assert status == 200, reply


# --- the page -------------------------------------------------------------------------------------


class Parsed(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_the_page_is_whole_by_itself() -> None:
    page, policy = _page()
    parsed = Parsed(page.decode())
    for tag, attributes in parsed.tags:
        assert "src" not in attributes and "style" not in attributes, tag
        assert not [name for name in attributes if name.startswith("on")]
        link = attributes.get("href") or ""
        assert "//" not in link, link
    assert not re.search(rb"https?://|@import|url\(|innerHTML|eval\(", page)
    inputs = {a["id"] for tag, a in parsed.tags if tag in ("input", "textarea")}
    assert inputs == {a["for"] for tag, a in parsed.tags if tag == "label"}
    assert "default-src 'none'" in policy and "unsafe" not in policy
    script = re.search(rb"<script>(.*)</script>", page, re.DOTALL)
    assert script is not None
    digest = base64.b64encode(hashlib.sha256(script[1]).digest()).decode()
    assert f"'sha256-{digest}'" in policy
    assert len(page) < 32_000


async def test_both_are_served_without_a_key() -> None:
    async with serving(keys=ApiKeys([("me", "secret")])) as served:
        async with served.session.get("/openapi.json") as response:
            assert response.status == 200
            assert response.content_type == "application/json"
            assert json.loads(await response.read()) == document(has_admin=False, needs_key=True)
        async with served.session.get("/docs") as response:
            assert response.status == 200
            assert response.headers["Content-Type"] == "text/html; charset=utf-8"
            assert "script-src 'sha256-" in response.headers["Content-Security-Policy"]

"""What every route shares: errors in one shape, keys, Host and Origin, request ids, bodies."""

from __future__ import annotations

import asyncio
import gzip
import json
import re
import zlib
from pathlib import Path
from typing import Any

import pytest
from server_fakes import FakeFleet, serving

from quantd.daemon.config import ServerSettings
from quantd.daemon.errors import ModelRefused, Unavailable
from quantd.daemon.server.auth import ApiKeys

CHAT = "/v1/chat/completions"
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}
KEYS = [("alice", "key-a"), ("bob", "key-b")]


async def test_unknown_url_and_wrong_method() -> None:
    async with serving() as served:
        status, reply = await served.get("/v1/nothing")
        assert status == 404
        assert reply["error"] == {
            "message": "no such URL: GET /v1/nothing",
            "type": "invalid_request_error",
            "param": None,
            "code": "not_found",
        }
        async with served.session.get(CHAT) as response:
            assert response.status == 405
            assert response.headers["Allow"] == "POST"
            assert (await response.json())["error"]["code"] == "method_not_allowed"
        status, _ = await served.post("/admin/drain", {})
        assert status == 404  # not on TCP


BODIES: list[tuple[bytes, str]] = [
    (b"", "no body"),
    (b"{", "not JSON"),
    (b'{"messages":[],}', "not JSON"),
    (b'{"messages":NaN}', "not JSON"),
    (b"\xff\xfe", "not JSON"),
    (b'{"model":"\xff"}', "UTF-8"),
    (b"[]", "array"),
    (b"null", "null"),
    (b'{"deep":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested"),
    (b'{"messages":[{"role":"user","content":"\\ud800"}]}', "not JSON"),
]


@pytest.mark.parametrize(("body", "word"), BODIES)
async def test_bodies_that_are_no_json_object(body: bytes, word: str) -> None:
    async with serving() as served:
        async with served.session.post(CHAT, data=body) as response:
            assert response.status == 400
            assert word in (await response.json())["error"]["message"]


async def test_content_type_does_not_matter() -> None:
    async with serving() as served:
        for kind in ("application/json", "text/plain", "application/x-www-form-urlencoded"):
            async with served.session.post(
                CHAT, data=json.dumps(HELLO), headers={"Content-Type": kind}
            ) as response:
                assert response.status == 200


async def test_body_limit_told_or_not_or_zipped() -> None:
    settings = ServerSettings(body_limit_bytes=1024)
    big = json.dumps({**HELLO, "user": "x" * 2000}).encode()

    async def in_chunks() -> Any:
        for start in range(0, len(big), 100):
            yield big[start : start + 100]

    async with serving(settings=settings) as served:
        zipped = {"Content-Encoding": "gzip"}
        for data, headers in ((big, {}), (in_chunks(), {}), (gzip.compress(big), zipped)):
            async with served.session.post(CHAT, data=data, headers=headers) as response:
                assert response.status == 413
                error = (await response.json())["error"]
                assert error["code"] == "body_too_large"
                assert "1024" in error["message"]


async def test_zipped_body_and_one_that_is_not_what_it_says(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with serving() as served:
        headers = {"Content-Encoding": "gzip"}
        data = gzip.compress(json.dumps(HELLO).encode())
        async with served.session.post(CHAT, data=data, headers=headers) as response:
            assert response.status == 200
        deflated = zlib.compress(json.dumps(HELLO).encode())
        async with served.session.post(
            CHAT, data=deflated, headers={"Content-Encoding": "Deflate"}
        ) as response:
            assert response.status == 200
        for wrong, word in (
            (b"plain", "incorrect header"),
            (data[:-9], "ends early"),
            (data + b"x", "goes on"),
            (b"", "ends early"),
        ):
            async with served.session.post(CHAT, data=wrong, headers=headers) as response:
                assert response.status == 400
                error = (await response.json())["error"]
                assert error["code"] == "invalid_body" and word in error["message"]
        headers = {"Content-Encoding": "br"}
        async with served.session.post(CHAT, data=data, headers=headers) as response:
            assert response.status == 400
            assert "'br' is not supported" in (await response.json())["error"]["message"]
        assert not caplog.records


NOT_HTTP = [
    b"GARBAGE\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
    b"GET / HTTP/9.9\r\n\r\n",
    b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
    b"GET / HTTP/1.1\r\nX: " + b"a" * 20_000 + b"\r\n\r\n",
    b"GET / HTTP/1.1\r\n" + b"X: a\r\n" * 1000 + b"\r\n",
    b"POST /v1/completions HTTP/1.1\r\nContent-Length: two\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
]


@pytest.mark.parametrize("sent", NOT_HTTP)
async def test_what_is_not_http_gets_the_same_shape_and_no_traceback(
    sent: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving() as served:
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
        writer.write(sent)
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
        assert head.split()[1] == b"400" and b"application/json" in head
        assert re.search(rb"\r\nx-request-id: [0-9a-f]{32}\r\n", head)
        assert json.loads(body)["error"]["code"] == "invalid_http"
        assert not caplog.records


async def test_an_unknown_expectation_gets_the_same_shape() -> None:
    async with serving() as served:
        headers = {"Expect": "other", "x-request-id": "mine"}
        for path in ("/v1/chat/completions", "/nowhere"):
            url = f"http://127.0.0.1:{served.port}{path}"
            async with served.session.post(url, data=b"{}", headers=headers) as response:
                assert (response.status, response.content_type) == (417, "application/json")
                assert response.headers["x-request-id"] == "mine"
                assert "'other' is not known" in (await response.json())["error"]["message"]


async def test_request_id_is_kept_or_made() -> None:
    async with serving() as served:
        for sent, kept in (("abc-1.2:3", True), ("x" * 129, False), ("a b", False), ("", False)):
            async with served.session.get("/health", headers={"x-request-id": sent}) as response:
                got = response.headers["x-request-id"]
                assert (got == sent) is kept
                assert got
        async with served.session.post(CHAT, json={**HELLO, "stream": True}) as response:
            assert len(response.headers["x-request-id"]) == 32


async def test_503_says_when_to_come_back_unless_it_is_of_no_use() -> None:
    async with serving() as served:
        served.engine.refuse = lambda request: Unavailable("draining", retry_after=7.2)
        async with served.session.post(CHAT, json=HELLO) as response:
            assert response.status == 503
            assert response.headers["Retry-After"] == "8"
        served.engine.refuse = lambda request: ModelRefused("unknown architecture")
        async with served.session.post(CHAT, json=HELLO) as response:
            assert response.status == 503
            assert "Retry-After" not in response.headers
            assert response.headers["x-should-retry"] == "false"


async def test_our_own_bug_tells_nothing_but_an_id() -> None:
    def explode(request: object) -> None:
        raise ZeroDivisionError("/secret/path")

    async with serving() as served:
        served.engine.refuse = explode
        for stream in (False, True):
            async with served.session.post(
                CHAT, json={**HELLO, "stream": stream}, headers={"x-request-id": "r1"}
            ) as response:
                assert response.status == 500
                text = await response.text()
                assert "secret" not in text
                assert "r1" in text
                assert json.loads(text)["error"]["code"] == "internal_error"


async def test_a_broken_pipe_of_our_own_is_no_client_that_left() -> None:
    def explode(request: object) -> None:
        raise BrokenPipeError("the worker's pipe")

    async with serving() as served:
        served.engine.refuse = explode
        for stream in (False, True):
            status, _ = await served.post(CHAT, {**HELLO, "stream": stream})
            assert status == 500


# --- keys ------------------------------------------------------------------------------------


async def test_keys() -> None:
    async with serving(keys=ApiKeys(KEYS)) as served:
        async with served.session.post(CHAT, json=HELLO) as response:
            assert response.status == 401
            assert response.headers["WWW-Authenticate"].startswith("Bearer")
            error = (await response.json())["error"]
            assert error["type"] == "authentication_error"
            assert error["code"] == "invalid_api_key"
        for headers in (
            {"Authorization": "Bearer wrong"},
            {"Authorization": "Basic a2V5LWE="},
            {"Authorization": "Bearer "},
            {"x-api-key": "key-c"},
        ):
            status, _ = await served.post(CHAT, HELLO, headers=headers)
            assert status == 401
        for headers, caller in (
            ({"Authorization": "Bearer key-a"}, "alice"),
            ({"authorization": "bearer  key-b "}, "bob"),
            ({"x-api-key": "key-b"}, "bob"),
        ):
            status, _ = await served.post(CHAT, HELLO, headers=headers)
            assert status == 200
            assert served.engine.requests[-1].caller == caller


async def test_what_needs_no_key() -> None:
    async with serving(keys=ApiKeys(KEYS)) as served:
        for path in ("/health", "/ping", "/ready", "/version"):
            assert (await served.get(path))[0] == 200
        for path in ("/v1/models", "/metrics", "/nothing"):
            async with served.session.get(path) as response:
                assert response.status == 401


async def test_without_keys_everybody_may_and_any_key_is_fine() -> None:
    async with serving() as served:
        status, _ = await served.post(CHAT, HELLO, headers={"Authorization": "Bearer anything"})
        assert status == 200
        assert served.engine.requests[0].caller == ""


# --- Host and Origin -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8420", 200),
        ("LOCALHOST", 200),
        ("127.0.0.1:1", 200),
        ("[::1]:8420", 200),
        ("app.localhost", 200),
        ("192.168.1.5:8420", 200),
        ("quantd.lan:8420", 200),
        ("evil.example", 403),
        ("evil.example:8420", 403),
        ("localhost.evil.example", 403),
        ("127.0.0.1.evil.example", 403),
    ],
)
async def test_host(host: str, status: int) -> None:
    settings = ServerSettings(allowed_hosts=("quantd.lan",))
    async with serving(settings=settings) as served:
        got, reply = await served.get("/health", headers={"Host": host})
        assert got == status
        if status == 403:
            assert reply["error"]["code"] == "host_not_allowed"
            assert host in reply["error"]["message"]


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://localhost:3000", 200),
        ("https://127.0.0.1", 200),
        ("http://[::1]:8080", 200),
        ("https://ui.example", 200),
        ("https://UI.example", 200),
        ("https://evil.example", 403),
        ("http://localhost.evil.example", 403),
        ("null", 403),
        ("file://", 403),
        ("chrome-extension://localhost", 403),
    ],
)
async def test_origin(origin: str, status: int) -> None:
    settings = ServerSettings(allowed_origins=("https://ui.example",))
    async with serving(settings=settings) as served:
        for body in (HELLO, {**HELLO, "stream": True}):
            async with served.session.post(CHAT, json=body, headers={"Origin": origin}) as response:
                assert response.status == status
                allowed = response.headers.get("Access-Control-Allow-Origin")
                assert allowed == (origin if status == 200 else None)


async def test_same_origin_under_an_allowed_name() -> None:
    settings = ServerSettings(allowed_hosts=("quantd.lan",))
    async with serving(settings=settings) as served:
        headers = {"Host": "quantd.lan:8420", "Origin": "http://quantd.lan:8420"}
        assert (await served.get("/health", headers=headers))[0] == 200


async def test_preflight_needs_no_key() -> None:
    async with serving(keys=ApiKeys(KEYS)) as served:
        headers = {
            "Origin": "http://localhost:3000",
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization, content-type",
        }
        async with served.session.options(CHAT, headers=headers) as response:
            assert response.status == 204
            assert response.headers["Access-Control-Allow-Origin"] == "http://localhost:3000"
            assert "POST" in response.headers["Access-Control-Allow-Methods"]
            allowed = response.headers["Access-Control-Allow-Headers"]
            assert allowed == "authorization, content-type"
        headers["Origin"] = "https://evil.example"
        async with served.session.options(CHAT, headers=headers) as response:
            assert response.status == 403


async def test_errors_carry_the_origin_too() -> None:
    async with serving() as served:
        headers = {"Origin": "http://localhost:3000"}
        async with served.session.post(CHAT, json={}, headers=headers) as response:
            assert response.status == 400
            assert response.headers["Access-Control-Allow-Origin"] == "http://localhost:3000"


# --- routes without a body -------------------------------------------------------------------


async def test_models() -> None:
    model = {
        "id": "org/tiny",
        "object": "model",
        "created": 1700000000,
        "owned_by": "quantd",
        "max_model_len": 512,
        "aliases": ["tiny"],
        "state": "ready",
        "progress": 1.0,
        "reason": None,
    }
    async with serving() as served:
        assert await served.get("/v1/models") == (200, {"object": "list", "data": [model]})
        for name in ("org/tiny", "tiny", "org%2Ftiny"):
            assert await served.get(f"/v1/models/{name}") == (200, model)
        status, reply = await served.get("/v1/models/org/other")
        assert status == 404
        assert reply["error"]["code"] == "model_not_found"


async def test_health_ready_version_ping() -> None:
    fleet = FakeFleet(is_ready=False)
    async with serving(fleet=fleet) as served:
        assert await served.get("/health") == (200, {"status": "ok"})
        assert (await served.get("/ping"))[0] == 200
        status, reply = await served.get("/ready")
        assert status == 503
        assert reply["models"] == [{"id": "org/tiny", "state": "ready", "progress": 1.0}]
        fleet.is_ready = True
        assert (await served.get("/ready"))[0] == 200
        status, reply = await served.get("/version")
        assert reply["version"][0].isdigit()
        async with served.session.head("/health") as response:
            assert response.status == 200


async def test_metrics() -> None:
    async with serving() as served:
        async with served.session.get("/metrics") as response:
            assert response.status == 200
            assert response.headers["Content-Type"].startswith("text/plain; version=0.0.4")
            assert "process_" in await response.text()


async def test_tokenize_and_back() -> None:
    async with serving() as served:
        status, reply = await served.post("/tokenize", {"prompt": "hé", "return_token_strs": True})
        assert (status, reply) == (
            200,
            {
                "count": 4,
                "max_model_len": 512,
                "tokens": [256, 104, 195, 169],
                "token_strs": ["<s>", "h", "�", "�"],
            },
        )
        _, reply = await served.post("/tokenize", {"prompt": "h", "add_special_tokens": False})
        assert reply["tokens"] == [104]
        assert reply["token_strs"] is None
        _, reply = await served.post("/tokenize", HELLO)
        assert reply["count"] == len("[user]hi[assistant]") + 1
        _, reply = await served.post("/tokenize", {**HELLO, "add_generation_prompt": False})
        assert reply["count"] == len("[user]hi") + 1
        _, reply = await served.post("/detokenize", {"tokens": [256, 104, 195, 169]})
        assert reply == {"prompt": "<s>hé"}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", **HELLO}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"prompt": 3}, "prompt"),
        ("/tokenize", {**HELLO, "tools": [{"type": "function"}]}, "tools[0].function"),
        ("/tokenize", {**HELLO, "tools": [{"function": {"name": "f"}}]}, "tools"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [1, "a"]}, "tokens[1]"),
        ("/detokenize", {"tokens": [9999]}, "tokens"),
    ],
)
async def test_bad_token_requests(path: str, body: dict[str, Any], param: str) -> None:
    async with serving() as served:
        assert (await served.error(path, body))["param"] == param


def test_no_key_file_is_no_keys(tmp_path: Path) -> None:
    assert not ApiKeys.from_file(None).required
    (tmp_path / "keys").write_text("secret\n")
    assert ApiKeys.from_file(tmp_path / "keys").required

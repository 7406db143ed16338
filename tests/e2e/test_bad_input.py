"""Whatever is sent: never a 500, always the API's error shape, and the daemon lives on."""

from __future__ import annotations

import copy
import gzip
import http.client
import json
import random
import re
import socket
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager
from itertools import count
from typing import Any

import msgspec
import psutil
import pytest
from harness import Daemon

from quantd.daemon.server import schemas
from quantd.daemon.server.responses.request import ResponseBody

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
RESPONSES = "/v1/responses"
MODEL = {"model": "demo"}
BODIES: dict[str, dict[str, Any]] = {
    CHAT: MODEL | {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1},
    COMPLETIONS: MODEL | {"prompt": "hi", "max_tokens": 1},
    RESPONSES: MODEL | {"input": "hi", "max_output_tokens": 1},
    "/tokenize": MODEL | {"prompt": "hi"},
    "/detokenize": MODEL | {"tokens": [1, 2]},
}


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    """With a short context, so that nothing that is let through runs for long."""
    options = ("--dtype", "float32", "--threads", "1", "--max-context", "64")
    with Daemon("demo", *options) as daemon:
        yield daemon


class Client(AbstractContextManager["Client"]):
    """One keep-alive connection; every answer is checked for its shape."""

    def __init__(self, daemon: Daemon) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", daemon.port, timeout=540)
        self.num_connects = 0

    def __exit__(self, *error: object) -> None:
        self._connection.close()

    def post(self, path: str, body: object, **headers: str) -> tuple[int, dict[str, Any]]:
        """Status, and the error object of what is not a 200."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        if self._connection.sock is None:
            self.num_connects += 1
        self._connection.request("POST", path, data, {"Content-Type": "application/json"} | headers)
        response = self._connection.getresponse()
        answer = response.read()
        told = (path, data[:2000], response.status, answer[:2000])
        if response.status == 200:
            assert response.headers["x-request-id"]
            return 200, {}
        assert 400 <= response.status < 500, told
        assert response.headers["Content-Type"].startswith("application/json"), told
        [(name, error)] = json.loads(answer).items()
        assert name == "error" and set(error) == {"message", "type", "param", "code"}, told
        assert error["message"] and error["type"] and error["code"], told
        assert error["param"] is None or isinstance(error["param"], str), told
        return response.status, error


@pytest.fixture
def client(daemon: Daemon) -> Iterator[Client]:
    """When the test has ended, the daemon still answers, and has nothing to report."""
    client = Client(daemon)
    with client:
        yield client
        check_health(client, daemon)


def check_health(client: Client, daemon: Daemon) -> None:
    for path, body in BODIES.items():
        assert client.post(path, body)[0] == 200
    log = daemon.said()
    assert "Traceback" not in log and '"level":"error"' not in log, log[-4000:]


POISON: list[Any] = [
    *(None, True, 0, -1, 1.5, 1e308, 2**31, 2**64, 10**40, "", "x", "\0", [], [None], [-1]),
    *([2**40], ["x"], [[]], {}, {"x": [{}]}, ["x"] * 100),
]
FIELDS = {
    CHAT: schemas.ChatBody,
    COMPLETIONS: schemas.CompletionBody,
    RESPONSES: ResponseBody,
    "/tokenize": schemas.TokenizeBody,
    "/detokenize": schemas.DetokenizeBody,
}


@pytest.mark.parametrize("path", FIELDS)
def test_a_bad_value_is_refused_by_its_fields_name(client: Client, path: str) -> None:
    for field in msgspec.structs.fields(FIELDS[path]):
        for value in POISON:
            status, error = client.post(path, BODIES[path] | {field.name: value})
            if status != 200 and error["message"] != "give either prompt or messages":
                assert re.split(r"[.[]", error["param"])[0] == field.name, (value, error)
    assert client.num_connects == 1


FULL_CHAT = {
    "model": "demo",
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "name": "a", "content": [{"type": "text", "text": "hi"}]},
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "hm",
            "tool_calls": [
                {
                    "id": "1",
                    "type": "function",
                    "function": {"name": "f", "arguments": '{"x": 1}'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "1", "content": "2"},
        {"role": "user", "content": "and?"},
    ],
    "max_completion_tokens": 2,
    "temperature": 0.5,
    "stop": ["a", "b"],
    "stop_token_ids": [3],
    "logit_bias": {"5": -100, "6": 1.5},
    "logprobs": True,
    "top_logprobs": 2,
    "n": 2,
    "seed": 1,
    "stream": True,
    "stream_options": {"include_usage": True},
    "bad_words": ["word"],
    "response_format": {"type": "text"},
    "chat_template_kwargs": {"enable_thinking": False},
    "metadata": {"a": "b"},
}
FULL_COMPLETION = {
    "model": "demo",
    "prompt": [[1, 2, 3], [4]],
    "max_tokens": 2,
    "logprobs": 1,
    "echo": True,
    "stop": "x",
    "logit_bias": {"7": 1},
    "allowed_token_ids": [1, 2, 3],
    "best_of": 1,
    "user": "me",
}
"""Both are answered as they are: what is refused then is the mutation."""


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a JSON value."""
    found: list[tuple[Any, Any]] = []
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in list(items):
        found.append((value, key))
        if isinstance(inner, dict | list):
            found += places(inner)
    return found


def mutated(rng: random.Random, body: dict[str, Any]) -> dict[str, Any]:
    """One to three places of a body: without their value, or with one that is not theirs."""
    body = copy.deepcopy(body)
    for _ in range(rng.randint(1, 3)):
        everywhere = places(body)
        (container, key), (other, place) = rng.choice(everywhere), rng.choice(everywhere)
        values = [
            [container[key]] * rng.choice((1, 2, 50)),
            {"type": container[key]},
            copy.deepcopy(other[place]),
            copy.deepcopy(rng.choice(POISON)),
        ]
        if rng.random() < 0.2 and len(body) > 1:
            del container[key]
        else:
            container[key] = rng.choice(values)
    return body


def damaged(rng: random.Random, data: bytes) -> bytes:
    """A few of its bytes are others, are missing, or come twice."""
    made = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        start = rng.randrange(len(made))
        stop = min(len(made), start + rng.choice((1, 1, 2, 10)))
        how = rng.randrange(3)
        if how == 0:
            made[start:stop] = rng.randbytes(stop - start)
        elif how == 1 and stop - start < len(made):
            del made[start:stop]
        else:
            made[start:start] = made[start:stop]
    return bytes(made)


@pytest.mark.parametrize(("path", "body"), [(CHAT, FULL_CHAT), (COMPLETIONS, FULL_COMPLETION)])
def test_random_mutations(client: Client, path: str, body: dict[str, Any]) -> None:
    rng = random.Random(20)
    assert client.post(path, body)[0] == 200
    statuses = Counter[int]()
    for _ in range(500):
        status, _ = client.post(path, mutated(rng, body))
        statuses[status] += 1
    assert statuses[400] > 100 and statuses[200] > 20
    plain = json.dumps(body).encode()
    for _ in range(500):
        client.post(path, damaged(rng, plain))
    assert client.num_connects == 1


def chat(content: str) -> dict[str, Any]:
    return BODIES[CHAT] | {"messages": [{"role": "user", "content": content}]}


_KWARGS = "chat_template_kwargs"
TABLE: list[tuple[str, object, str | None, str]] = [
    (CHAT, b"", None, "no body"),
    (CHAT, b'{"model": "demo"', None, "not JSON"),
    (CHAT, b'{"model": NaN}', None, "not JSON"),
    (CHAT, b'{"model": "\xff\xfe"}', None, "UTF-8"),
    (CHAT, json.dumps(chat("\ud800")).encode(), None, "not JSON"),
    (CHAT, b'{"metadata":' + b"[" * 1_000_000, None, "nested"),
    (CHAT, b'{"metadata":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001, None, "nested"),
    (CHAT, b"[]", None, "object"),
    (CHAT, {}, "messages", "required"),
    (CHAT, MODEL | {"messages": []}, "messages", "at least 1"),
    (CHAT, MODEL | {"messages": [{"content": "x"}]}, "messages[0].role", "required"),
    (CHAT, MODEL | {"messages": [{"role": "king", "content": "x"}]}, "messages[0].role", "king"),
    (CHAT, chat("hi") | {"chat_template_kwargs": {"tools": []}}, _KWARGS + ".tools", "field"),
    (
        CHAT,
        chat("hi") | {"chat_template_kwargs": {"add_generation_prompt": False}},
        _KWARGS + ".add_generation_prompt",
        "field",
    ),
    (CHAT, chat("x" * 10_000), "messages", "maximum context length is 64 tokens"),
    (CHAT, chat("hi") | {"max_tokens": 1000}, "max_tokens", "maximum context length"),
    (CHAT, chat("hi") | {"stop": ["x"] * 10_000}, "stop", "10000 strings; the limit is 64"),
    (CHAT, chat("hi") | {"stop": "x" * 10_000}, "stop", "1 to 1024 characters, got 10000"),
    (CHAT, chat("hi") | {"stop_token_ids": [10**6]}, "stop_token_ids", "1000000"),
    (CHAT, chat("hi") | {"logit_bias": {"10000000": 1}}, "logit_bias", "10000000"),
    (CHAT, chat("hi") | {"n": 10**9}, "n", "between 1 and 128"),
    (COMPLETIONS, MODEL | {"prompt": [10**6]}, "prompt", "1000000"),
    (COMPLETIONS, MODEL | {"prompt": [-1]}, "prompt", "-1"),
    (COMPLETIONS, MODEL | {"prompt": [1, "x"]}, "prompt", "list of token ids"),
    (COMPLETIONS, MODEL | {"prompt": [1] * 100_000}, "prompt", "100001 tokens"),
    (COMPLETIONS, MODEL | {"prompt": ["x"] * 10_000}, "prompt", "limit is 2048"),
    (COMPLETIONS, MODEL | {"prompt": ""}, "prompt", "at least 1"),
    ("/detokenize", MODEL | {"tokens": [1024]}, "tokens", "1024"),
]


@pytest.mark.parametrize(("path", "body", "param", "word"), TABLE, ids=count())
def test_table(client: Client, path: str, body: object, param: str | None, word: str) -> None:
    status, error = client.post(path, body)
    assert (status, error["param"]) == (400, param), error
    assert word in error["message"]
    assert len(error["message"]) < 1000


def test_bodies_over_the_limit(client: Client) -> None:
    big = json.dumps(chat("x" * 40_000_000)).encode()
    assert client.post(CHAT, big)[0] == 413
    assert client.post(CHAT, gzip.compress(big), **{"Content-Encoding": "gzip"})[0] == 413


def test_paths_and_methods(client: Client, daemon: Daemon) -> None:
    for path in ("/", "/v1", "/v1/models/", "/v1/%00", "/v1/models/..%2f..", "/" + "a" * 5000):
        status, error = client.post(path, {})
        assert status in (404, 405), (path, error)
    for method in ("PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"):
        assert daemon.request(method, CHAT, b"{}")[0] == 405
    assert daemon.request("BREW", CHAT, b"{}")[0] in (400, 405)


def test_a_zip_bomb_is_not_unpacked(client: Client, daemon: Daemon) -> None:
    packer = zlib.compressobj(wbits=-15)
    megabyte = packer.compress(b"x" * 1_000_000) + packer.flush(zlib.Z_FULL_FLUSH)
    bomb = b"\x1f\x8b\x08" + bytes(7) + megabyte * 10_000
    process = psutil.Process(daemon.process.pid)
    before = process.cpu_times().user
    for path, expected in ((CHAT, 413), ("/nowhere", 404)):
        assert client.post(path, bomb, **{"Content-Encoding": "gzip"})[0] == expected
    assert daemon.get("/health")[0] == 200  # after the rest of the body was thrown away
    # Ten gigabytes are ten seconds.
    assert process.cpu_times().user - before < 3


# --- below HTTP -----------------------------------------------------------------------------

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
NOT_HTTP = [
    b"hello\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
    b"GET / HTTP/7.0\r\n\r\n",
    b"GET / HTTP/1.1\r\n\r\n",  # no Host
    b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\n\r\n",
    HEAD + b"X: " + b"a" * 20_000 + b"\r\n\r\n",
    HEAD + b"".join(b"X-%d: a\r\n" % i for i in range(1000)) + b"\r\n",
    HEAD + b"Content-Length: -1\r\n\r\n",
    HEAD + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
    HEAD + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}",
    HEAD + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n",
]


def connection_to(daemon: Daemon) -> socket.socket:
    return socket.create_connection(("127.0.0.1", daemon.port), timeout=540)


@pytest.mark.parametrize("sent", NOT_HTTP, ids=count())
def test_what_is_not_http(client: Client, daemon: Daemon, sent: bytes) -> None:
    with connection_to(daemon) as connection:
        connection.sendall(sent)
        head, _, body = connection.makefile("rb").read().partition(b"\r\n\r\n")
    assert head.split()[1] == b"400" and b"Content-Type: application/json" in head
    error = json.loads(body)["error"]
    assert error["code"] == "invalid_http" and error["message"]


def completion(number: int) -> bytes:
    """A whole request; its answer has 1 + number % 3 tokens."""
    body = json.dumps(BODIES[COMPLETIONS] | {"max_tokens": 1 + number % 3, "ignore_eos": True})
    head = b"x-request-id: %d\r\nContent-Length: %d\r\n\r\n" % (number, len(body))
    return HEAD + head + body.encode()


def test_half_a_request_and_no_more(client: Client, daemon: Daemon) -> None:
    whole = completion(0)
    for stop in range(0, len(whole), 3):
        with connection_to(daemon) as connection:
            connection.sendall(whole[:stop])
    assert daemon.metric("quantd_requests_running") == 0


def test_pipelined_requests_are_answered_in_order(client: Client, daemon: Daemon) -> None:
    with connection_to(daemon) as connection, connection.makefile("rb") as received:
        connection.sendall(b"".join(map(completion, range(100))))
        for number in range(100):
            assert received.readline() == b"HTTP/1.1 200 OK\r\n"
            headers = http.client.parse_headers(received)
            usage = json.loads(received.read(int(headers["Content-Length"])))["usage"]
            assert headers["x-request-id"] == str(number)
            assert usage["completion_tokens"] == 1 + number % 3

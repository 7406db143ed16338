"""Whatever is sent: never a 500, always the API's error shape, and the daemon lives on."""

from __future__ import annotations

import copy
import gzip
import http.client
import json
import random
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from harness import Daemon

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
MODEL = {"model": "demo"}
BODIES: dict[str, dict[str, Any]] = {
    CHAT: MODEL | {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1},
    COMPLETIONS: MODEL | {"prompt": "hi", "max_tokens": 1},
    "/tokenize": MODEL | {"prompt": "hi"},
    "/detokenize": MODEL | {"tokens": [1, 2]},
}


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    """With a short context, so that nothing that is let through runs for long."""
    daemon = Daemon("demo", "--dtype", "float32", "--threads", "1", "--max-context", "64")
    yield daemon
    daemon.stop()


class Client:
    """One keep-alive connection; every answer is checked for its shape."""

    def __init__(self, daemon: Daemon) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", daemon.port, timeout=120)
        self.num_connects = 0

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
    yield client
    for path, body in BODIES.items():
        assert client.post(path, body)[0] == 200
    log = daemon.log.read_text()
    assert "Traceback" not in log and '"level":"error"' not in log, log[-4000:]

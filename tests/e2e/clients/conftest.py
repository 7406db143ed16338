"""The daemons that the SDKs talk to: the demo, and one that refuses much.

A suite that runs in a process of its own (another generation of an SDK, another language) gets
their addresses in the environment, so that all suites share the two.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import Daemon, Server

_VARIABLE = "QUANTD_TEST_SERVERS"
_KEY = "sk-strict"
_STRICT = """
[server]
api_keys_file = "keys"
body_limit_bytes = 20000
[scheduler]
max_running = 1
max_waiting = 1
[models.demo]
path = "embedded:demo"
dtype = "float32"
threads = 1
[models.broken]
path = "nowhere"
preload = false
"""


def _given(name: str) -> Server | None:
    servers = json.loads(os.environ.get(_VARIABLE, "{}"))
    return Server(servers[name]["port"], Path(servers[name]["socket"])) if servers else None


@pytest.fixture(scope="session")
def demo_server(request: pytest.FixtureRequest) -> Server:
    return _given("demo") or request.getfixturevalue("demo")


@pytest.fixture(scope="session")
def strict_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """It wants `api_key`; one request runs and one waits; bodies are small; one of its models
    does not load."""
    given = _given("strict")
    if given is not None:
        yield given
        return
    folder = tmp_path_factory.mktemp("strict")
    (folder / "keys").write_text(f"tests:{_KEY}\n")
    (folder / "config.toml").write_text(_STRICT)
    with Daemon("--config", str(folder / "config.toml")) as daemon:
        yield daemon


@pytest.fixture(scope="session")
def api_key() -> str:
    """The one that the strict server wants."""
    return _KEY


@pytest.fixture(scope="session")
def environment(demo_server: Server, strict_server: Server) -> dict[str, str]:
    """Of a process that shall talk to these servers."""
    servers = {
        name: {"port": server.port, "url": server.url, "socket": str(server.socket)}
        for name, server in (("demo", demo_server), ("strict", strict_server))
    }
    return os.environ | {_VARIABLE: json.dumps(servers), "QUANTD_TEST_KEY": _KEY}

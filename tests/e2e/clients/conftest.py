"""The daemons that the SDKs talk to: `demo`, and `strict`, which refuses much.

A suite that runs in a process of its own (another generation of an SDK, another language) gets
their addresses in the environment, so that all suites share the two.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from harness import Daemon, Server

API_KEY = "sk-strict"
_VARIABLE = "QUANTD_TEST_SERVERS"
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


class Servers(NamedTuple):
    demo: Server
    strict: Server
    """One request runs, one waits; a key, small bodies, and a model that does not load."""

    def environment(self) -> dict[str, str]:
        """Of a process that shall talk to these."""
        addresses = [[server.port, str(server.socket)] for server in self]
        return os.environ | {_VARIABLE: json.dumps(addresses), "QUANTD_TEST_KEY": API_KEY}


@pytest.fixture(scope="session")
def servers(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Servers]:
    given = os.environ.get(_VARIABLE)
    if given is not None:
        yield Servers(*(Server(port, Path(socket)) for port, socket in json.loads(given)))
        return
    folder = tmp_path_factory.mktemp("strict")
    (folder / "keys").write_text(f"tests:{API_KEY}\n")
    (folder / "config.toml").write_text(_STRICT)
    strict = Daemon("--config", str(folder / "config.toml"))
    yield Servers(request.getfixturevalue("demo"), strict)
    strict.stop()


@pytest.fixture(scope="session")
def former_openai() -> Path:
    """Where the former generation of the SDK is, beside the environment's own one."""
    folder = Path(sys.prefix) / "openai2"
    if not (folder / "openai").is_dir():
        pytest.skip(f"{folder} is not there; `make test` makes it")
    return folder

"""What /openapi.json says is what the daemon does, on TCP and on the Unix socket."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from fuzz.fuzz_openapi import FILTERED, POLICY, run, serve
from harness import Daemon

pytestmark = pytest.mark.xdist_group("openapi")


_TWINS = ("--exclude-path", "/v2/rerank", "--exclude-path", "/rerank")
"""Of /v1/rerank: the same handler."""


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with serve(tmp_path_factory.mktemp("daemon")) as daemon:
        yield daemon


@pytest.fixture(scope="module")
def document(daemon: Daemon) -> dict[str, Any]:
    status, body = daemon.get("/openapi.json")  # without a key
    assert status == 200
    return json.loads(body)


@pytest.mark.timeout(900)  # a minute of CPU, and the machine may be shared
def test_schemathesis(daemon: Daemon) -> None:
    done = run(f"{daemon.url}/openapi.json", "--max-examples", "10", *_TWINS)
    assert done.returncode == 0, done.stdout[-20_000:]
    assert "No operations" not in done.stdout
    log = daemon.said()
    assert "Traceback" not in log and '"level":"error"' not in log, log[-4000:]


@pytest.mark.timeout(600)
def test_under_a_safety_policy(tmp_path: Path) -> None:
    with serve(tmp_path, POLICY) as filtering:
        options = ("--max-examples", "10", "--phases", "fuzzing", *_TWINS)
        document = f"{filtering.url}/openapi.json"
        done = run(document, *options, "--include-path-regex", FILTERED)
        assert done.returncode == 0, done.stdout[-20_000:]
        assert "No operations" not in done.stdout
        log = filtering.said()
        assert "Traceback" not in log and '"level":"error"' not in log, log[-4000:]
        metrics = filtering.get("/metrics", unix=True)[1].decode()
        for action in ("annotate", "redact", "block"):
            assert f'quantd_safety_total{{action="{action}"' in metrics


LIES = {
    "a field that is not described": lambda d: d["Version"]["properties"].pop("version"),
    "another type": lambda d: d["Version"]["properties"]["version"].update(type="integer"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_found(daemon: Daemon, document: dict[str, Any], tmp_path: Path, lie: str) -> None:
    document = json.loads(json.dumps(document))
    version = document["components"]["schemas"]
    LIES[lie](version)
    version["Version"]["required"] = []
    file = tmp_path / "openapi.json"
    file.write_text(json.dumps(document))
    options = ("--url", daemon.url, "--include-path", "/version", "--phases", "fuzzing")
    assert run(str(file), *options, "--max-examples", "1").returncode == 1


@pytest.mark.parametrize("method", ["get", "post"])
def test_administration(daemon: Daemon, document: dict[str, Any], method: str) -> None:
    whole = json.loads(daemon.get("/openapi.json", unix=True)[1])
    names = whole["paths"].keys() - document["paths"].keys()
    admin = {path: whole["paths"][path] for path in names}
    assert all(path.startswith("/admin/") for path in admin) and len(admin) >= 8
    body = {"model": "demo", "shrink": True} if method == "post" else None
    for path, operations in sorted(admin.items()):
        if method not in operations or path == "/admin/drain":
            continue
        status, _, data = daemon.request(method.upper(), path, body, unix=True)
        content = operations[method]["responses"][str(status)]["content"]
        schema = content["application/json"]["schema"] | {"components": whole["components"]}
        jsonschema.validate(json.loads(data), schema)
        assert status == 200 or path == "/admin/reload", (path, data)

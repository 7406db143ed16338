"""What clients see while they wait: comments on a silent stream, 429 when too many wait, and a
model that is loaded after its checkpoint was mended."""

from __future__ import annotations

import http.client
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import Daemon

from quantd.daemon.config.rules import ModelPath

LONG: dict[str, Any] = {
    "model": "demo",
    "messages": [{"role": "user", "content": "What can you do?"}],
    "max_tokens": 4000,
    "ignore_eos": True,
    "stream": True,
}
CHAT = "/v1/chat/completions"


def begin(daemon: Daemon, body: dict[str, Any]) -> http.client.HTTPConnection:
    """A request that is sent and not read."""
    connection = http.client.HTTPConnection("127.0.0.1", daemon.port, timeout=240)
    connection.request("POST", CHAT, json.dumps(body), {"Content-Type": "application/json"})
    return connection


def test_one_runs_one_waits_with_comments_and_the_next_is_told_to_come_back(
    serve: Callable[..., Daemon],
) -> None:
    daemon = serve(
        *("demo", "--dtype", "float32", "--threads", "1"),
        *("--max-running", "1", "--max-waiting", "1", "--keepalive-seconds", "1"),
    )
    with daemon.held():
        running = begin(daemon, LONG)
        daemon.wait_metric("quantd_requests_running", 1)
        waiting = begin(daemon, LONG | {"max_tokens": 2})
        daemon.wait_metric("quantd_requests_waiting", 1)

        status, headers, body = daemon.request("POST", CHAT, LONG)
        assert status == 429 and int(headers["retry-after"]) >= 1
        assert json.loads(body)["error"]["type"] == "rate_limit_error"

        response = waiting.getresponse()
        assert response.status == 200 and response.readline().startswith(b":")
        running.close()
    rest = response.read()
    assert rest.endswith(b"data: [DONE]\n\n") and b'"finish_reason":"length"' in rest
    waiting.close()
    daemon.wait_metric("quantd_requests_running", 0)


def test_a_mended_checkpoint_loads_when_asked_for(
    serve: Callable[..., Daemon], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(str(ModelPath().read("embedded:demo", tmp_path)), folder)
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"hidden_size"', '"hidden"'))
    daemon = serve(f"m={folder}", "--dtype", "float32", "--threads", "1", wait_ready=False)
    daemon.wait_metric('quantd_model_state{model="m",state="failed"}', 1)
    body = LONG | {"model": "m", "stream": False, "max_tokens": 2}
    status, headers, _ = daemon.request("POST", CHAT, body)
    assert status == 503 and headers["x-should-retry"] == "false"
    (folder / "config.json").write_text(config)
    daemon.post("/admin/models/load", {"model": "m"}, unix=True)
    daemon.wait_metric('quantd_model_state{model="m",state="ready"}', 1)
    assert daemon.post(CHAT, body)["usage"]["completion_tokens"] == 2

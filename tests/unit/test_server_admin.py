"""The Unix socket's application: no key, the admin routes, who the peer is."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from server_fakes import Served, serving_unix

from quantd.daemon.errors import ConfigError
from quantd.daemon.server import middleware
from quantd.daemon.server.admin import AdminActions
from quantd.daemon.server.auth import Peer
from quantd.daemon.server.sockets import bind_unix


class Calls:
    def __init__(self) -> None:
        self.drained = 0
        self.error: ConfigError | None = None

    async def reload(self) -> list[str]:
        if self.error is not None:
            raise self.error
        return ["log.level: info -> debug"]

    def drain(self) -> None:
        self.drained += 1

    def actions(self) -> AdminActions:
        return AdminActions(reload=self.reload, drain=self.drain)


@asynccontextmanager
async def unix(path: Path | str, calls: Calls | None = None) -> AsyncIterator[Served]:
    sock = bind_unix(path)
    address = str(path).replace("@", "\0", 1)
    async with serving_unix(address, sock, (calls or Calls()).actions()) as served:
        yield served


async def test_inference_needs_no_key_and_no_host(tmp_path: Path) -> None:
    async with unix(tmp_path / "s") as served:
        body = {"messages": [{"role": "user", "content": "hi"}]}
        status, _ = await served.post("/v1/chat/completions", body, headers={"Host": "any.example"})
        assert status == 200
        assert served.engine.requests[0].caller == ""


@pytest.mark.parametrize("stream", [False, True])
async def test_leaving_the_unix_socket_aborts_too(tmp_path: Path, stream: bool) -> None:
    """A proxy in front of it closes its end when its own client has left."""
    async with unix(tmp_path / "s") as served:
        served.engine.answer = lambda request: None
        payload = json.dumps({"prompt": "hi", "stream": stream}).encode()
        _, writer = await asyncio.open_unix_connection(tmp_path / "s")
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
        writer.write(head % len(payload) + payload)
        await served.engine.submitted.wait()
        writer.close()
        async with asyncio.timeout(240):
            await served.engine.abort_seen.wait()
        assert len(served.engine.aborted) == 1 and served.fleet.num_leases == 0


async def test_actions(tmp_path: Path) -> None:
    calls = Calls()
    async with unix(tmp_path / "s", calls) as served:
        status, reply = await served.post("/admin/reload", None)
        assert (status, reply) == (200, {"changes": ["log.level: info -> debug"]})
        calls.error = ConfigError("config.toml, line 3: no such key")
        status, reply = await served.post("/admin/reload", None)
        assert status == 400
        assert reply["error"]["message"] == "config.toml, line 3: no such key"
        assert (await served.post("/admin/drain", None))[0] == 202
        assert calls.drained == 1


async def test_models_and_state(tmp_path: Path) -> None:
    async with unix(tmp_path / "s") as served:
        status, reply = await served.get("/admin/models")
        assert status == 200
        (model,) = reply["models"]
        assert (model["name"], model["path"], model["state"]) == (
            "org/tiny",
            "/models/tiny",
            "ready",
        )
        status, reply = await served.get("/admin/state")
        assert 0 <= reply["uptime_seconds"] < 86400
        assert set(reply["engines"]) == {"org/tiny"}
        engine = reply["engines"]["org/tiny"]
        assert (engine["running"], engine["kv"]["free"]) == (0, 8)
        assert engine["kv"]["moved_blocks"]["out_host"] == 0
        assert engine["requests"][0]["phase"] == "decode"


async def test_the_kv_budget_changes_while_it_runs(tmp_path: Path) -> None:
    async with unix(tmp_path / "s") as served:
        body = {"model": "tiny", "kv_bytes": 1 << 20, "shrink": True}
        status, reply = await served.post("/admin/kv", body)
        assert (status, reply["free"]) == (200, 8)
        assert served.fleet.idle.calls == ["resize 1048576", "shrink"]
        for size, number in (("16MiB", 16 << 20), ("1.5 gib", 3 << 29), ("4096", 4096)):
            await served.post("/admin/kv", {"model": "tiny", "kv_bytes": size})
            assert served.fleet.idle.calls[-1] == f"resize {number}", "as the configuration does"
        for wrong in ("16 MB", "-1", "", 0, -5, 1 << 63, "auto"):
            error = await served.error("/admin/kv", {"model": "tiny", "kv_bytes": wrong})
            assert error["param"] == "kv_bytes"
            assert repr(wrong) in error["message"] and "at least 1" in error["message"]
        for wrong in (1.5, True, [1]):
            error = await served.error("/admin/kv", {"model": "tiny", "kv_bytes": wrong})
            assert error["param"] == "kv_bytes"
        assert (await served.error("/admin/kv", {"model": "tiny"}))["param"] == "kv_bytes"
        assert (await served.post("/admin/kv", {"model": "x", "shrink": True}))[0] == 404


async def test_load_and_unload(tmp_path: Path) -> None:
    async with unix(tmp_path / "s") as served:
        status, reply = await served.post("/admin/models/load", {"model": "tiny"})
        assert (status, reply) == (200, {"model": "org/tiny", "state": "ready"})
        status, reply = await served.post("/admin/models/unload", {"model": "tiny"})
        assert (status, reply) == (200, {"model": "org/tiny", "state": "cold"})
        assert served.fleet.calls == ["load org/tiny", "unload org/tiny"]
        status, reply = await served.post("/admin/models/load", {"model": "other"})
        assert status == 404
        assert (await served.error("/admin/models/load", {}))["param"] == "model"


async def test_a_recount_says_what_does_not_hold(tmp_path: Path) -> None:
    async with unix(tmp_path / "s") as served:
        assert await served.get("/admin/check") == (200, {"wrong": {}})
        served.fleet.idle.is_wrong = True
        status, reply = await served.get("/admin/check")
        assert status == 500
        assert "a block is used by no sequence" in reply["wrong"]["org/tiny"]


async def test_a_stranger_may_ask_the_model_but_not_administer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(middleware, "peer_of", lambda connection: Peer(1, 54321, 54321))
    async with unix(tmp_path / "s") as served:
        status, reply = await served.get("/admin/state")
        assert status == 403
        assert reply["error"]["code"] == "peer_not_allowed"
        assert (await served.get("/v1/models"))[0] == 200


async def test_an_abstract_socket_has_no_mode_so_the_peer_decides(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with unix(f"@quantd-{uuid.uuid4().hex}") as served:
        assert (await served.get("/v1/models"))[0] == 200
        monkeypatch.setattr(middleware, "peer_of", lambda connection: Peer(1, 54321, 54321))
        assert (await served.get("/v1/models"))[0] == 403

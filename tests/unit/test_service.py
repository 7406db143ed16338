"""The composed daemon in this process: it comes up, reloads, drains and ends in order."""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from io import StringIO
from pathlib import Path

import aiohttp
import msgspec
import pytest
import structlog
from fakes import FakeExecutor
from server_fakes import VOCAB_SIZE, byte_text_model

from quantd.daemon import fleet
from quantd.daemon.config import (
    Environment,
    LogSettings,
    ModelSettings,
    PolicySettings,
    RuleSettings,
    SafetySettings,
    ServerSettings,
    Settings,
)
from quantd.daemon.engine.executor import OnProgress
from quantd.daemon.errors import ConfigError, ModelRefused
from quantd.daemon.fleet import ModelStatus
from quantd.daemon.service import Service, summary
from quantd.daemon.types import LoadModel, LoadProgress


@pytest.fixture(autouse=True)
def restored_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level, raising = root.handlers[:], root.level, logging.raiseExceptions
    yield
    root.handlers[:], logging.raiseExceptions = handlers, raising
    root.setLevel(level)
    structlog.reset_defaults()


@pytest.fixture
def executors(monkeypatch: pytest.MonkeyPatch) -> dict[str, FakeExecutor]:
    """The fake workers that the daemon has started, by model."""
    started: dict[str, FakeExecutor] = {}

    async def start(load: LoadModel, on_progress: OnProgress) -> FakeExecutor:
        on_progress(LoadProgress("weights", 1, 2))
        if load.name == "bad":
            raise ModelRefused("bad on purpose")
        executor = started[load.name] = FakeExecutor()
        executor.info = msgspec.structs.replace(executor.info, vocab_size=VOCAB_SIZE)
        return executor

    fake = functools.partial(
        fleet.Fleet, start_executor=start, load_text=lambda path, limit, dialect: byte_text_model()
    )
    monkeypatch.setattr(fleet, "Fleet", fake)
    return started


class Bench:
    """A service under test, its log and what it told the service manager."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.notified = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.notified.bind(str(folder / "notify"))
        self.notified.setblocking(False)
        self.log = StringIO()
        self.next_settings: Settings | ConfigError = settings
        self.seen: list[tuple[str, str]] = []
        # Fed once: what else the manager gets is compared.
        environment = Environment(notify_socket=str(folder / "notify"), watchdog_usec=10**12)
        self.service = Service(settings, environment, self.read, self.log, self.watch)
        self.socket = settings.server.socket
        self.running: asyncio.Task[int]

    def read(self) -> Settings:
        if isinstance(self.next_settings, ConfigError):
            raise self.next_settings
        return self.next_settings

    def watch(self, models: list[ModelStatus]) -> None:
        self.seen += [(model.name, model.state) for model in models]

    def messages(self) -> list[str]:
        """What the service manager got since the last call, without numbers that differ."""
        found: list[str] = []
        while True:
            try:
                text = self.notified.recv(4096).decode()
            except BlockingIOError:
                return found
            found.append(text.partition("\nMONOTONIC_USEC=")[0])

    async def until(self, condition: Callable[[], object]) -> None:
        while not condition():
            assert not self.running.done() or self.running.result() is None, self.log.getvalue()
            await asyncio.sleep(0)

    @asynccontextmanager
    async def client(self) -> AsyncIterator[aiohttp.ClientSession]:
        connector = aiohttp.UnixConnector(path=str(self.socket))
        async with aiohttp.ClientSession("http://localhost", connector=connector) as session:
            yield session


Run = Callable[..., AsyncIterator[Bench]]


@asynccontextmanager
async def running(folder: Path, settings: Settings) -> AsyncIterator[Bench]:
    bench = Bench(folder, settings)
    bench.running = asyncio.create_task(bench.service.run())
    try:
        await bench.until(lambda: "listening on" in bench.log.getvalue() or bench.running.done())
        yield bench
    finally:
        os.kill(os.getpid(), signal.SIGTERM) if not bench.running.done() else None
        await bench.running
        bench.notified.close()


def settings_for(folder: Path, *names: str, preload: bool = True) -> Settings:
    models = {name: ModelSettings(name=name, path=folder / name, preload=preload) for name in names}
    server = ServerSettings(port=0, socket=folder / "q.sock")
    return Settings(server=server, models=models)


def chat(model: str, **fields: object) -> dict[str, object]:
    return {"model": model, "messages": [{"role": "user", "content": "hi"}]} | fields


async def test_from_start_to_end(tmp_path: Path, executors: dict[str, FakeExecutor]) -> None:
    async with running(tmp_path, settings_for(tmp_path, "a")) as bench:
        async with bench.client() as client:
            async with client.get("/health") as response:
                assert response.status == 200
            await bench.until(lambda: "model ready" in bench.log.getvalue())
            async with client.post("/v1/chat/completions", json=chat("a", max_tokens=3)) as reply:
                assert reply.status == 200, await reply.text()
                assert (await reply.json())["usage"]["completion_tokens"] == 3
            async with client.get("/metrics") as response:
                text = await response.text()
                assert 'quantd_model_state{model="a",state="ready"} 1.0' in text
                assert 'quantd_requests_total{model="a",outcome="length"} 1.0' in text
        messages = bench.messages()
        assert messages[:2] == ["READY=1", "WATCHDOG=1"]
        assert "STATUS=1 of 1 models in memory" in messages
        assert ("a", "loading") in bench.seen and bench.seen[-1] == ("a", "ready")
        os.kill(os.getpid(), signal.SIGTERM)
        assert await bench.running == 0
        assert bench.messages() == [
            "STOPPING=1\nEXTEND_TIMEOUT_USEC=60000000",
            "STATUS=finishing the running requests",
        ]
        assert executors["a"].closed
        assert not (tmp_path / "q.sock").exists()


async def test_without_a_watcher_the_stages_are_logged(
    tmp_path: Path, executors: dict[str, FakeExecutor]
) -> None:
    settings, log = settings_for(tmp_path, "a"), StringIO()
    running = asyncio.create_task(Service(settings, Environment(), lambda: settings, log).run())
    while "model ready" not in log.getvalue():
        await asyncio.sleep(0)
    os.kill(os.getpid(), signal.SIGTERM)
    assert await running == 0
    assert log.getvalue().count('"stage":"weights","event":"loading"') == 1


async def test_tcp_and_unix_are_one_daemon(
    tmp_path: Path, executors: dict[str, FakeExecutor]
) -> None:
    async with running(tmp_path, settings_for(tmp_path, "a", preload=False)) as bench:
        address = bench.log.getvalue().split("listening on ")[1].split(" and ")[0]
        async with aiohttp.ClientSession(address) as tcp, bench.client() as unix:
            for client in (tcp, unix):
                async with client.get("/v1/models") as response:
                    assert [m["id"] for m in (await response.json())["data"]] == ["a"]
            async with tcp.get("/admin/models") as response:
                assert response.status == 404, "administration is for the Unix socket"
            async with unix.get("/admin/models") as response:
                assert response.status == 200
    assert not executors, "nothing has woken the model"


async def test_the_end_waits_for_what_runs(
    tmp_path: Path, executors: dict[str, FakeExecutor]
) -> None:
    async with running(tmp_path, settings_for(tmp_path, "a")) as bench, bench.client() as client:
        await bench.until(lambda: "a" in executors)
        executors["a"].pause()
        call = asyncio.create_task(_chat_status(client, "a"))
        await bench.until(lambda: executors["a"].plans)
        os.kill(os.getpid(), signal.SIGTERM)
        await bench.until(lambda: "stopping" in bench.log.getvalue())
        assert await _chat_status(client, "a") == 503, "new work is refused"
        assert not call.done()
        executors["a"].resume()
        assert await call == 200
        assert await bench.running == 0


async def test_the_second_signal_cuts(tmp_path: Path, executors: dict[str, FakeExecutor]) -> None:
    async with running(tmp_path, settings_for(tmp_path, "a")) as bench, bench.client() as client:
        await bench.until(lambda: "a" in executors)
        executors["a"].pause()
        call = asyncio.create_task(_chat_status(client, "a"))
        await bench.until(lambda: executors["a"].plans)
        os.kill(os.getpid(), signal.SIGTERM)
        await bench.until(lambda: "stopping" in bench.log.getvalue())
        os.kill(os.getpid(), signal.SIGINT)
        assert await bench.running == 1
        with pytest.raises((aiohttp.ClientError, AssertionError)):
            assert await call == 200


async def _chat_status(client: aiohttp.ClientSession, model: str) -> int:
    async with client.post("/v1/chat/completions", json=chat(model, max_tokens=2)) as response:
        await response.read()
        return response.status


async def test_reload(tmp_path: Path, executors: dict[str, FakeExecutor]) -> None:
    old = settings_for(tmp_path, "a")
    new = settings_for(tmp_path, "b")
    async with running(tmp_path, old) as bench, bench.client() as client:
        await bench.until(lambda: "model ready" in bench.log.getvalue())
        bench.messages()
        bench.next_settings = Settings(
            server=ServerSettings(port=1, socket=old.server.socket),
            log=LogSettings(level="debug"),
            models=new.models,
        )
        async with client.post("/admin/reload") as response:
            assert await response.json() == {
                "changes": [
                    "log.level has changed",
                    "server.port has changed and needs a restart",
                    "model b is new",
                    "model a is gone",
                ]
            }
        assert bench.messages()[:2] == ["RELOADING=1", "READY=1"]
        await bench.until(lambda: "b" in executors)
        await bench.until(lambda: executors["a"].closed)
        async with client.get("/v1/models") as response:
            assert [m["id"] for m in (await response.json())["data"]] == ["b"]


async def test_a_bad_file_changes_nothing(
    tmp_path: Path, executors: dict[str, FakeExecutor]
) -> None:
    async with running(tmp_path, settings_for(tmp_path, "a")) as bench, bench.client() as client:
        await bench.until(lambda: "model ready" in bench.log.getvalue())
        bench.next_settings = ConfigError("config.toml:3: unknown key server.prt")
        bench.messages()
        os.kill(os.getpid(), signal.SIGHUP)
        await bench.until(lambda: "reload refused" in bench.log.getvalue())
        assert bench.messages() == ["RELOADING=1", "READY=1"]
        async with client.post("/admin/reload") as response:
            assert response.status == 400
            assert "config.toml:3" in (await response.json())["error"]["message"]
        assert await _chat_status(client, "a") == 200


async def test_reload_reads_the_keys_again(
    tmp_path: Path, executors: dict[str, FakeExecutor]
) -> None:
    keys = tmp_path / "keys"
    keys.write_text("old-key\n")
    server = ServerSettings(port=0, socket=tmp_path / "q.sock", api_keys_file=keys)
    settings = Settings(server=server)
    async with running(tmp_path, settings) as bench:
        address = bench.log.getvalue().split("listening on ")[1].split(" and ")[0]

        async def status(key: str) -> int:
            headers = {"Authorization": f"Bearer {key}"}
            async with aiohttp.ClientSession(address, headers=headers) as client:
                async with client.get("/v1/models") as response:
                    return response.status

        assert (await status("old-key"), await status("new-key")) == (200, 401)
        keys.write_text("")
        with pytest.raises(ConfigError, match="holds no key"):
            bench.service.reload()
        assert await status("old-key") == 200
        keys.write_text("new-key\n")
        bench.service.reload()
        assert (await status("old-key"), await status("new-key")) == (401, 200)


def blocking(word: str, pattern: str = "x") -> SafetySettings:
    rules = RuleSettings(name="words", words=(word,), patterns=(pattern,))
    policy = PolicySettings(name="main", input={"words": "block"})
    return SafetySettings(rules={"words": rules}, policies={"main": policy})


async def test_reload_puts_policies_in_the_place_of_others(
    tmp_path: Path, executors: dict[str, FakeExecutor]
) -> None:
    settings = replace(settings_for(tmp_path, "a"), safety=blocking("hi"))
    async with running(tmp_path, settings) as bench, bench.client() as client:
        await bench.until(lambda: "model ready" in bench.log.getvalue())
        assert await _chat_status(client, "a") == 400
        bench.next_settings = replace(settings, safety=blocking("other", "(?=y)"))
        with pytest.raises(ConfigError, match=r"safety\.rules\.words\.patterns"):
            bench.service.reload()
        assert await _chat_status(client, "a") == 400, "all is as it was"
        bench.messages()
        bench.next_settings = replace(settings, safety=blocking("other"))
        async with client.post("/admin/reload") as response:
            assert await response.json() == {"changes": ["safety has changed"]}
        bench.messages()
        assert await _chat_status(client, "a") == 200
        bench.next_settings = settings_for(tmp_path, "a")
        bench.service.reload()
        assert await _chat_status(client, "a") == 200


async def test_a_model_that_fails_leaves_the_daemon_alive(
    tmp_path: Path, executors: dict[str, FakeExecutor]
) -> None:
    async with running(tmp_path, settings_for(tmp_path, "bad")) as bench, bench.client() as client:
        await bench.until(lambda: "model failed" in bench.log.getvalue())
        assert "STATUS=0 of 1 models in memory; failed: bad" in bench.messages()
        assert await _chat_status(client, "bad") == 503
        async with client.get("/health") as response:
            assert response.status == 200


async def test_an_address_in_use_is_an_error_that_leaves_nothing(
    tmp_path: Path, executors: dict[str, FakeExecutor]
) -> None:
    settings = settings_for(tmp_path, "a")
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(tmp_path / "q.sock"))
        other.listen()
        service = Service(settings, Environment(), lambda: settings, StringIO())
        with pytest.raises(ConfigError, match="another daemon listens there"):
            await service.run()
    assert not executors


async def test_an_open_address_is_warned_of(
    tmp_path: Path, executors: dict[str, FakeExecutor]
) -> None:
    for host, warned in (("0.0.0.0", True), ("127.0.0.1", False)):
        settings = Settings(server=ServerSettings(host=host, port=0))
        bench_folder = tmp_path / host
        bench_folder.mkdir()
        async with running(bench_folder, settings) as bench:
            assert ("everybody who can reach" in bench.log.getvalue()) == warned


def test_the_summary() -> None:
    assert summary([]) == "0 of 0 models in memory"

"""Workers that die, clients that leave, daemons that are told to stop."""

from __future__ import annotations

import asyncio
import json
import os
import random
import select
import signal
from collections.abc import Callable
from typing import Any

import aiohttp
from harness import START_SECONDS, Daemon

LONG = {
    "model": "demo",
    "messages": [{"role": "user", "content": "What can you do?"}],
    "max_tokens": 8000,
    "ignore_eos": True,
}
SHORT = LONG | {"max_tokens": 4}


async def stream(
    session: aiohttp.ClientSession,
    url: str,
    started: asyncio.Semaphore | None = None,
    max_tokens: int = 8000,
) -> dict[str, Any]:
    """Read one stream to its end; the last event that is JSON."""
    last: dict[str, Any] = {}
    body = LONG | {"stream": True, "max_tokens": max_tokens}
    async with session.post(f"{url}/v1/chat/completions", json=body) as response:
        async for line in response.content:
            if line.startswith(b"data: {"):
                last = json.loads(line[6:])
                if started is not None and last.get("choices"):
                    started.release()
                    started = None
    return last


def test_a_killed_worker_fails_its_streams_and_comes_back(serve: Callable[..., Daemon]) -> None:
    daemon = serve("demo", "--threads", "1")

    async def kill_in_the_middle() -> list[dict[str, Any]]:
        started = asyncio.Semaphore(0)
        async with aiohttp.ClientSession() as session:
            streams = [asyncio.create_task(stream(session, daemon.url, started)) for _ in range(8)]
            for _ in streams:
                await started.acquire()
            [worker] = daemon.workers()
            os.kill(worker, signal.SIGKILL)
            return await asyncio.gather(*streams)

    for last in asyncio.run(kill_in_the_middle()):
        assert "SIGKILL" in last["error"]["message"]
    # The next request waits for the model, which is loaded again.
    daemon.post("/v1/chat/completions", SHORT)
    daemon.wait_metric('quantd_kv_blocks{state="used"}', 0)
    assert daemon.metric("quantd_requests_running") == 0


def test_a_dead_daemon_takes_its_worker_along(serve: Callable[..., Daemon]) -> None:
    daemon = serve("demo", "--threads", "1")
    [worker] = daemon.workers()
    ended = os.pidfd_open(worker)
    daemon.process.kill()
    daemon.process.wait()
    assert select.select([ended], [], [], START_SECONDS)[0], "the worker outlives its daemon"
    os.close(ended)


async def _leave(session: aiohttp.ClientSession, url: str, rng: random.Random) -> None:
    """Ask, and hang up at a random moment: in the queue, in prefill, in decode."""
    body = LONG | {"stream": rng.random() < 0.5, "max_tokens": rng.choice([50, 4000])}
    if rng.random() < 0.3:
        body["messages"] = [{"role": "user", "content": "list " * rng.randrange(200, 1500)}]
    request = session.post(f"{url}/v1/chat/completions", json=body)
    try:
        async with asyncio.timeout(rng.choice([0.001, 0.01, 0.05, 0.2, 0.5])):
            async with request as response:
                await response.read()
    except TimeoutError:
        pass


def test_1000_clients_that_leave_lose_no_block_and_stall_nobody(
    serve: Callable[..., Daemon],
) -> None:
    daemon = serve("demo", "--threads", "1")
    daemon.post("/v1/chat/completions", SHORT)

    async def leave_all() -> dict[str, Any]:
        rng = random.Random(11)
        limit = asyncio.Semaphore(24)

        async def one(session: aiohttp.ClientSession) -> None:
            async with limit:
                await _leave(session, daemon.url, rng)

        tcp, unix = (
            aiohttp.TCPConnector(limit=0),
            aiohttp.UnixConnector(str(daemon.socket), limit=0),
        )
        async with (
            aiohttp.ClientSession(connector=tcp) as over_tcp,
            aiohttp.ClientSession(connector=unix) as over_unix,
        ):
            bystander = asyncio.create_task(stream(over_tcp, daemon.url, max_tokens=1000))
            async with asyncio.TaskGroup() as group:
                for number in range(1000):
                    group.create_task(one(over_unix if number % 2 else over_tcp))
            return await bystander

    last = asyncio.run(leave_all())
    assert last["choices"][0]["finish_reason"] == "length"
    for name in ("running", "waiting"):
        daemon.wait_metric(f"quantd_requests_{name}", 0)
    daemon.wait_metric('quantd_kv_blocks{state="used"}', 0)


def test_sigterm_lets_running_requests_finish(serve: Callable[..., Daemon]) -> None:
    daemon = serve("demo", "--threads", "1", "--drain-seconds", "240")

    async def terminate_in_the_middle() -> tuple[dict[str, Any], str]:
        started = asyncio.Semaphore(0)
        async with aiohttp.ClientSession() as session:
            running = asyncio.create_task(stream(session, daemon.url, started, 400))
            await started.acquire()
            daemon.process.send_signal(signal.SIGTERM)
            refused = "connected"
            async with asyncio.timeout(START_SECONDS):
                while refused == "connected":
                    try:
                        async with session.post(
                            f"{daemon.url}/v1/chat/completions", json=SHORT
                        ) as response:
                            if response.status == 503:
                                refused = (await response.json())["error"]["message"]
                    except aiohttp.ClientError:
                        refused = "no listener"
            return await running, refused

    last, refused = asyncio.run(terminate_in_the_middle())
    assert last["choices"][0]["finish_reason"] == "length"
    assert refused
    assert daemon.process.wait(START_SECONDS) == 0

"""What the daemon itself costs, with a worker that answers at once, and against a bare server.

    python benchmarks/overhead.py
    python benchmarks/overhead.py --json results/overhead.json

The daemon is its real parts (HTTP face, text, engine, scheduler, frames, a worker process); only
the worker does no work. The bare server is aiohttp on uvloop sending as many events of the same
bytes without making them: the floor for this stack. CPU is the daemon's process alone.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import multiprocessing
import os
import sys
import tempfile
import time
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import aiohttp
import machine
import shapes

WORKER = (sys.executable, "-P", str(Path(__file__).with_name("instant_worker.py")))


async def serve_quantd(model: Path, pipe: Connection, safety: Any = None) -> None:
    """safety: SafetySettings; None is no policy."""
    from quantd.daemon.config import (
        ModelSettings,
        SafetySettings,
        SchedulerSettings,
        ServerSettings,
        Settings,
    )
    from quantd.daemon.engine.executor import WorkerExecutor
    from quantd.daemon.fleet import Fleet
    from quantd.daemon.listeners import Faces, open_listeners
    from quantd.daemon.server.app import create_app, create_runner
    from quantd.daemon.server.state import State
    from quantd.daemon.telemetry.metrics import Metrics

    settings = Settings(
        server=ServerSettings(port=0, socket=None),
        scheduler=SchedulerSettings(max_running=64),
        models={"model": ModelSettings(name="model", path=model)},
        safety=safety or SafetySettings(),
    )
    metrics = Metrics()
    fleet = Fleet(settings, metrics, partial(WorkerExecutor.start, command=WORKER))
    state = State(settings, fleet, metrics)
    app = create_app(settings.server, fleet, metrics, state=state)
    listeners = open_listeners(settings.server)
    faces = Faces()
    await faces.add(create_runner(app), listeners)
    fleet.preload()
    pipe.send(listeners[0].address)
    await asyncio.get_running_loop().run_in_executor(None, pipe.recv)
    await fleet.close()
    await faces.close()


EVENT = (
    b'data: {"id":"chatcmpl-0123456789abcdef0123456789abcdef","object":"chat.completion.chunk",'
    b'"created":1700000000,"model":"model","choices":[{"index":0,"delta":{"content":" word1234"},'
    b'"logprobs":null,"finish_reason":null}]}\n\n'
)


async def _serve_bare(model: Path, pipe: Connection) -> None:
    from aiohttp import web

    async def stream(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for _ in range(body["max_tokens"]):
            await response.write(EVENT)
            await asyncio.sleep(0)
        await response.write(b"data: [DONE]\n\n")
        return response

    app = web.Application()
    app.router.add_post("/v1/chat/completions", stream)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    pipe.send(f"http://127.0.0.1:{runner.addresses[0][1]}")
    await asyncio.get_running_loop().run_in_executor(None, pipe.recv)
    await runner.cleanup()


def _run_server(serve: Any, model: Path, pipe: Connection) -> None:
    import uvloop

    uvloop.run(serve(model, pipe))


async def _read(session: aiohttp.ClientSession, url: str, tokens: int) -> tuple[int, int]:
    """Events and tokens of one stream."""
    body = {
        "model": "model",
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": tokens,
        "ignore_eos": True,
        "stream": True,
    }
    events = 0
    async with session.post(f"{url}/v1/chat/completions", json=body) as response:
        if response.status != 200:
            raise RuntimeError(await response.text())
        async for piece in response.content.iter_any():
            events += piece.count(b"data: {")
    return events, tokens


async def _load(url: str, streams: int, tokens: int) -> int:
    """All streams at once; the number of events that came."""
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=300)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        seen = await asyncio.gather(*(_read(session, url, tokens) for _ in range(streams)))
    return sum(events for events, _ in seen)


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(serve: Any, model: Path, streams: int, tokens: int) -> dict[str, float]:
    """One server in a process of its own, under `streams` streams of `tokens` tokens."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=_run_server, args=(serve, model, theirs)
    )
    process.start()
    assert process.pid is not None
    try:
        url = ours.recv()
        asyncio.run(_load(url, 2, 50))
        cpu, start = _cpu_seconds(process.pid), time.perf_counter()
        events = asyncio.run(_load(url, streams, tokens))
        wall = time.perf_counter() - start
        cpu = _cpu_seconds(process.pid) - cpu
        return {
            "cpu_us_per_token": 1e6 * cpu / (streams * tokens),
            "cpu_us_per_event": 1e6 * cpu / events,
            "tokens_per_s": streams * tokens / wall,
            "events": events,
        }
    finally:
        ours.send("stop")
        process.join(30)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=400, help="per stream")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    record: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "machine": machine.describe(),
    }
    print(machine.describe())
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder)
        shapes.write_tiny(model)
        for streams in (1, 16, 64, 500):
            tokens = arguments.tokens * (8 if streams == 1 else 1)
            row = {
                "quantd": measure(serve_quantd, model, streams, tokens),
                "bare": measure(_serve_bare, model, streams, tokens),
            }
            record[str(streams)] = row
            ours, bare = row["quantd"], row["bare"]
            print(
                f"{streams:4} streams: quantd {ours['cpu_us_per_token']:6.1f} µs CPU per token"
                f" ({ours['cpu_us_per_event']:.1f} per event, {ours['tokens_per_s']:.0f} tok/s),"
                f" bare aiohttp {bare['cpu_us_per_token']:6.1f} µs,"
                f" ratio {ours['cpu_us_per_token'] / bare['cpu_us_per_token']:.2f}",
                flush=True,
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()

"""What the daemon itself costs, with a worker that answers at once, and against a bare server.

    python benchmarks/overhead.py --json results/overhead.json
    python benchmarks/overhead.py --llama-server PATH --model FOLDER

The daemon is its real parts (HTTP face, text, engine, scheduler, frames, a worker process); only
the worker does no work. The bare server is aiohttp on uvloop sending as many events of the same
bytes without making them: the floor for this stack. CPU is the daemon's process alone.

With `--llama-server` a tiny model is served by that one and by quantd, each on one thread, and
nothing else is measured. There the model's own work is in the figure, all processes of a server
added up: what can be compared is the whole, not what either spends on serving.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import aiohttp
import machine
import peers
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
    from quantd.daemon.service import settle
    from quantd.daemon.telemetry.metrics import Metrics

    settings = Settings(
        server=ServerSettings(port=0, socket=None),
        scheduler=SchedulerSettings(max_running=1024),
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
    settle()
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


OnOpen = Callable[[], None]


async def _read(
    session: aiohttp.ClientSession, url: str, tokens: int, on_open: OnOpen
) -> tuple[int, int]:
    """Events and tokens of one stream; `on_open` at its first bytes."""
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
            if not events:
                on_open()
            events += piece.count(b"data: {")
    return events, tokens


async def _load(url: str, streams: int, tokens: int, on_all_open: OnOpen = lambda: None) -> int:
    """All streams at once; the number of events that came."""
    num_open = 0

    def on_open() -> None:
        nonlocal num_open
        num_open += 1
        if num_open == streams:
            on_all_open()

    async with _session() as session:
        seen = await asyncio.gather(*(_read(session, url, tokens, on_open) for _ in range(streams)))
    return sum(events for events, _ in seen)


async def _ask(url: str, requests: int, at_once: int) -> None:
    """Answers of one token in one piece, over connections that are kept."""
    body = {"model": "model", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 1}
    left = iter(range(requests))

    async def client(session: aiohttp.ClientSession) -> None:
        for _ in left:
            async with session.post(f"{url}/v1/chat/completions", json=body) as response:
                if response.status != 200:
                    raise RuntimeError(await response.text())
                await response.read()

    async with _session() as session:
        await asyncio.gather(*(client(session) for _ in range(at_once)))


def _session() -> aiohttp.ClientSession:
    connector = aiohttp.TCPConnector(limit=0)
    return aiohttp.ClientSession(
        connector=connector, timeout=aiohttp.ClientTimeout(total=300), read_bufsize=1 << 16
    )


def _cpu_seconds(*pids: int) -> float:
    """Of all threads that live."""
    files = [file for pid in pids for file in Path(f"/proc/{pid}/task").glob("*/schedstat")]
    return sum(int(file.read_text().split()[0]) for file in files) / 1e9


def _resident_kib(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


@contextmanager
def _running(serve: Any, model: Path) -> Iterator[tuple[str, int]]:
    """One server in a process of its own: its address and process id."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=_run_server, args=(serve, model, theirs)
    )
    process.start()
    assert process.pid is not None
    try:
        url = ours.recv()
        asyncio.run(_load(url, 2, 50))
        yield url, process.pid
    finally:
        ours.send("stop")
        process.join(30)


def measure(serve: Any, model: Path, streams: int, tokens: int) -> dict[str, float]:
    """Under `streams` streams of `tokens` tokens."""
    with _running(serve, model) as (url, pid):
        before, resident = _resident_kib(pid), 0

        def on_all_open() -> None:
            nonlocal resident
            resident = _resident_kib(pid)

        cpu, start = _cpu_seconds(pid), time.perf_counter()
        events = asyncio.run(_load(url, streams, tokens, on_all_open))
        wall = time.perf_counter() - start
        cpu = _cpu_seconds(pid) - cpu
    return {
        "cpu_us_per_token": round(1e6 * cpu / (streams * tokens), 2),
        "cpu_us_per_event": round(1e6 * cpu / events, 2),
        "tokens_per_s": round(streams * tokens / wall),
        "events": events,
        "kib_per_stream": round((resident - before) / streams, 1),
    }


def measure_answers(model: Path, requests: int, at_once: int) -> dict[str, float]:
    with _running(serve_quantd, model) as (url, pid):
        asyncio.run(_ask(url, 200, at_once))
        cpu, start = _cpu_seconds(pid), time.perf_counter()
        asyncio.run(_ask(url, requests, at_once))
        wall = time.perf_counter() - start
        cpu = _cpu_seconds(pid) - cpu
    return {
        "cpu_us_per_request": round(1e6 * cpu / requests, 1),
        "requests_per_s": round(requests / wall),
    }


def measure_whole(text: str, llama_server: str, streams: int, tokens: int) -> dict[str, float]:
    """A server with its model's work, on one thread."""
    peer = peers.parse(text, peers.Programs(threads=1, llama_server=llama_server))
    with peers.RunningPeer(peer) as running:
        asyncio.run(_load(running.url, streams, 20))
        pids = peers.tree(running.pid)
        cpu, start = _cpu_seconds(*pids), time.perf_counter()
        asyncio.run(_load(running.url, streams, tokens))
        wall = time.perf_counter() - start
        cpu = _cpu_seconds(*pids) - cpu
    return {
        "cpu_us_per_token": round(1e6 * cpu / (streams * tokens), 1),
        "tokens_per_s": round(streams * tokens / wall),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=200, help="per stream")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--llama-server", default="", help="its program")
    parser.add_argument("--model", help="a folder with the tiny model in both formats")
    arguments = parser.parse_args()
    record: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "machine": machine.describe(),
    }
    print(machine.describe())
    if arguments.llama_server:
        for engine in ("quantd", "llama.cpp"):
            for streams in (1, 16):
                row = measure_whole(
                    f"{engine}:{arguments.model}",
                    arguments.llama_server,
                    streams,
                    16 * arguments.tokens // streams,
                )
                print(f"{engine}, {streams} streams, with a tiny model: {row}", flush=True)
        return
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder)
        shapes.write_tiny(model)
        record["answers"] = answers = measure_answers(model, 3000, 64)
        print(
            f"answers of one token: {answers['cpu_us_per_request']:.0f} µs CPU each,"
            f" {answers['requests_per_s']} a second with one client process"
        )
        for streams in (1, 16, 256, 1000):
            tokens = arguments.tokens * max(1, 40 // streams)
            row = {
                "quantd": measure(serve_quantd, model, streams, tokens),
                "bare": measure(_serve_bare, model, streams, tokens),
            }
            record[str(streams)] = row
            ours, bare = row["quantd"], row["bare"]
            print(
                f"{streams:4} streams: quantd {ours['cpu_us_per_token']:6.1f} µs CPU per token"
                f" ({ours['cpu_us_per_event']:.1f} per event, {ours['tokens_per_s']:.0f} tok/s,"
                f" {ours['kib_per_stream']} KiB per stream),"
                f" bare aiohttp {bare['cpu_us_per_token']:6.1f} µs,"
                f" ratio {ours['cpu_us_per_token'] / bare['cpu_us_per_token']:.2f}",
                flush=True,
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()

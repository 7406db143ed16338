"""What a batch that never ends costs those who wait for an answer, and what it gets.

python benchmarks/beside_a_batch.py                 # the embedded model, 2 users, 30 s each way
python benchmarks/beside_a_batch.py --json results/beside_a_batch.json

Users ask one after another, streaming, without and with a batch that has more lines than can be
done. All times are the client's.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp
import machine

_ADDRESS = re.compile(rb"http://127\.0\.0\.1:(\d+)")
CHAT = "/v1/chat/completions"
LINES = 20_000
MESSAGES = [{"role": "user", "content": "Sort these numbers: 42, 7, 19, 88, 3"}]


def serve(folder: Path, arguments: list[str]) -> tuple[subprocess.Popen[bytes], str]:
    command = [sys.executable, "-m", "quantd.daemon", "serve", "--port", "0", *arguments]
    command += ["--socket", str(folder / "q.sock"), "--store-path", str(folder / "state")]
    log = folder / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out)
    while not (found := _ADDRESS.search(log.read_bytes())):
        if process.poll() is not None:
            raise RuntimeError(log.read_text())
        time.sleep(0.05)
    return process, f"http://127.0.0.1:{int(found[1])}"


async def user(session: aiohttp.ClientSession, until: float, waits: dict[str, list[float]]) -> None:
    """Asks until the time is over."""
    body = {"messages": MESSAGES, "stream": True, "max_tokens": 64, "ignore_eos": True}
    while time.monotonic() < until:
        last = time.monotonic()
        kind = "ttft"
        async with session.post(CHAT, json=body) as response:
            response.raise_for_status()
            async for line in response.content:
                if b'"content":"' not in line or b'"role"' in line:
                    continue
                now = time.monotonic()
                waits[kind].append(now - last)
                last, kind = now, "itl"


async def users(session: aiohttp.ClientSession, count: int, seconds: float) -> dict[str, Any]:
    waits: dict[str, list[float]] = {"ttft": [], "itl": []}
    until = time.monotonic() + seconds
    await asyncio.gather(*(user(session, until, waits) for _ in range(count)))
    return {kind: summary(values) for kind, values in waits.items()}


def summary(values: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(values, n=100)
    return {
        "count": len(values),
        "mean_ms": statistics.fmean(values) * 1e3,
        "p50_ms": cuts[49] * 1e3,
        "p95_ms": cuts[94] * 1e3,
        "p99_ms": cuts[98] * 1e3,
    }


async def begin_batch(session: aiohttp.ClientSession) -> str:
    body = {"model": None, "messages": MESSAGES, "max_tokens": 64, "ignore_eos": True}
    async with session.get("/v1/models") as response:
        body["model"] = (await response.json())["data"][0]["id"]
    lines = b"".join(
        json.dumps({"custom_id": str(n), "method": "POST", "url": CHAT, "body": body}).encode()
        + b"\n"
        for n in range(LINES)
    )
    form = aiohttp.FormData()
    form.add_field("purpose", "batch")
    form.add_field("file", lines, filename="in.jsonl")
    async with session.post("/v1/files", data=form) as response:
        file = (await response.json())["id"]
    fields = {"input_file_id": file, "endpoint": CHAT, "completion_window": "24h"}
    async with session.post("/v1/batches", json=fields) as response:
        id: str = (await response.json())["id"]
    while (await progress(session, id)) < 1:
        await asyncio.sleep(0.05)
    return id


async def progress(session: aiohttp.ClientSession, id: str) -> int:
    async with session.get(f"/v1/batches/{id}") as response:
        return int((await response.json())["request_counts"]["completed"])


async def measure(url: str, count: int, seconds: float) -> dict[str, Any]:
    async with aiohttp.ClientSession(url) as session:
        while (await session.get("/ready")).status != 200:
            await asyncio.sleep(0.1)
        await users(session, count, 3)
        record: dict[str, Any] = {"alone": await users(session, count, seconds)}
        id = await begin_batch(session)
        before, began = await progress(session, id), time.monotonic()
        record["beside a batch"] = await users(session, count, seconds)
        passed = time.monotonic() - began
        record["lines_per_s_beside_users"] = (await progress(session, id) - before) / passed
        before, began = await progress(session, id), time.monotonic()
        await asyncio.sleep(seconds / 3)
        passed = time.monotonic() - began
        record["lines_per_s_alone"] = (await progress(session, id) - before) / passed
        (await session.post(f"/v1/batches/{id}/cancel")).close()
    for kind in ("ttft", "itl"):
        for name in ("mean_ms", "p50_ms", "p95_ms", "p99_ms"):
            beside, alone = record["beside a batch"][kind][name], record["alone"][kind][name]
            record[f"{kind} {name} ratio"] = beside / alone
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--users", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--json", type=Path)
    parser.add_argument("model", nargs="*", default=["demo"], help="what `quantd serve` takes")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        process, url = serve(Path(folder), arguments.model)
        try:
            record = asyncio.run(measure(url, arguments.users, arguments.seconds))
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)
    print(json.dumps(record, indent=1))
    if arguments.json:
        about = {"date": datetime.date.today().isoformat(), "machine": machine.describe()}
        about |= {"users": arguments.users, "seconds": arguments.seconds}
        arguments.json.write_text(json.dumps(about | record, indent=1))


if __name__ == "__main__":
    main()

"""1,000 streams at once against the real daemon, over TCP and over the Unix socket."""

from __future__ import annotations

import asyncio
import json
import resource
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from harness import Daemon

STREAMS, TOKENS = 1000, 12


async def _read(session: aiohttp.ClientSession, url: str, number: int) -> tuple[str, list[int]]:
    """How it ended, and its tokens."""
    body = {
        "model": "demo",
        "prompt": [300 + number % 500, 20 + number // 500, 7],
        "max_tokens": TOKENS,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "return_token_ids": True,
    }
    tokens: list[int] = []
    reason = "none"
    async with session.post(f"{url}/v1/completions", json=body) as response:
        assert response.status == 200, await response.text()
        lines = [line async for line in response.content if line.startswith(b"data: ")]
    assert lines[-1] == b"data: [DONE]\n", "the stream is not whole"
    for line in lines[:-1]:
        (choice,) = json.loads(line[6:])["choices"]
        tokens += choice.get("token_ids") or []
        reason = choice["finish_reason"] or reason
    return reason, tokens


async def _all(url: str, socket: Path | None = None) -> list[tuple[str, list[int]]]:
    timeout = aiohttp.ClientTimeout(total=None)
    connector: aiohttp.BaseConnector = aiohttp.TCPConnector(limit=0)
    if socket is not None:
        connector = aiohttp.UnixConnector(str(socket), limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        return await asyncio.gather(*(_read(session, url, number) for number in range(STREAMS)))


def _resident_bytes(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def _open_files(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


@pytest.fixture
def many_files() -> Any:
    """For our own end of the connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 4 * STREAMS
    if hard != resource.RLIM_INFINITY and hard < wanted:
        pytest.skip(f"the hard limit of open files is {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_thousand_streams_all_end_and_leave_nothing(
    serve: Callable[..., Daemon], many_files: None
) -> None:
    """Also where the daemon is started with a usual soft limit of files, below their number."""
    daemon = serve(
        "demo", "--dtype", "float32", "--threads", "1", "--max-running", "1000", max_files=256
    )
    tcp = asyncio.run(_all(daemon.url))
    daemon.wait_requests(0)
    files = _open_files(daemon.process.pid)
    assert Counter(reason for reason, _ in tcp) == {"length": STREAMS}
    assert {len(tokens) for _, tokens in tcp} == {TOKENS}
    assert len({tuple(tokens) for _, tokens in tcp}) > 100, "each has its own answer"
    # A further thousand needs no more than those before have left behind. Where this process is
    # slow to read, one may find more on its way than those before did; a leak is one each time.
    for _ in range(3):
        memory = _resident_bytes(daemon.process.pid)
        unix = asyncio.run(_all("http://localhost", daemon.socket))
        assert unix == tcp, "none lost, none doubled, none in another's place"
        daemon.wait_requests(0)
        daemon.wait_metric('quantd_kv_blocks{state="used"}', 0)
        daemon.wait(lambda: _open_files(daemon.process.pid) <= files + 8)
        growth = _resident_bytes(daemon.process.pid) - memory
        if growth < 8 << 20:
            break
    assert growth < 8 << 20
    assert daemon.get("/admin/check", unix=True)[0] == 200

"""Batches over a scripted engine: files up, results down, and a clock that the test moves.

Import as `from batch_fakes import at_work` (pytest's `pythonpath` has `tests`).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
from server_fakes import FakeFleet, Served, serving

from quantd.daemon.config import SafetySettings, StoreSettings, WebhookSettings
from quantd.daemon.server.context import Clock

CHAT = "/v1/chat/completions"


class Time:
    """A clock whose sleeps end when the test moves it; short ones end at once."""

    def __init__(self) -> None:
        self.now = 1_700_000_000.0
        self.slept: list[float] = []
        self._moved = asyncio.Event()

    def move(self, seconds: float) -> None:
        self.now += seconds
        self._moved.set()
        self._moved = asyncio.Event()

    async def _sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        if seconds < 60:
            await asyncio.sleep(0)
            return
        until = self.now + seconds
        while self.now < until:
            await self._moved.wait()

    def clock(self) -> Clock:
        return Clock(wall=lambda: self.now, sleep=self._sleep)


@asynccontextmanager
async def at_work(
    folder: Path,
    time: Time | None = None,
    fleet: FakeFleet | None = None,
    webhooks: WebhookSettings | None = None,
    safety: SafetySettings | None = None,
    **fields: Any,
) -> AsyncIterator[Served]:
    """A server that keeps its state in `folder`; `fields` are of the store's settings."""
    settings = StoreSettings(path=folder / "state", **fields)
    clock = (time or Time()).clock()
    async with serving(
        store=settings, clock=clock, fleet=fleet, webhooks=webhooks, safety=safety
    ) as served:
        yield served


def line(custom_id: str = "a", **body: Any) -> dict[str, Any]:
    content = body.pop("content", custom_id)
    chat = {"model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": 8}
    return {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": chat | body}


async def upload(served: Served, lines: list[Any] | bytes, key: str = "") -> str:
    data = lines
    if not isinstance(data, bytes):
        data = b"".join(json.dumps(each).encode() + b"\n" for each in lines)
    form = aiohttp.FormData()
    form.add_field("purpose", "batch")
    form.add_field("file", data, filename="in.jsonl")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    async with served.session.post("/v1/files", data=form, headers=headers) as response:
        assert response.status == 200, await response.text()
        id: str = (await response.json())["id"]
        return id


async def create(served: Served, lines: list[Any] | bytes, **fields: Any) -> dict[str, Any]:
    body = {
        "input_file_id": await upload(served, lines),
        "endpoint": CHAT,
        "completion_window": "24h",
    }
    status, batch = await served.post("/v1/batches", body | fields)
    assert status == 200, batch
    made: dict[str, Any] = batch
    return made


async def wait(
    served: Served, batch: dict[str, Any], *until: str, condition: Callable[[Any], Any] = bool
) -> dict[str, Any]:
    """The batch once it has a status of `until` (default: an end)."""
    ends = until or ("completed", "failed", "expired", "cancelled")
    while True:
        status, batch = await served.get(f"/v1/batches/{batch['id']}")
        assert status == 200
        counts = batch["request_counts"]
        assert 0 <= counts["completed"] + counts["failed"] <= counts["total"]
        if batch["status"] in ends and condition(batch):
            return batch
        await asyncio.sleep(0.005)


async def contents(served: Served, id: str | None) -> dict[str, Any]:
    """A file of results by custom_id, each of which must be there once."""
    if id is None:
        return {}
    async with served.session.get(f"/v1/files/{id}/content") as response:
        lines = [json.loads(text) for text in (await response.text()).splitlines()]
    found = {each["custom_id"]: each for each in lines}
    assert len(found) == len(lines)
    return found

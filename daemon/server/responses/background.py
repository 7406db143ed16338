"""Responses that are made while nobody waits: asked for later, followed, or cancelled."""

from __future__ import annotations

import asyncio
import dataclasses
import re
from collections.abc import AsyncGenerator
from contextlib import aclosing

import msgspec
import structlog

from quantd.daemon.errors import QueueFull
from quantd.daemon.server.context import Clock
from quantd.daemon.server.responses.object import ResponseError, ResponseObject
from quantd.daemon.server.responses.run import Run
from quantd.daemon.server.responses.turns import Turns
from quantd.daemon.server.webhooks import Webhooks
from quantd.daemon.store import Store

_log = structlog.get_logger("quantd.responses")

_NUMBER = re.compile(rb'"sequence_number":(\d+)')
_OBJECT = msgspec.json.Decoder(ResponseObject)


def decode_object(body: bytes) -> ResponseObject:
    return _OBJECT.decode(body)


class _Running:
    """One response and its events so far; any number may follow."""

    def __init__(self, run: Run, is_streamed: bool) -> None:
        self.run = run
        self.is_streamed = is_streamed
        self.is_cancelled = False
        self.task: asyncio.Task[None] | None = None
        self._events: list[bytes] = []
        self._has_ended = False
        self._more = asyncio.Event()

    def add(self, data: bytes) -> None:
        if self.is_streamed:
            self._events += split(data)
            self._wake()

    def end(self) -> None:
        self._has_ended = True
        self._wake()

    def _wake(self) -> None:
        self._more.set()
        self._more = asyncio.Event()

    async def follow(self, after: int) -> AsyncGenerator[bytes, None]:
        """Events with a larger number than `after`, until the last."""
        index = 0
        while True:
            more = self._more
            while index < len(self._events):
                event = self._events[index]
                index += 1
                if number_of(event) > after:
                    yield event
            if self._has_ended:
                return
            await more.wait()


MAX_RUNNING = 1000
"""Each holds its body in memory, and waits for as long as it takes."""
_RETRY_SECONDS = 10.0


class Background:
    """Event loop only."""

    def __init__(self, store: Store, webhooks: Webhooks, clock: Clock) -> None:
        self._store = store
        self._webhooks = webhooks
        self._clock = clock
        self._running: dict[str, _Running] = {}
        self.queue = Turns()
        """By model: who is let in next where the model's own queue is full."""

    async def start(self, run: Run, is_streamed: bool) -> None:
        """Returns when it is in the store, as "queued". Raises QueueFull, and what `Run.queue`
        raises."""
        if len(self._running) >= MAX_RUNNING:
            raise QueueFull(
                f"{len(self._running)} responses are being made in the background; the limit is "
                f"{MAX_RUNNING}",
                retry_after=_RETRY_SECONDS,
            )
        running = _Running(run, is_streamed)
        running.add(await run.queue(is_streamed))
        self._running[run.response.id] = running
        running.task = asyncio.create_task(self._work(running))

    async def cancel(self, id: str) -> None:
        """Returns when it has ended; no effect on one that has."""
        running = self._running.get(id)
        if running is not None and running.task is not None:
            running.is_cancelled = True
            running.task.cancel()
            await asyncio.wait([running.task])

    def follow(self, id: str, after: int) -> AsyncGenerator[bytes, None] | None:
        """None: it is not running, or was not asked for as a stream."""
        running = self._running.get(id)
        return running.follow(after) if running is not None and running.is_streamed else None

    async def resume(self) -> None:
        """What a former process was making ends here: its tokens are gone."""
        now = int(self._clock.wall())
        for row in await self._store.responses.unfinished():
            if row.id in self._running:
                continue
            response = decode_object(row.body)
            response.status = "failed"
            message = "the daemon was stopped while it made this response"
            response.error = ResponseError("server_error", message)
            body = msgspec.json.encode(response)
            ended = dataclasses.replace(row, status="failed", body=body, used_at=now)
            event = self._webhooks.event("response.failed", row.id)
            await self._store.responses.finish(ended, [], [], None, event)

    async def stop(self) -> None:
        """They end as failed when the next process starts."""
        tasks = [running.task for running in self._running.values() if running.task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _work(self, running: _Running) -> None:
        run = running.run
        try:
            async with aclosing(run.events()) as events:
                async for data in events:
                    running.add(data)
        except asyncio.CancelledError:
            if not running.is_cancelled:
                raise
            running.add(await run.cancel())
        except Exception as error:  # the model's are events
            _log.error("a response is not kept", response=run.response.id, exc_info=error)
        finally:
            del self._running[run.response.id]
            running.end()


def number_of(event: bytes) -> int:
    found = _NUMBER.search(event)
    return int(found[1]) if found is not None else -1


def split(data: bytes) -> list[bytes]:
    """Whole events, one by one."""
    return [event + b"\n\n" for event in data.split(b"\n\n") if event]


def events_after(stream: bytes, after: int) -> bytes:
    """Of a whole stream, the events with a larger number."""
    return b"".join(event for event in split(stream) if number_of(event) > after)

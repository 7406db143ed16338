"""Runs batches: a task for each, and so many lines at once over all of them.

Everything that was done is in the store before it counts, so whatever ends the process, the next
one goes on where this one was: `resume`.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import msgspec
import structlog

from quantd.daemon.errors import (
    ModelRefused,
    QuantdError,
    QueueFull,
    StoreUnavailable,
    Unavailable,
)
from quantd.daemon.server.batches.endpoints import ENDPOINTS, Counts
from quantd.daemon.server.batches.input import BatchError, BatchErrors, Input, body_of, read_input
from quantd.daemon.server.context import Asker
from quantd.daemon.server.errors import ErrorBody, error_body, internal_error
from quantd.daemon.server.sse import one_line
from quantd.daemon.server.webhooks import Webhooks
from quantd.daemon.store import Batch, Line, Result, Store
from quantd.daemon.store.rows import new_id

_log = structlog.get_logger("quantd.batches")

Outcome = Literal["completed", "cancelled", "expired"]
_AHEAD = 64
"""Lines that are looked up at once."""
_ATTEMPTS = 6
"""Of a line whose model is not there just now."""
_MAX_DELAY = 60.0
_STORE_DELAY = 30.0
"""Seconds until a batch is tried again that the store failed."""
_UNRUN = {
    "cancelled": ("batch_cancelled", "the batch was cancelled before this request had run"),
    "expired": ("batch_expired", "the batch's time was over before this request had run"),
}


class LineResponse(msgspec.Struct):
    status_code: int
    request_id: str
    body: Any


class LineError(msgspec.Struct):
    code: str
    message: str


class LineReply(msgspec.Struct):
    """A line of the output or error file."""

    id: str
    custom_id: str
    response: LineResponse | None
    error: LineError | None


class BatchRunner:
    """Event loop only. `start` and `cancel` return at once."""

    def __init__(
        self,
        store: Store,
        webhooks: Webhooks,
        asker: Callable[[str], Asker],
        num_lines: int,
        line_bytes: int,
    ) -> None:
        """`asker`: on whose behalf a caller's lines run."""
        self._store = store
        self._webhooks = webhooks
        self._asker = asker
        self._line_bytes = line_bytes
        self._places = asyncio.Semaphore(num_lines)
        self._checking = asyncio.Semaphore(1)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._cancelled: dict[str, asyncio.Event] = {}
        self._stopped = False

    @property
    def num_running(self) -> int:
        """Batches that have not ended."""
        return len(self._tasks)

    def start(self, batch: Batch) -> None:
        if self._stopped:
            return  # the next process does, by `resume`
        self._cancelled[batch.id] = asyncio.Event()
        task = asyncio.create_task(self._keep_at(batch))
        self._tasks[batch.id] = task
        task.add_done_callback(lambda _: self._forget(batch.id))

    def cancel(self, batch: Batch) -> None:
        """It is "cancelling" in the store already."""
        event = self._cancelled.get(batch.id)
        if event is not None:
            event.set()

    async def resume(self) -> None:
        """Goes on with what a former process has left."""
        for batch in await self._store.batches.unfinished():
            if batch.id not in self._tasks:
                self.start(batch)

    async def stop(self) -> None:
        """Gives up the lines that run; they run again in the next process."""
        self._stopped = True
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _forget(self, id: str) -> None:
        del self._tasks[id], self._cancelled[id]

    # --- one batch ---------------------------------------------------------------------------

    async def _keep_at(self, batch: Batch) -> None:
        """Until it has ended: a disk that is full now may not be later."""
        asker = self._asker(batch.owner)
        while True:
            try:
                await self._run(batch, asker)
                return
            except Exception:
                _log.exception("a batch is held up and tried again", batch=batch.id)
            await asker.clock.sleep(_STORE_DELAY)

    async def _run(self, batch: Batch, asker: Asker) -> None:
        """From wherever it is to its end."""
        batch = await self._store.batches.get(batch.owner, batch.id)
        if batch.has_ended:
            return
        if batch.status == "validating":
            if not await self._check(batch, asker):
                return
            batch = await self._store.batches.get(batch.owner, batch.id)
        if batch.status in ("in_progress", "cancelling"):
            outcome = await self._run_lines(batch, asker)
            await self._finalize(batch, outcome, asker)
            batch = await self._store.batches.get(batch.owner, batch.id)
        assert batch.outcome is not None
        event = self._webhooks.event(f"batch.{batch.outcome}", batch.id)
        await self._store.batches.finish(batch, self._store.files, _now(asker), event)
        self._webhooks.wake()
        _log.info("a batch has ended", batch=batch.id, status=batch.outcome)

    async def _check(self, batch: Batch, asker: Asker) -> bool:
        """False: the batch has failed."""
        async with self._checking:
            found = await asyncio.to_thread(self._read, batch, asker)
        if not found.errors:
            await self._store.batches.begin(batch, found.lines, found.model, _now(asker))
            return True
        errors = msgspec.json.encode(BatchErrors(found.errors))
        event = self._webhooks.event("batch.failed", batch.id)
        await self._store.batches.refuse(batch, errors, _now(asker), event)
        self._webhooks.wake()
        # It may have been cancelled meanwhile, and then it has not failed.
        return (await self._store.batches.get(batch.owner, batch.id)).status == "cancelling"

    def _read(self, batch: Batch, asker: Asker) -> Input:
        path = self._store.files.folder / batch.input_file_id
        try:
            check_model = partial(ENDPOINTS[batch.endpoint].check_model, asker)
            return read_input(path, batch.endpoint, check_model, self._line_bytes)
        except OSError as error:
            reason = f"the input file cannot be read: {error.strerror}"
            return Input([], None, [BatchError("invalid_file", reason)])

    async def _run_lines(self, batch: Batch, asker: Asker) -> Outcome:
        """Until all have run, or the batch is cancelled, or its time is over."""
        if batch.status == "cancelling":
            return "cancelled"
        work = asyncio.create_task(self._feed(batch, asker))
        cancelled = asyncio.create_task(self._cancelled[batch.id].wait())
        over = asyncio.create_task(_until(asker, batch.expires_at))
        tasks: list[asyncio.Task[Any]] = [work, cancelled, over]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
                return "completed"
            return "cancelled" if cancelled.done() else "expired"
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    async def _feed(self, batch: Batch, asker: Asker) -> None:
        behind = 0
        async with asyncio.TaskGroup() as group:
            while lines := await self._store.batches.pending(batch, behind, _AHEAD):
                for line in lines:
                    await self._places.acquire()
                    task = group.create_task(self._run_line(batch, line, asker))
                    task.add_done_callback(lambda _: self._places.release())
                behind = lines[-1].number

    async def _finalize(self, batch: Batch, outcome: Outcome, asker: Asker) -> None:
        """Those that have not run get an answer that says so."""
        unrun: list[Result] = []
        behind = 0
        while lines := await self._store.batches.pending(batch, behind, 1000):
            code, message = _UNRUN[outcome]
            unrun += [_result(line, None, LineError(code, message), True) for line in lines]
            behind = lines[-1].number
        await self._store.batches.finalize(batch, outcome, unrun, _now(asker))

    # --- one line ----------------------------------------------------------------------------

    async def _run_line(self, batch: Batch, line: Line, asker: Asker) -> None:
        path = self._store.files.folder / batch.input_file_id
        for attempt in itertools.count(1):
            try:
                text = await asyncio.to_thread(_read_part, os.fspath(path), line)
                endpoint = ENDPOINTS[batch.endpoint]
                reply = await endpoint.answer(body_of(text), asker)
                counts = endpoint.counts(reply)
                result = _result(line, LineResponse(200, _request_id(), reply), None, False, counts)
                break
            except QuantdError as error:
                if attempt < _ATTEMPTS and _may_pass(error):
                    await asker.clock.sleep(_delay(error, attempt))
                    continue
                result = _failed(line, _request_id(), error)
                break
            except Exception as error:
                request_id = _request_id()
                _log.error("a line failed", batch=batch.id, request_id=request_id, exc_info=error)
                result = _failed(line, request_id, internal_error(request_id))
                break
        await self._store.batches.record(batch, result)


def _failed(line: Line, request_id: str, error: QuantdError) -> Result:
    body: ErrorBody = error_body(error)
    return _result(line, LineResponse(error.status, request_id, body), None, True)


def _result(
    line: Line,
    response: LineResponse | None,
    error: LineError | None,
    has_failed: bool,
    counts: Counts = Counts(0, 0, 0, 0),  # noqa: B008
) -> Result:
    reply = LineReply(new_id("batch_req_"), line.custom_id, response, error)
    return Result(line, one_line(msgspec.json.encode(reply)), has_failed, *counts)


def _may_pass(error: QuantdError) -> bool:
    """The model is being loaded again, or others are first."""
    if isinstance(error, ModelRefused | StoreUnavailable):
        return False
    return isinstance(error, QueueFull | Unavailable)


def _delay(error: QuantdError, attempt: int) -> float:
    wanted = 0.0 if error.retry_after is None else error.retry_after
    return min(_MAX_DELAY, max(wanted, 2.0 ** (attempt - 1)))


def _read_part(path: str, line: Line) -> bytes:
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.pread(handle, line.length, line.start)
    finally:
        os.close(handle)


def _request_id() -> str:
    return new_id("req_")


def _now(asker: Asker) -> int:
    return int(asker.clock.wall())


async def _until(asker: Asker, when: int) -> None:
    """In pieces: the clock may jump, and a machine may sleep."""
    while (left := when - asker.clock.wall()) > 0:
        await asker.clock.sleep(min(left, 60.0))

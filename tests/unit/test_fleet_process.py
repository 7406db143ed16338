"""The fleet over real processes: a worker that is killed in the middle of its work."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from fakes import make_request

from quantd.daemon.config import ModelSettings, Settings
from quantd.daemon.engine.executor import WorkerExecutor
from quantd.daemon.errors import ModelRefused
from quantd.daemon.fleet import Fleet, Lease, Timing
from quantd.daemon.telemetry.metrics import Metrics
from quantd.daemon.types import TokenEvent

FAKE_WORKER = (sys.executable, str(Path(__file__).parents[1] / "fixtures" / "fake_worker.py"))


async def at_once(seconds: float) -> None:
    """Backoff without the wait."""


def no_text(path: Path, max_context: int | None, tool_dialect: str = "auto") -> Any:
    return None


def fleet(mode: str) -> Fleet:
    """The mode of the fake worker is its model's path."""
    return Fleet(
        Settings(models={"m": ModelSettings(name="m", path=Path(mode))}),
        Metrics(),
        partial(WorkerExecutor.start, command=FAKE_WORKER),
        load_text=no_text,
        timing=Timing(sleep=at_once),
    )


async def last_event(lease: Lease, max_tokens: int) -> TokenEvent:
    stream = lease.engine.submit(make_request([1, 2, 3], max_tokens=max_tokens))
    return [event async for event in stream][-1]


async def test_kill_in_the_middle_of_eight_streams() -> None:
    models = fleet("ok")
    async with await models.lease("m") as lease:
        pid = models.models()[0].pid
        assert pid is not None
        streams = [lease.engine.submit(make_request([n], max_tokens=100)) for n in range(8)]
        await anext(streams[-1])
        os.kill(pid, signal.SIGKILL)
        for stream in streams:
            event = [event async for event in stream][-1]
            assert event.finish_reason == "error"
            assert event.error == "the worker of model 'm' was killed by signal 9 (SIGKILL)"
    async with await models.lease("m") as lease:
        assert (await last_event(lease, 5)).finish_reason == "length"
        assert models.models()[0].pid != pid
    await models.close()


async def test_a_refusal_reaches_the_request() -> None:
    models = fleet("refused")
    with pytest.raises(ModelRefused, match="could not be loaded: refused on purpose"):
        await models.lease("m")
    await models.close()


async def test_drain_and_close_end_the_process() -> None:
    models = fleet("ok")
    async with await models.lease("m") as lease:
        pid = models.models()[0].pid
        assert pid is not None
        running = asyncio.create_task(last_event(lease, 200))
        await asyncio.sleep(0)
        assert await models.drain(30)
        assert (await running).finish_reason == "length"
    await models.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)

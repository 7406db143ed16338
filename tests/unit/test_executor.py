"""The executor and its process: every way in which a worker can end has a reason and no leftovers.

Each test runs on both event loops, since they differ in how they treat pipes and children.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import uvloop
from fakes import model_info

from quantd.daemon.engine import executor as executor_module
from quantd.daemon.engine.executor import WorkerExecutor
from quantd.daemon.errors import ModelRefused, Unavailable
from quantd.daemon.types import (
    Chunk,
    DiskDone,
    DiskIndex,
    Grammar,
    LoadModel,
    LoadProgress,
    NewSequence,
    SamplingParams,
    StepPlan,
    TokenTable,
)

FAKE_WORKER = (sys.executable, str(Path(__file__).parents[1] / "fixtures" / "fake_worker.py"))

Run = Callable[[Coroutine[Any, Any, None]], None]


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    factory = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}[request.param]

    def run(main: Coroutine[Any, Any, None]) -> None:
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(main)

    return run


async def start(mode: str, progress: list[LoadProgress] | None = None) -> WorkerExecutor:
    sink = progress if progress is not None else []
    return await WorkerExecutor.start(LoadModel("m", mode), sink.append, FAKE_WORKER)


def first_step() -> StepPlan:
    new = NewSequence(1, (5, 6), 2, SamplingParams(max_tokens=9))
    return StepPlan(0, (Chunk(1, 0, 2, (0,), True),), add=(new,))


def decode(step: int) -> StepPlan:
    return StepPlan(step, (Chunk(1, 1 + step, 2 + step, (), True),))


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def open_fds() -> set[str]:
    """Descriptors with what they point to. Not /dev/null: libuv opens one for its own use."""
    links = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            links.add(f"{fd} {os.readlink(f'/proc/self/fd/{fd}')}")
        except FileNotFoundError:  # the listing's own
            continue
    return {link for link in links if not link.endswith("/dev/null")}


async def closed_all_but(before: set[str]) -> None:
    """Until nothing is open that was not before: pipes close in the loop's next turns."""
    async with asyncio.timeout(60):
        while not open_fds() <= before:
            await asyncio.sleep(0.001)


def test_loads_and_answers_in_order(run: Run) -> None:
    async def main() -> None:
        progress: list[LoadProgress] = []
        executor = await start("ok", progress)
        assert progress == [LoadProgress("importing", 0, 0), LoadProgress("weights", 1, 4)]
        assert executor.info == model_info()
        assert os.getpgid(executor.pid) == executor.pid
        results = await asyncio.gather(
            executor.execute(first_step()), executor.execute(decode(1)), executor.execute(decode(2))
        )
        assert [result.step for result in results] == [0, 1, 2]
        assert all(len(result.sampled) == 1 for result in results)
        assert (await executor.execute(StepPlan(3, ()))).sampled == ()
        pid = executor.pid
        await executor.close()
        assert executor.died.result() == "model 'm' was unloaded"
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
        with pytest.raises(Unavailable, match="model 'm' was unloaded"):
            executor.execute(StepPlan(4, ()))
        await executor.close()

    run(main())


def test_the_disk_s_news_reach_whoever_listens_also_those_that_came_before(run: Run) -> None:
    async def main() -> None:
        executor = await start("disk")
        await executor.execute(first_step())  # whatever it has said is here by now
        news: list[DiskDone | DiskIndex] = []
        executor.on_disk = news.append
        assert news == [DiskIndex((b"a" * 32,), 64)] and executor.on_disk is not None
        executor.release_memory([])
        executor.release_memory([(2, 5), (7, 8)])
        await executor.execute(decode(1))
        assert news[1:] == [DiskDone("write", b"((2, 5), (7, 8))")]
        executor.on_disk = news.append
        assert len(news) == 2, "once"
        await executor.close()
        executor.release_memory([(1, 2)])  # no effect

    run(main())


def test_grammars_are_answered_each_by_its_number(run: Run) -> None:
    async def main() -> None:
        executor = await start("ok")
        executor.set_tokens(TokenTable((b"a",), (), ()))
        good, bad, step, left = (
            executor.compile(Grammar("regex", "good")),
            executor.compile(Grammar("regex", "bad")),
            executor.execute(first_step()),
            executor.compile(Grammar("regex", "good")),
        )
        left.cancel()  # its caller has left: the answer is for nobody
        assert await asyncio.gather(good, bad) == [None, "it is none"]
        assert (await step).step == 0
        await executor.close()
        with pytest.raises(Unavailable):
            executor.compile(Grammar("regex", "good"))
        executor.set_tokens(TokenTable((b"a",), (), ()))  # no effect

    run(main())


def test_a_worker_that_ends_leaves_no_grammar_waiting(run: Run) -> None:
    async def main() -> None:
        executor = await start("ok")
        os.kill(executor.pid, signal.SIGSTOP)
        waiting = executor.compile(Grammar("regex", "good"))
        os.kill(executor.pid, signal.SIGKILL)
        with pytest.raises(Unavailable, match="killed"):
            await waiting
        await executor.close()

    run(main())


@pytest.mark.parametrize(
    ("mode", "error", "message"),
    [
        ("refused", ModelRefused, "model 'm' could not be loaded: refused on purpose"),
        ("broken", Unavailable, "model 'm' could not be loaded: broken on purpose"),
        (
            "exits",
            Unavailable,
            "the worker of model 'm' exited with status 3; its last line was: out of luck",
        ),
    ],
)
def test_a_failed_load_says_why(run: Run, mode: str, error: type, message: str) -> None:
    async def main() -> None:
        before = open_fds()
        with pytest.raises(Unavailable) as raised:
            await start(mode)
        assert type(raised.value) is error
        assert str(raised.value) == message
        await closed_all_but(before)

    run(main())


def test_a_command_that_is_not_there(run: Run) -> None:
    async def main() -> None:
        before = open_fds()
        with pytest.raises(Unavailable, match="could not be started: .*No such file"):
            await WorkerExecutor.start(LoadModel("m", "ok"), print, ["/no/such/program"])
        await closed_all_but(before)

    run(main())


def test_kill_fails_all_that_is_outstanding(run: Run) -> None:
    async def main() -> None:
        executor = await start("garbage")  # never answers, since it is stopped below
        os.kill(executor.pid, signal.SIGSTOP)
        steps = [executor.execute(first_step()), executor.execute(decode(1))]
        os.kill(executor.pid, signal.SIGKILL)
        reason = "the worker of model 'm' was killed by signal 9 (SIGKILL)"
        for step in steps:
            with pytest.raises(Unavailable) as raised:
                await step
            assert str(raised.value) == reason
        assert await executor.died == reason
        with pytest.raises(Unavailable, match="SIGKILL"):
            executor.execute(decode(2))
        await executor.close()

    run(main())


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("garbage", "broke the protocol: not a frame"),
        ("wrong-step", "broke the protocol: the result of step 1 came for step 0"),
    ],
)
def test_garbage_ends_the_worker(run: Run, mode: str, message: str) -> None:
    async def main() -> None:
        executor = await start(mode)
        with pytest.raises(Unavailable, match=message):
            await executor.execute(first_step())
        assert message in await executor.died
        assert not is_alive(executor.pid)

    run(main())


def test_a_cancelled_load_leaves_nothing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        before = open_fds()
        pids: list[int] = []
        popen = subprocess.Popen

        def recording(*args: Any, **kwargs: Any) -> Any:
            child = popen(*args, **kwargs)
            pids.append(child.pid)
            return child

        monkeypatch.setattr(subprocess, "Popen", recording)
        progressed = asyncio.Event()
        load = asyncio.create_task(
            WorkerExecutor.start(LoadModel("m", "slow"), lambda _: progressed.set(), FAKE_WORKER)
        )
        await progressed.wait()
        load.cancel()
        with pytest.raises(asyncio.CancelledError):
            await load
        with pytest.raises(ProcessLookupError):
            os.kill(pids[0], 0)
        await closed_all_but(before)

    run(main())


@pytest.mark.parametrize("turns", range(6))
def test_a_load_that_is_cancelled_at_once_is_cancelled(run: Run, turns: int) -> None:
    """Also between two steps of starting the process, where each loop closes what it has opened."""

    async def main() -> None:
        load = asyncio.create_task(start("slow"))
        for _ in range(turns):
            await asyncio.sleep(0)
        load.cancel()
        with pytest.raises(asyncio.CancelledError):
            await load

    run(main())


def test_a_worker_that_ignores_the_close_is_killed(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executor_module, "_EXIT_SECONDS", 0.01)

    async def main() -> None:
        executor = await start("stubborn")
        step = executor.execute(first_step())
        await executor.close()
        with pytest.raises(Unavailable, match="was unloaded"):
            await step
        assert not is_alive(executor.pid)

    run(main())


def test_output_becomes_lines(run: Run) -> None:
    async def main() -> None:
        executor = await start("noisy")
        await executor.close()
        lines = executor._process.last_lines
        assert max(len(line) for line in lines) <= 4096
        assert "".join(lines) == "a" * 10_000 + r" b'\xff\xfe'" + "half a line \ufffd"

    run(main())


def test_no_descriptor_is_left_after_many_workers(run: Run) -> None:
    async def main() -> None:
        before = open_fds()
        for _ in range(3):
            executor = await start("ok")
            os.kill(executor.pid, signal.SIGKILL)
            await executor.died
        await closed_all_but(before)

    run(main())

"""The step loop: what callers get, and that nothing is left behind however they leave."""

from __future__ import annotations

import asyncio
import gc
import random
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest
from fakes import FakeExecutor, ManualClock, hashed_token, make_request, make_tables
from msgspec.structs import replace

from quantd.daemon.config import SchedulerSettings
from quantd.daemon.engine.engine import Engine
from quantd.daemon.engine.stream import TokenStream
from quantd.daemon.errors import ContextLengthExceeded, QueueFull, RequestError, Unavailable
from quantd.daemon.kv.disk import DiskIndex
from quantd.daemon.scheduler.scheduler import Scheduler
from quantd.daemon.telemetry.metrics import EngineMetrics
from quantd.daemon.types import DiskIndex as Listing
from quantd.daemon.types import Pooling, SamplingParams, StepPlan, StepResult, TokenEvent


class Bench:
    """An engine over a fake worker, with all that it is made of at hand."""

    def __init__(self, **settings: int) -> None:
        self.clock = ManualClock(100.0)
        self.executor = FakeExecutor()
        self.scheduler = Scheduler(
            make_tables(self.executor.info.num_blocks),
            SchedulerSettings(**settings),  # type: ignore[arg-type]
            self.executor.info.max_context,
        )
        self.metrics = EngineMetrics()
        self.engine = Engine(
            self.executor, self.executor.info, self.scheduler, self.metrics, self.clock
        )
        self.task = asyncio.create_task(self.engine.run())

    def submit(self, prompt: Sequence[int] = (1, 2, 3), max_tokens: int = 8) -> TokenStream:
        return self.engine.submit(make_request(prompt, max_tokens=max_tokens, arrival=self.clock()))

    def check_baseline(self) -> None:
        """No request and no block is in use."""
        self.scheduler.check()
        stats = self.engine.stats()
        assert self.engine.num_active == stats.running == stats.waiting == stats.kv.used == 0
        assert stats.kv.free + stats.kv.cached == self.executor.info.num_blocks


@asynccontextmanager
async def bench(**settings: int) -> AsyncIterator[Bench]:
    bench = Bench(**settings)
    try:
        yield bench
    finally:
        await bench.engine.close()
        await bench.task


async def settle() -> None:
    """Lets everything that can run without the outside world run."""
    for _ in range(20):
        await asyncio.sleep(0)


async def drop_finished(bench: Bench) -> None:
    """A last request, with whose plan the worker hears of what was dropped before."""
    await whole(bench.submit([9], max_tokens=1))


async def whole(stream: TokenStream) -> TokenEvent:
    """All events of a stream as one."""
    events = [event async for event in stream]
    return TokenEvent(
        tokens=tuple(token for event in events for token in event.tokens),
        finish_reason=events[-1].finish_reason,
        error=events[-1].error,
    )


def expected(prompt: Sequence[int], num_tokens: int) -> tuple[int, ...]:
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(hashed_token(tokens, SamplingParams(max_tokens=1)))
    return tuple(tokens[len(prompt) :])


async def test_requests_get_their_own_tokens() -> None:
    async with bench() as b:
        prompts = [[n, 2 * n, 7] for n in range(10)]
        results = await asyncio.gather(*(whole(b.submit(prompt)) for prompt in prompts))
        for prompt, result in zip(prompts, results, strict=True):
            assert result == TokenEvent(expected(prompt, 8), finish_reason="length")
        b.check_baseline()
        assert b.engine.stats().finished == 10
        assert b.engine.stats().steps == len(b.executor.plans)
        assert b.engine.stats().generated_tokens == 80


async def test_it_sleeps_when_there_is_nothing_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[float] = []
    plan = Scheduler.plan

    def counted(self: Scheduler, now: float) -> StepPlan | None:
        looked.append(now)
        return plan(self, now)

    monkeypatch.setattr(Scheduler, "plan", counted)
    async with bench() as b:
        await whole(b.submit())
        num_plans = len(b.executor.plans)
        await settle()
        num_looked = len(looked)
        await settle()
        assert (len(b.executor.plans), len(looked)) == (num_plans, num_looked)
        await whole(b.submit())
        assert len(b.executor.plans) > num_plans


async def test_at_rest_it_counts_what_is_in_use() -> None:
    async with bench() as b:
        await whole(b.submit())
        b.scheduler.kv.pool.allocate(1)
        b.engine.shrink()
        assert "a block is used by no sequence" in await b.task
        with pytest.raises(Unavailable, match="internal error in the step loop"):
            b.submit()


async def test_the_next_step_is_on_its_way_before_tokens_are_read() -> None:
    async with bench() as b:
        stream = b.submit(max_tokens=3)
        await anext(stream)
        assert len(b.executor.plans) == 3  # the next one, and the one that is planned ahead


async def test_what_never_fits_is_refused() -> None:
    async with bench(max_waiting=2) as b:
        with pytest.raises(ContextLengthExceeded):
            b.submit([1] * 500, max_tokens=100)
        with pytest.raises(RequestError):
            b.submit([])
        b.executor.pause()
        streams = [b.submit(), b.submit()]
        with pytest.raises(QueueFull):
            b.submit()
        b.executor.resume()
        assert [(await whole(stream)).finish_reason for stream in streams] == ["length"] * 2
        b.check_baseline()


async def test_a_slow_reader_holds_up_nobody() -> None:
    async with bench() as b:
        slow = b.submit([1, 2], max_tokens=200)
        quick = await whole(b.submit([3, 4], max_tokens=200))
        assert quick.tokens == expected([3, 4], 200)
        b.check_baseline()
        events = [event async for event in slow]
        assert events == [TokenEvent(expected([1, 2], 200), finish_reason="length")]


async def test_abort_frees_at_once_and_ends_the_stream() -> None:
    async with bench() as b:
        stream, other = b.submit(max_tokens=100), b.submit([5, 6], max_tokens=20)
        await anext(stream)
        stream.abort()
        stream.abort()
        assert b.engine.num_active == 1
        assert (await whole(stream)).finish_reason == "abort"
        assert (await whole(other)).tokens == expected([5, 6], 20)
        b.check_baseline()
        assert b.metrics.finished == {"abort": 1, "length": 1}
        await drop_finished(b)
        assert len(b.executor.worker.rows) <= 1


async def test_a_stop_in_the_text_frees_at_once_and_counts_as_finished() -> None:
    async with bench() as b:
        stream = b.submit(max_tokens=100)
        await anext(stream)
        stream.stop()
        assert (await whole(stream)).finish_reason == "stop"
        b.check_baseline()
        assert b.metrics.finished == {"stop": 1}
        assert b.engine.stats().finished == 1


async def test_abort_while_a_step_is_in_flight() -> None:
    async with bench() as b:
        b.executor.pause()
        stream = b.submit()
        await settle()
        assert len(b.executor.plans) == 2
        await stream.aclose()
        assert b.engine.stats().kv.used == 0
        b.executor.resume()
        assert await whole(stream) == TokenEvent(finish_reason="abort")
        b.check_baseline()


async def test_a_thousand_aborts_at_random_moments_leave_nothing() -> None:
    rng = random.Random(7)

    async def client(b: Bench) -> None:
        prompt = [rng.randrange(256) for _ in range(rng.randint(1, 100))]
        try:
            stream = b.submit(prompt, max_tokens=rng.randint(1, 60))
        except QueueFull:
            return
        for _ in range(rng.randint(0, 6)):
            if rng.random() < 0.3:
                await asyncio.sleep(0)
            elif not stream.is_finished:
                await anext(stream)
        stream.abort()

    async with bench(max_waiting=64, max_running=8, token_budget=64) as b:
        for _ in range(50):
            survivor = b.submit([3, 1, 4], max_tokens=30)
            await asyncio.gather(*(client(b) for _ in range(20)))
            assert (await whole(survivor)).tokens == expected([3, 1, 4], 30)
            b.check_baseline()
        assert sum(b.metrics.finished.values()) > 1000
        await drop_finished(b)
        assert len(b.executor.worker.rows) <= 1


async def test_the_workers_death_ends_every_stream_with_the_reason() -> None:
    async with bench() as b:
        streams = [b.submit([n], max_tokens=100) for n in range(8)]
        await anext(streams[0])
        b.executor.die("killed by signal 9 (SIGKILL)")
        for stream in streams:
            result = await whole(stream)
            assert result.finish_reason == "error"
            assert result.error == "killed by signal 9 (SIGKILL)"
        await b.task
        with pytest.raises(Unavailable, match="SIGKILL"):
            b.submit()
        b.check_baseline()


async def test_the_workers_death_with_two_plans_in_flight_is_one_error() -> None:
    """The second plan's is nobody's to await, and is not complained of for that."""
    complaints: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    async with bench(max_running=1) as b:
        b.executor.pause()
        streams = [b.submit([n], max_tokens=100) for n in range(3)]  # two of them wait
        await settle()
        assert len(b.executor.plans) == 2
        b.executor.die("killed")
        assert [(await whole(stream)).error for stream in streams] == ["killed"] * 3
        assert await b.task == "killed"
        b.check_baseline()
        await settle()
        b.executor._last = None
        gc.collect()
        await settle()
    assert complaints == []


async def test_death_while_idle_is_noticed() -> None:
    async with bench() as b:
        await settle()
        b.executor.die("killed")
        await b.task
        with pytest.raises(Unavailable, match="killed"):
            b.submit()


async def test_an_error_of_one_sequence_leaves_the_others() -> None:
    async with bench() as b:
        bad, good = b.submit([1], max_tokens=50), b.submit([2], max_tokens=50)
        await anext(bad)
        b.executor.worker.errors[1] = "the logits were not finite"
        result = await whole(bad)
        assert (result.finish_reason, result.error) == ("error", "the logits were not finite")
        assert (await whole(good)).tokens == expected([2], 50)
        b.check_baseline()


async def test_a_bug_of_ours_ends_the_engine_and_not_the_daemon() -> None:
    async with bench() as b:
        b.executor.worker.next_token = lambda tokens, sampling: 1 // 0
        result = await whole(b.submit())
        assert result.error == (
            "internal error in the step loop: ZeroDivisionError: integer division or modulo by zero"
        )
        await b.task
        b.check_baseline()


async def test_drain_lets_requests_finish() -> None:
    async with bench() as b:
        stream = b.submit(max_tokens=30)
        b.executor.pause()
        drained = asyncio.create_task(b.engine.drain(60))
        await settle()
        with pytest.raises(Unavailable, match="shutting down"):
            b.submit()
        assert not drained.done() and not b.engine.has_ended
        b.executor.resume()
        assert (await whole(stream)).finish_reason == "length"
        assert await drained is True
        b.check_baseline()


async def test_drain_ends_what_is_left_at_the_deadline() -> None:
    async with bench() as b:
        b.executor.pause()
        stream = b.submit()
        await settle()
        assert await b.engine.drain(0) is False
        assert b.engine.has_ended
        result = await whole(stream)
        assert (result.finish_reason, result.error) == ("error", "shutting down")
        b.executor.resume()
        await b.task
        b.check_baseline()


async def test_an_engine_at_rest_is_drained_at_once() -> None:
    async with bench() as b:
        assert await b.engine.drain(0) is True
        with pytest.raises(Unavailable, match="shutting down"):
            b.submit()


async def test_a_loop_that_is_cancelled_ends_its_requests() -> None:
    async with bench() as b:
        stream = b.submit(max_tokens=100)
        await anext(stream)
        b.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await b.task
        assert (await whole(stream)).error == "the engine was stopped"
        b.check_baseline()
        b.task = asyncio.create_task(b.engine.run())
        assert await b.task == "the engine was stopped"


async def test_close_ends_requests_and_the_worker() -> None:
    async with bench() as b:
        stream = b.submit(max_tokens=100)
        await anext(stream)
        await b.engine.close()
        await b.engine.close()
        assert (await whole(stream)).error == "the model was unloaded"
        await b.task
        assert b.executor.closed


async def test_measures_by_the_clock() -> None:
    async with bench() as b:
        b.executor.pause()
        stream = b.submit([1, 2, 3], max_tokens=3)
        b.clock.advance(0.5)
        await settle()
        b.clock.advance(1.0)
        b.executor.resume()
        await anext(stream)
        b.executor.pause()
        await settle()
        b.clock.advance(0.25)
        b.executor.resume()
        await whole(stream)
        metrics = b.metrics
        assert metrics.queue.sum == 0.5
        assert metrics.ttft.sum == 1.5
        assert metrics.itl.sum == 0.25
        assert (metrics.prompt_tokens, metrics.generated_tokens) == (3, 3)
        assert (metrics.steps, metrics.step_tokens) == (3, 3 + 1 + 1)
        assert metrics.finished == {"length": 1}
        assert (stream.started_at, stream.first_token_at) == (100.5, 101.5)


async def test_what_was_cached_is_told_and_counted() -> None:
    async with bench() as b:
        for n, num_cached in ((40, 0), (45, 32), (60, 32)):
            stream = b.submit(range(n), max_tokens=2)
            assert {event.num_cached_tokens async for event in stream} == {num_cached}
        stats = b.engine.stats()
        assert (stats.prompt_tokens, stats.cached_tokens, stats.generated_tokens) == (145, 64, 6)
        assert (b.metrics.prompt_tokens, b.metrics.cached_tokens) == (145, 64)


class MaskExecutor(FakeExecutor):
    """Every second step has masks."""

    async def _run(self, plan: StepPlan, before: asyncio.Future[StepResult] | None) -> StepResult:
        result = await super()._run(plan, before)
        number = 3 * (plan.step % 2)
        return replace(result, num_masks=number, mask_seconds=0.5 * number, mask_wait_seconds=0.25)


async def test_masks_are_counted() -> None:
    executor = MaskExecutor()
    scheduler = Scheduler(make_tables(64), SchedulerSettings(), executor.info.max_context)
    metrics = EngineMetrics()
    engine = Engine(executor, executor.info, scheduler, metrics, ManualClock())
    running = asyncio.create_task(engine.run())
    await whole(engine.submit(make_request([1], max_tokens=4)))
    assert (metrics.masks, metrics.mask_seconds, metrics.mask_wait_seconds) == (6, 3.0, 0.5)
    await engine.close()
    await running


async def test_what_is_counted_goes_on_when_the_model_is_loaded_again() -> None:
    """Prometheus' counters never go back: also preemptions and moved bytes, which an engine counts
    from its own start."""
    metrics = EngineMetrics()
    seen: list[tuple[int, int, int]] = []
    for _ in range(2):
        executor = FakeExecutor(num_blocks=6)
        tables = make_tables(6, num_places=8)
        scheduler = Scheduler(tables, SchedulerSettings(), executor.info.max_context)
        engine = Engine(executor, executor.info, scheduler, metrics, ManualClock(1.0))
        task = asyncio.create_task(engine.run())
        streams = [engine.submit(make_request([i] * 30, max_tokens=40)) for i in range(2)]
        await asyncio.gather(*(whole(stream) for stream in streams))
        assert scheduler.preemptions["memory"] > 0 and tables.kv.num_moved["out", "host"] > 0
        before = metrics.preempted.get("memory", 0)
        engine.stats()
        engine.stats()  # a second look counts nothing twice
        assert metrics.preempted["memory"] == before + scheduler.preemptions["memory"]
        scheduler._num_preemptions["priority"] += 3  # after the last look
        await engine.close()
        await task
        moved = tables.kv.num_moved["out", "host"] * executor.info.block_bytes
        seen.append((metrics.preempted["priority"], metrics.moved_bytes["out", "host"], moved))
        assert metrics.returned["copy"] + metrics.returned["compute"] > 0
    assert [priority for priority, _, _ in seen] == [3, 6]
    assert seen[1][1] == seen[0][2] + seen[1][2] > seen[0][1] > 0


async def test_a_timeout_takes_no_token_back() -> None:
    """The last step's tokens and the end by time come in one turn of the loop."""
    async with bench() as b:
        b.executor.pause()
        request = make_request([1, 2, 3], max_tokens=50, arrival=100.0, deadline=105.0)
        stream = b.engine.submit(request)
        await settle()
        b.clock.advance(6.0)
        b.executor.resume()
        result = await whole(stream)
        assert (result.tokens, result.finish_reason) == (expected([1, 2, 3], 1), "timeout")
        assert result.error == "the timeout of 5 s is over: 1 of at most 50 tokens were made"
        b.check_baseline()
        assert b.metrics.finished == {"timeout": 1}
        assert b.engine.stats().finished == 0


async def test_the_requests_that_there_are() -> None:
    async with bench(max_running=1, token_budget=16) as b:
        assert b.engine.requests() == []
        b.executor.pause()
        first, _ = b.submit(range(40), max_tokens=9), b.submit([4, 5], max_tokens=3)
        await settle()
        b.clock.advance(2.0)
        one, two = b.engine.requests()
        assert (one.phase, one.prompt_tokens, one.max_tokens, one.blocks) == ("prefill", 40, 9, 2)
        assert (one.age, one.queue_seconds, one.computed_tokens, one.output_tokens) == (2, 0, 0, 0)
        assert (two.phase, two.age, two.queue_seconds, two.blocks) == ("waiting", 2, None, 0)
        b.executor.resume()
        await anext(first)
        b.executor.pause()
        one, _ = b.engine.requests()
        assert (one.phase, one.output_tokens, one.computed_tokens) == ("decode", 1, 40)
        assert b.engine.stats().running == b.engine.stats().waiting == 1
        b.executor.resume()


# --- memory at rest ---------------------------------------------------------------------------


async def test_a_smaller_budget_and_shrinking_give_memory_back() -> None:
    async with bench() as b:
        await whole(b.submit(range(100), max_tokens=1))
        block = b.executor.info.block_bytes
        assert b.engine.resize(7 * block + 1) == 7 * block
        assert (b.engine.info.num_blocks, b.scheduler.kv.pool.limit) == (7, 7)
        await settle()
        assert b.executor.released == [[(6, 7)]]  # six are cached
        b.engine.shrink()
        await settle()
        assert b.executor.released[1:] == [[(0, 7)]]
        for wrong in (0, block - 1, 65 * block):
            with pytest.raises(RequestError, match=f"must be between {block} .* and {64 * block}"):
                b.engine.resize(wrong)
        assert b.engine.resize(65 * block - 1) == 64 * block
        b.engine.resize(7 * block)
        with pytest.raises(RequestError, match="there are 7 in all"):
            b.submit(range(110), max_tokens=8)
        b.executor.pause()
        large, small = b.submit(range(100), max_tokens=8), b.submit([1], max_tokens=1)
        b.engine.resize(6 * block)
        ended = await whole(large)
        assert (ended.finish_reason, ended.tokens) == ("error", ())
        assert ended.error is not None and "up to 7 blocks, and there are 6" in ended.error
        b.executor.resume()
        assert (await whole(small)).finish_reason == "length"


async def test_after_a_time_at_rest_what_is_free_goes_back_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("quantd.daemon.engine.engine.IDLE_SECONDS", 0.0)
    async with bench() as b:
        await settle()
        assert b.executor.released == []
        await whole(b.submit(range(100), max_tokens=20))
        b.scheduler.kv.pool.release(b.scheduler.kv.allocate(60) or ())
        await asyncio.sleep(0.01)
        await settle()
        assert b.executor.released == [[(4, 64)]]


@pytest.mark.parametrize("is_due", [True, False])
async def test_who_waited_for_the_disk_in_vain_leaves_nothing_behind_either(
    monkeypatch: pytest.MonkeyPatch, is_due: bool
) -> None:
    """The loop wakes for it while nothing else happens; at rest memory goes back all the same."""
    monkeypatch.setattr("quantd.daemon.engine.engine.IDLE_SECONDS", 0.0)
    monkeypatch.setattr("quantd.daemon.scheduler.fetching.LISTING_SECONDS", 0.01)
    executor = FakeExecutor()
    tables = make_tables(64, num_places=8)
    tables.kv.disk = DiskIndex(100)
    scheduler = Scheduler(tables, SchedulerSettings(), executor.info.max_context)
    engine = Engine(executor, executor.info, scheduler, EngineMetrics())
    running = asyncio.create_task(engine.run())
    now = time.monotonic()
    stream = engine.submit(make_request(range(40), max_tokens=2, arrival=now - is_due))
    assert (await whole(stream)).finish_reason == "length"
    await asyncio.sleep(0.01)
    await settle()
    assert executor.released == [[(2, 3)]]
    await engine.close()
    await running


async def test_what_is_saved_at_rest_goes_when_it_is_deleted() -> None:
    executor = FakeExecutor()
    tables = make_tables(64, num_places=32, disk_files=50)
    scheduler = Scheduler(tables, SchedulerSettings(), executor.info.max_context)
    engine = Engine(executor, executor.info, scheduler, EngineMetrics(), ManualClock())
    running = asyncio.create_task(engine.run())
    for mark in ("a", "b", "c"):
        prompt = [ord(mark)] * 40
        await whole(engine.submit(make_request(prompt, max_tokens=1, mark=mark)))
    await settle()
    assert executor.on_disk is not None and tables.kv.disk is not None
    executor.on_disk(Listing((b"1" * 32,), 1))
    assert len(executor.worker.files) == 6 and len(tables.kv.disk) == 7
    engine.forget("a")
    await settle()
    assert len(executor.worker.files) == 4
    engine.unmark("b")
    engine.forget("b")
    await settle()
    assert (len(executor.worker.files), tables.kv.tree.num_nodes) == (4, 4)
    engine.check()
    await engine.close()
    await running


async def test_plans_go_to_the_worker_in_order() -> None:
    async with bench(token_budget=16) as b:
        await asyncio.gather(*(whole(b.submit([n] * 40)) for n in range(5)))
        steps: list[StepPlan] = b.executor.plans
        assert [plan.step for plan in steps] == list(range(1, len(steps) + 1))


# --- models that give vectors -------------------------------------------------------------------


class VectorExecutor(FakeExecutor):
    """Answers the bytes of a sequence's number in the place of a token."""

    async def _run(self, plan: StepPlan, before: asyncio.Future[StepResult] | None) -> StepResult:
        result = await super()._run(plan, before)
        sampled = tuple(
            replace(item, token=0, vector=str(item.seq).encode()) for item in result.sampled
        )
        return replace(result, sampled=sampled)


@pytest.mark.parametrize("in_one_step", [True, False])
async def test_a_vector_comes_in_the_place_of_a_token(in_one_step: bool) -> None:
    executor = VectorExecutor(max_context=40)
    info = replace(executor.info, pooling=Pooling("embed", 4, whole=in_one_step), block_bytes=0)
    tables = make_tables(info.num_blocks, whole=in_one_step)
    scheduler = Scheduler(tables, SchedulerSettings(token_budget=64), 41, in_one_step)
    engine = Engine(executor, info, scheduler, EngineMetrics())
    running = asyncio.create_task(engine.run())
    try:
        # A prompt of the whole context leaves no room for a token, and needs none.
        prompts = [range(n) for n in (40, 3, 40, 17, 40)]
        streams = [engine.submit(make_request(prompt, max_tokens=1)) for prompt in prompts]
        ends = [await whole(stream) for stream in streams]
        assert {event.finish_reason for event in ends} == {"length"}
        assert [stream.vector for stream in streams] == [b"1", b"2", b"3", b"4", b"5"]
        stats = engine.stats()
        assert (stats.prompt_tokens, stats.generated_tokens, stats.finished) == (140, 0, 5)
        with pytest.raises(ContextLengthExceeded):
            engine.submit(make_request(range(41), max_tokens=1))
        with pytest.raises(RequestError, match="keeps no KV blocks"):
            engine.resize(1 << 20)
    finally:
        await engine.close()
        await running

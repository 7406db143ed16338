"""Models come, fail, come back and go; nobody waits for the wrong thing. Time is set by hand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeExecutor, ManualClock, make_request

from quantd.daemon.config import ModelSettings, SchedulerSettings, ServerSettings, Settings
from quantd.daemon.engine.executor import OnProgress
from quantd.daemon.errors import ModelNotFound, ModelRefused, QuantdError, Unavailable
from quantd.daemon.fleet import Fleet, Lease, ModelStatus, Timing
from quantd.daemon.telemetry.metrics import Metrics
from quantd.daemon.types import Grammar, LoadModel, LoadProgress, TokenEvent, TokenTable


class Sleeper:
    """Sleeps that end when the clock is moved past them."""

    def __init__(self, clock: ManualClock) -> None:
        self._clock = clock
        self._sleeping: list[tuple[float, asyncio.Future[None]]] = []

    async def __call__(self, seconds: float) -> None:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._sleeping.append((self._clock() + seconds, future))
        await future

    async def advance(self, seconds: float) -> None:
        await settle()  # whoever is about to sleep does so before
        now = self._clock.advance(seconds)
        for until, future in self._sleeping:
            if until <= now and not future.done():
                future.set_result(None)
        await settle()


class Workers:
    """Starts fake workers, one per load, as slow and as faulty as it is told to be."""

    def __init__(self) -> None:
        self.loads: list[LoadModel] = []
        self.executors: list[FakeExecutor] = []
        self.errors: list[Exception | None] = []
        """What the next loads raise, in order; None and the end of the list: they succeed."""
        self.gate = asyncio.Event()
        self.gate.set()
        self.num_cancelled = 0

    async def start(self, load: LoadModel, on_progress: OnProgress) -> FakeExecutor:
        self.loads.append(load)
        on_progress(LoadProgress("weights", 1, 4))
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        error = self.errors.pop(0) if self.errors else None
        if error is not None:
            raise error
        self.executors.append(FakeExecutor())
        return self.executors[-1]

    @property
    def names(self) -> list[str]:
        return [load.name for load in self.loads]


class FakeText(str):
    """Of a tokenizer with one token."""

    def token_table(self) -> TokenTable:
        return TokenTable((b"a",), (), ())


class Bench:
    def __init__(
        self,
        *models: ModelSettings,
        any_model: bool = False,
        scheduler: SchedulerSettings | None = None,
    ) -> None:
        self.clock = ManualClock(1000.0)
        self.sleeper = Sleeper(self.clock)
        self.workers = Workers()
        self.texts: list[Path] = []
        self.text_error: Exception | None = None
        self.changes: list[tuple[str, str]] = []
        self.settings = Settings(
            server=ServerSettings(any_model=any_model),
            scheduler=scheduler or SchedulerSettings(),
            models={model.name: model for model in models},
        )
        self.fleet = Fleet(
            self.settings,
            Metrics(),
            self.workers.start,
            load_text=self.load_text,
            on_change=lambda status: self.changes.append((status.name, status.state)),
            timing=Timing(self.clock, self.sleeper),
        )

    def load_text(self, path: Path, max_context: int | None, tool_dialect: str) -> Any:
        self.texts.append(path)
        if self.text_error is not None:
            raise self.text_error
        return FakeText(f"text of {path}")

    def status(self, name: str = "a") -> ModelStatus:
        return next(status for status in self.fleet.models() if status.name == name)

    async def until(self, state: str, name: str = "a") -> None:
        while self.status(name).state != state:  # noqa: ASYNC110
            await asyncio.sleep(0.001)  # the tokenizer loads in a real thread

    async def generate(self, name: str | None = "a", max_tokens: int = 5) -> TokenEvent:
        async with await self.fleet.lease(name) as lease:
            return await generate(lease, max_tokens)


async def generate(lease: Lease, max_tokens: int = 5) -> TokenEvent:
    stream = lease.engine.submit(make_request([1, 2], max_tokens=max_tokens))
    events = [event async for event in stream]
    return events[-1]


def model(
    name: str = "a", *, keep_alive: float = -1.0, preload: bool = False, **kwargs: Any
) -> Any:
    path = kwargs.pop("path", Path(f"/models/{name}"))
    return ModelSettings(name=name, path=path, keep_alive=keep_alive, preload=preload, **kwargs)


@asynccontextmanager
async def bench(
    *models: ModelSettings,
    any_model: bool = False,
    scheduler: SchedulerSettings | None = None,
) -> AsyncIterator[Bench]:
    bench = Bench(*(models or (model(),)), any_model=any_model, scheduler=scheduler)
    try:
        yield bench
    finally:
        await bench.fleet.close()
        assert all(executor.closed for executor in bench.workers.executors)


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def fails(awaitable: Any) -> QuantdError:
    with pytest.raises(QuantdError) as raised:
        await awaitable
    return raised.value


# --- grammars ------------------------------------------------------------------------------------


async def test_the_worker_gets_the_tokens_once_and_each_grammar_once() -> None:
    good, bad = Grammar("regex", "good"), Grammar("regex", "bad")
    async with bench() as b, await b.fleet.lease("a") as lease:
        (executor,) = b.workers.executors
        assert executor.tables == []  # a model that never needs them pays nothing
        await asyncio.gather(*(lease.prepare(good) for _ in range(3)))
        await lease.prepare(good)
        for _ in range(2):
            assert "it is none" in str(await fails(lease.prepare(bad)))
        assert len(executor.tables) == 1
        assert executor.compiled[-2:] == [bad, bad]
        assert 1 <= executor.compiled.count(good) <= 3


async def test_a_worker_that_comes_again_gets_them_again() -> None:
    good = Grammar("regex", "good")
    async with bench() as b:
        async with await b.fleet.lease("a") as lease:
            await lease.prepare(good)
        b.workers.executors[0].die("killed")
        await b.sleeper.advance(1.0)
        async with await b.fleet.lease("a") as lease:
            await lease.prepare(good)
        assert [len(executor.tables) for executor in b.workers.executors] == [1, 1]
        assert b.workers.executors[1].compiled == [good]


# --- names ---------------------------------------------------------------------------------------


async def test_the_worker_knows_the_largest_step() -> None:
    async with bench(scheduler=SchedulerSettings(max_running=3, token_budget=99)) as b:
        await b.generate()
        (load,) = b.workers.loads
        assert (load.token_budget, load.max_running) == (99, 3)


async def test_names_and_aliases() -> None:
    async with bench(model("a", aliases=("gpt",)), model("b")) as b:
        assert [b.fleet.resolve(name) for name in ("a", "gpt", "b")] == ["a", "a", "b"]
        with pytest.raises(ModelNotFound, match="'c' does not exist. There are: a, b") as raised:
            b.fleet.resolve("c")
        assert raised.value.param == "model"
        with pytest.raises(ModelNotFound, match="No model is named"):
            b.fleet.resolve(None)
        async with await b.fleet.lease("gpt") as lease:
            assert lease.name == "a"
            assert lease.text == "text of /models/a"  # type: ignore[comparison-overlap]
    async with bench(model("only")) as b:
        assert b.fleet.resolve(None) == "only"


async def test_any_name_may_mean_the_first_model() -> None:
    async with bench(model("a", aliases=("gpt",)), model("b"), any_model=True) as b:
        names = ("a", "gpt", "b", "c", None)
        assert [b.fleet.resolve(name) for name in names] == ["a", "a", "b", "a", "a"]
        assert [b.fleet.knows(name) for name in ("a", "gpt", "c")] == [True, True, False]
        async with await b.fleet.lease("c") as lease:
            assert lease.name == "a"
        # What is done to a model must say which one it is.
        for done in (b.fleet.load("c"), b.fleet.unload("c")):
            assert isinstance(await fails(done), ModelNotFound)
        with pytest.raises(ModelNotFound, match="'c' does not exist"):
            b.fleet.engine_of("c")
    with pytest.raises(ModelNotFound, match="There are: none"):
        Fleet(Settings(server=ServerSettings(any_model=True)), Metrics()).resolve("c")


# --- loading -------------------------------------------------------------------------------------


async def test_a_cold_model_is_loaded_once_for_all_who_ask() -> None:
    async with bench(model("a"), model("b")) as b:
        b.workers.gate.clear()
        requests = [asyncio.create_task(b.generate("a")) for _ in range(5)]
        await settle()
        status = b.status()
        assert (status.state, status.stage, status.progress) == ("loading", "weights", 0.25)
        b.workers.gate.set()
        assert [(await request).finish_reason for request in requests] == ["length"] * 5
        assert b.workers.names == ["a"]
        assert (b.status().state, b.status().progress) == ("ready", 1.0)
        assert b.status("b").state == "cold"


async def test_looking_wakes_nothing() -> None:
    async with bench() as b:
        b.fleet.preload()
        b.fleet.models()
        assert b.fleet.ready()
        await settle()
        assert b.workers.loads == []


async def test_preload_and_readiness() -> None:
    async with bench(model("a", preload=True), model("b")) as b:
        b.workers.gate.clear()
        b.fleet.preload()
        await settle()
        assert not b.fleet.ready()
        b.workers.gate.set()
        await b.until("ready")
        assert b.fleet.ready() and b.workers.names == ["a"]
        await b.fleet.unload("a")
        assert b.fleet.ready()


async def test_a_failed_load_reaches_only_those_who_waited_for_it() -> None:
    async with bench(model("a"), model("b")) as b:
        b.workers.gate.clear()
        b.workers.errors = [Unavailable("no memory"), None, None]
        waiting = [asyncio.create_task(b.generate("a")) for _ in range(2)]
        await settle()
        other = asyncio.create_task(b.generate("b"))
        await settle()
        b.workers.gate.set()
        for request in waiting:
            assert str(await fails(request)) == "no memory"
        assert (await other).finish_reason == "length"
        assert (b.status("a").state, b.status("a").reason) == ("failed", "no memory")


async def test_a_failed_load_is_tried_again_with_backoff_and_then_given_up() -> None:
    async with bench() as b:
        b.workers.errors = [Unavailable("no memory")] * 6
        for attempt, delay in enumerate([1.0, 2.0, 4.0, 8.0], start=1):
            if attempt == 1:
                await fails(b.generate())
            await b.until("failed")
            assert len(b.workers.loads) == attempt
            assert b.status().retry_seconds == delay
            error = await fails(b.fleet.lease("a"))
            assert str(error) == f"no memory (tried again in {delay:.0f} s)"
            assert error.retry_after == delay
            await b.sleeper.advance(delay)
            while len(b.workers.loads) == attempt or b.status().state == "loading":  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        assert b.status().retry_seconds is None
        error = await fails(b.fleet.lease("a"))
        assert str(error) == "no memory (not tried again until asked to load)"
        await b.sleeper.advance(1000)
        assert len(b.workers.loads) == 5
        assert str(await fails(b.fleet.load("a"))) == "no memory"
        assert b.status().retry_seconds == 1.0
        await b.fleet.load("a")
        assert b.status().state == "ready" and b.status().reason is None


async def test_a_refused_model_is_not_tried_again_by_itself() -> None:
    async with bench() as b:
        b.workers.errors = [ModelRefused("no such architecture")]
        assert isinstance(await fails(b.generate()), ModelRefused)
        assert b.status().retry_seconds is None
        error = await fails(b.fleet.lease("a"))
        assert isinstance(error, ModelRefused)
        assert str(error) == "no such architecture (not tried again until asked to load)"
        await b.sleeper.advance(1000)
        assert len(b.workers.loads) == 1
        await b.fleet.load("a")
        assert b.status().state == "ready"


async def test_a_tokenizer_that_cannot_be_read_ends_the_worker_too() -> None:
    async with bench() as b:
        b.workers.gate.clear()
        b.text_error = FileNotFoundError("tokenizer.json")
        error = await fails(b.generate())
        assert str(error) == "the tokenizer of model 'a': FileNotFoundError: tokenizer.json"
        assert b.workers.num_cancelled == 1


async def test_a_bug_while_loading_is_an_answer_and_not_a_hang() -> None:
    async with bench() as b:
        b.workers.errors = [ZeroDivisionError("oops")]
        error = await fails(b.generate())
        assert str(error) == "internal error while model 'a' loads: ZeroDivisionError: oops"


# --- death ---------------------------------------------------------------------------------------


async def test_a_dead_workers_requests_fail_and_the_next_one_is_served() -> None:
    async with bench() as b:
        requests = [asyncio.create_task(b.generate(max_tokens=400)) for _ in range(8)]
        await b.until("ready")
        await settle()
        b.workers.executors[0].die("killed by signal 9 (SIGKILL)")
        for request in requests:
            event = await request
            assert (event.finish_reason, event.error) == ("error", "killed by signal 9 (SIGKILL)")
        after = asyncio.create_task(b.generate())
        await settle()
        assert not after.done()
        assert (b.status().state, b.status().reason) == ("loading", "killed by signal 9 (SIGKILL)")
        await b.sleeper.advance(1.0)
        assert (await after).finish_reason == "length"
        assert b.status().reason is None
        assert b.workers.executors[0].closed


async def test_death_without_a_request_served_is_given_up_in_the_end() -> None:
    async with bench() as b:
        await b.fleet.load("a")
        for delay in (1.0, 2.0, 4.0, 8.0):
            b.workers.executors[-1].die("crashed")
            await settle()
            waiting = asyncio.create_task(b.fleet.load("a"))
            await b.sleeper.advance(delay)
            await waiting
        b.workers.executors[-1].die("crashed")
        await settle()
        assert (b.status().state, b.status().retry_seconds) == ("failed", None)
        assert len(b.workers.loads) == 5
        # Who asks for it by hand gets another try, and with it all five.
        await b.fleet.load("a")
        assert (b.status().state, b.status().reason) == ("ready", None)
        b.workers.executors[-1].die("crashed")
        await settle()
        assert b.status().state == "loading"


async def test_a_served_request_forgives_earlier_deaths() -> None:
    async with bench() as b:
        for _ in range(7):
            assert (await b.generate()).finish_reason == "length"
            b.workers.executors[-1].die("crashed")
            await settle()
            await b.sleeper.advance(1.0)
            await b.until("ready")


# --- unloading -----------------------------------------------------------------------------------


async def test_an_idle_model_is_unloaded_after_keep_alive() -> None:
    async with bench(model(keep_alive=60.0)) as b:
        await b.generate()
        await b.sleeper.advance(59)
        async with await b.fleet.lease("a"):
            await b.sleeper.advance(1000)
            assert b.status().state == "ready"
        await b.sleeper.advance(59.5)
        assert b.status().state == "ready"
        await b.sleeper.advance(0.5)
        assert b.status().state == "cold"
        assert b.workers.executors[0].closed
        assert (await b.generate()).finish_reason == "length"
        assert len(b.workers.loads) == 2


async def test_keep_alive_of_zero_serves_and_leaves() -> None:
    async with bench(model(keep_alive=0.0)) as b:
        assert (await b.generate()).finish_reason == "length"
        await b.sleeper.advance(0)
        assert b.status().state == "cold"


async def test_who_uses_a_model_may_say_how_long_it_stays() -> None:
    async with bench(model(keep_alive=60.0)) as b:
        async with await b.fleet.lease("a") as lease:
            lease.keep(100.0)
            assert (b.status().keep_alive, b.status().idle_seconds) == (100.0, None)
        await b.sleeper.advance(99)
        assert (b.status().state, b.status().idle_seconds) == ("ready", 99.0)
        async with await b.fleet.lease("a") as lease:
            lease.keep(-1.0)
        await b.sleeper.advance(100_000)
        assert (b.status().state, b.status().keep_alive) == ("ready", -1.0)
        async with await b.fleet.lease("a") as lease:
            lease.keep(0.0)
        await b.sleeper.advance(0)
        assert (b.status().state, b.status().idle_seconds) == ("cold", None)
        assert b.status().keep_alive == 60.0
        await b.generate()
        await b.sleeper.advance(60)
        assert b.status().state == "cold"


async def test_unload_waits_for_requests_and_new_ones_wait_for_it() -> None:
    async with bench() as b:
        lease = await b.fleet.lease("a")
        unload = asyncio.create_task(b.fleet.unload("a"))
        await settle()
        late = asyncio.create_task(b.generate())
        await settle()
        assert not unload.done() and not late.done() and b.status().state == "ready"
        assert (await generate(lease)).finish_reason == "length"
        lease.release()
        lease.release()
        await unload
        assert (await late).finish_reason == "length"
        assert len(b.workers.loads) == 2 and b.status().num_leases == 0


async def test_unload_while_loading_cancels_the_load() -> None:
    async with bench() as b:
        b.workers.gate.clear()
        waiting = asyncio.create_task(b.generate())
        await settle()
        await b.fleet.unload("a")
        assert str(await fails(waiting)) == "model 'a': the model was unloaded"
        assert b.workers.num_cancelled == 1 and b.status().state == "cold"
        b.workers.gate.set()
        assert (await b.generate()).finish_reason == "length"


async def test_a_waiter_that_leaves_holds_nothing() -> None:
    async with bench(model(keep_alive=5.0)) as b:
        b.workers.gate.clear()
        waiting = asyncio.create_task(b.fleet.lease("a"))
        await settle()
        waiting.cancel()
        await asyncio.wait([waiting])
        assert b.status().num_leases == 0
        b.workers.gate.set()
        await b.until("ready")
        await b.sleeper.advance(5.0)
        assert b.status().state == "cold"


# --- all together --------------------------------------------------------------------------------


async def test_drain_lets_running_requests_finish_and_takes_no_more() -> None:
    async with bench(model("a"), model("b")) as b:
        lease = await b.fleet.lease("a")
        running = asyncio.create_task(generate(lease, 100))
        await settle()
        b.workers.gate.clear()
        loading = asyncio.create_task(b.generate("b"))
        await settle()
        drained = asyncio.create_task(b.fleet.drain(60))
        await settle()
        assert str(await fails(b.fleet.lease("a"))) == "the daemon is shutting down"
        assert "shutting down" in str(await fails(loading))
        assert (await running).finish_reason == "length"
        assert await drained is True
        assert not b.fleet.ready()


async def test_drain_ends_the_rest_at_the_deadline() -> None:
    async with bench() as b:
        lease = await b.fleet.lease("a")
        b.workers.executors[0].pause()
        running = asyncio.create_task(generate(lease, 100))
        await settle()
        assert await b.fleet.drain(0) is False
        assert (await running).error == "shutting down"
        await settle()
        assert len(b.workers.loads) == 1


async def test_close_in_every_state_leaves_nothing() -> None:
    async with bench(*(model(name) for name in "abcd")) as b:
        held = await b.fleet.lease("a")
        unload = asyncio.create_task(b.fleet.unload("a"))
        b.workers.errors = [Unavailable("no memory")]
        await fails(b.generate("b"))
        b.workers.gate.clear()
        loading = asyncio.create_task(b.generate("c"))
        await settle()
        await b.fleet.close()
        await b.fleet.close()
        assert "shutting down" in str(await fails(loading))
        assert [status.state for status in b.fleet.models()] == ["cold"] * 4
        await asyncio.wait([unload])
        held.release()


async def test_reconfigure_adds_removes_and_changes() -> None:
    async with bench(model("keep"), model("gone"), model("changed")) as b:
        for name in ("keep", "gone", "changed"):
            await b.generate(name)
        gone, changed = await b.fleet.lease("gone"), await b.fleet.lease("changed")
        models = [model("new", preload=True), model("keep"), model("changed", path=Path("/other"))]
        b.fleet.reconfigure({model.name: model for model in models})
        await b.until("ready", "new")
        assert [status.name for status in b.fleet.models()] == ["new", "keep", "changed"]
        assert (await generate(gone)).finish_reason == "length"
        with pytest.raises(ModelNotFound):
            b.fleet.resolve("gone")
        successor = asyncio.create_task(b.generate("changed"))
        await settle()
        assert b.status("changed").state == "loading"
        assert b.workers.names == ["keep", "gone", "changed", "new"]
        gone.release()
        changed.release()
        assert (await successor).finish_reason == "length"
        assert b.workers.loads[-1].path == "/other"
        assert [executor.closed for executor in b.workers.executors[:3]] == [False, True, True]
        assert b.status("keep").state == "ready"


async def test_new_names_and_times_need_no_load() -> None:
    async with bench(model(keep_alive=600.0)) as b:
        await b.generate()
        b.fleet.reconfigure({"a": model(keep_alive=10.0, preload=True, aliases=("gpt",))})
        assert b.fleet.resolve("gpt") == "a"
        assert (b.status().state, len(b.workers.loads)) == ("ready", 1)
        await b.sleeper.advance(10.0)
        assert b.status().state == "cold"


async def test_changes_are_told_in_order() -> None:
    async with bench() as b:
        b.workers.errors = [Unavailable("no memory")]
        await fails(b.generate())
        await b.sleeper.advance(1.0)
        await b.until("ready")
        b.workers.executors[0].die("crashed")
        await settle()
        await b.fleet.unload("a")
        states = [state for _, state in b.changes]
        loading = ["loading", "loading"]  # begun, and the one report of progress
        assert states == [*loading, "failed", *loading, "ready", "failed", "loading", "cold"]

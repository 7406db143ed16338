"""One configured model: asleep or in memory, who waits for it, and what happens when it fails."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import structlog

from quantd.daemon.config import ModelSettings
from quantd.daemon.engine.engine import Engine
from quantd.daemon.engine.stats import EngineStats
from quantd.daemon.errors import ModelRefused, RequestError, Unavailable
from quantd.daemon.fleet.lease import Lease
from quantd.daemon.fleet.resident import Loader, Resident
from quantd.daemon.types import LoadProgress, ModelInfo

_log = structlog.get_logger("quantd.fleet")

MAX_FAILURES = 5
"""Failures in a row, without a request served in between, after which it stays failed."""

State = Literal["cold", "loading", "ready", "failed"]


@dataclass(frozen=True, slots=True)
class Timing:
    """Time as the fleet sees it; tests put their own here. Seconds."""

    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep


class ModelStatus(NamedTuple):
    """A look at one model. Taking it wakes nothing and waits for nothing."""

    name: str
    path: str
    state: State
    reason: str | None
    """Why it failed; while it is loading again, why it had to."""
    stage: str
    """What loading is at: "importing", "weights" …; empty unless it is loading."""
    progress: float
    """0..1 of that stage; 1 when ready."""
    retry_seconds: float | None
    """When a failed model is tried again; None: not by itself."""
    info: ModelInfo | None
    aliases: tuple[str, ...]
    max_context: int | None
    """Of the loaded model, else as configured."""
    created: int
    """Seconds since the epoch at which the model came into the configuration."""
    num_leases: int
    pid: int | None
    stats: EngineStats | None
    task: str
    """As configured."""
    tool_dialect: str
    """As configured."""
    keep_alive: float
    """Seconds without a request until it is unloaded; -1: never."""
    idle_seconds: float | None
    """Since its last request; None: it has one, or is not in memory."""


OnChange = Callable[[ModelStatus], None]


class Model:
    """The life of one configured model:

        cold ──lease, load──▶ loading ──▶ ready ──keep_alive, unload──▶ cold
                                ▲  │        │ worker died
                        backoff │  ▼        ▼
                               failed ◀──(loading, after the backoff)

    One task, `_live`, holds a model that is not cold: it loads, waits for the end, and loads
    again. Requests that wait all look at one future, `_attempt`, so that two requests for a cold
    model make one load, and a failure reaches just those that waited for that load. Event loop
    only.
    """

    def __init__(
        self,
        settings: ModelSettings,
        loader: Loader,
        timing: Timing,
        on_change: OnChange = lambda status: None,
        former: Iterable[asyncio.Task[None]] = (),
    ) -> None:
        """`former`: the ends of this model under other settings; loading waits for them."""
        self.settings = settings
        self._loader = loader
        self._timing = timing
        self._on_change = on_change
        self._leaving = set(former)
        """What may still be in memory; never twice at once."""
        self._created = int(time.time())
        self._state: State = "cold"
        self._failure: Unavailable | None = None
        self._progress = LoadProgress("", 0, 0)
        self._resident: Resident | None = None
        self._attempt: asyncio.Future[Resident] | None = None
        """The load that requests wait for: set exactly while the state is loading."""
        self._live_task: asyncio.Task[None] | None = None
        self._num_failures = 0
        self._retry_at: float | None = None
        self._num_leases = 0
        self._unleased = asyncio.Event()
        self._unleased.set()
        self._idle_task: asyncio.Task[None] | None = None
        self._idle_since: float | None = None
        self._kept: float | None = None
        """In place of the configured keep_alive, while it is in memory."""
        self._unload_task: asyncio.Task[None] | None = None
        self._ending = False
        """The daemon is shutting down, or the model has left the configuration."""

    @property
    def name(self) -> str:
        return self.settings.name

    @property
    def keep_alive(self) -> float:
        return self.settings.keep_alive if self._kept is None else self._kept

    @property
    def state(self) -> State:
        return self._state

    @property
    def engine(self) -> Engine | None:
        """None: it is not in memory."""
        return None if self._resident is None else self._resident.engine

    def status(self) -> ModelStatus:
        resident, loading = self._resident, self._state == "loading"
        total = self._progress.total_bytes
        partly = min(self._progress.done_bytes / total, 1.0) if loading and total > 0 else 0.0
        wait = None if self._retry_at is None else self._retry_at - self._timing.clock()
        return ModelStatus(
            name=self.name,
            path=str(self.settings.path),
            state=self._state,
            reason=None if self._failure is None else str(self._failure),
            stage=self._progress.stage if loading else "",
            progress=1.0 if resident is not None else partly,
            retry_seconds=None if wait is None else max(wait, 0.0),
            info=None if resident is None else resident.info,
            aliases=self.settings.aliases,
            max_context=self.settings.max_context
            if resident is None
            else resident.info.max_context,
            created=self._created,
            num_leases=self._num_leases,
            pid=None if resident is None else resident.pid,
            stats=None if resident is None else resident.engine.stats(),
            task=self.settings.task,
            tool_dialect=self.settings.tool_dialect,
            keep_alive=self.keep_alive,
            idle_seconds=None
            if self._idle_since is None
            else self._timing.clock() - self._idle_since,
        )

    # --- leases ------------------------------------------------------------------------------

    async def lease(self) -> Lease:
        """Waits while the model loads. Raises `Unavailable` when that fails, and at once when the
        last load failed and the next one is not due."""
        while self._unload_task is not None:
            await asyncio.shield(self._unload_task)
        self._num_leases += 1
        self._unleased.clear()
        self._stop_idle_timer()
        try:
            resident = await self._wake()
        except BaseException:
            self._release()
            raise
        return Lease(self.name, resident, self._release, self._keep)

    async def _wake(self) -> Resident:
        while self._resident is None or self._resident.engine.has_ended:
            if self._resident is not None:
                # It ended just now: `_live`, which waits for the same, sees it before us.
                await asyncio.wait([self._resident.run])
                continue
            if self._ending:
                raise Unavailable("the daemon is shutting down")
            if self._state == "failed":
                self._raise_failed()
            await asyncio.shield(self._begin())
        return self._resident

    def _raise_failed(self) -> None:
        assert self._failure is not None
        wait = self.status().retry_seconds
        hint = (
            "not tried again until asked to load"
            if wait is None
            else f"tried again in {wait:.0f} s"
        )
        retry_after = None if wait is None else max(wait, 1.0)
        raise type(self._failure)(f"{self._failure} ({hint})", retry_after=retry_after)

    def _keep(self, seconds: float) -> None:
        """See `Lease.keep`; the timer begins when the last lease ends."""
        self._kept = seconds

    def _release(self) -> None:
        self._num_leases -= 1
        if self._num_leases == 0:
            self._unleased.set()
            self._start_idle_timer()

    # --- by the administrator and the fleet --------------------------------------------------

    def update(self, settings: ModelSettings) -> bool:
        """Takes over new settings, unless the model would have to be loaded differently: False."""
        mine = self.settings
        same = replace(
            settings, keep_alive=mine.keep_alive, preload=mine.preload, aliases=mine.aliases
        )
        resized = settings.kv_bytes != mine.kv_bytes
        if resized and settings.kv_bytes is not None and mine.kv_bytes is not None:
            same = replace(same, kv_bytes=mine.kv_bytes)
        if same != mine:
            return False
        if resized and not self._resize(settings.kv_bytes):
            return False
        self.settings = settings
        if self._num_leases == 0:
            self._stop_idle_timer()
            self._start_idle_timer()
        return True

    def _resize(self, kv_bytes: int | None) -> bool:
        """False: only loading it again can do that."""
        if self._resident is None or kv_bytes is None:
            return self._state == "cold"
        try:
            self._resident.engine.resize(kv_bytes)
        except RequestError as error:
            _log.warning("kv_bytes needs a load", model=self.name, reason=str(error))
            return False
        return True

    def preload(self) -> None:
        """Begins to load a cold model, and does not wait for it."""
        if self._state == "cold" and not self._ending:
            self._begin()

    async def load(self) -> None:
        """Loads it, also when it has failed for good, and waits for it. Raises `Unavailable`."""
        if self._state == "failed":
            await self._stop("asked to load again")
        lease = await self.lease()
        lease.release()

    async def unload(self) -> None:
        """Waits until nobody holds it, then ends it. Requests that come meanwhile wait, and load
        it again. A model that is still loading is not waited for: its requests fail."""
        if self._unload_task is None:
            self._unload_task = asyncio.create_task(self._unload())
        await asyncio.shield(self._unload_task)

    async def drain(self, seconds: float) -> bool:
        """Takes no more requests and waits for those that are there, at most `seconds`; True when
        all ran to their end. Requests that wait for it to load fail at once."""
        self._ending = True
        if self._resident is not None:
            return await self._resident.engine.drain(seconds)
        await self._stop("the daemon is shutting down")
        return True

    async def close(self) -> None:
        """Ends it now. Idempotent."""
        self._ending = True
        if self._unload_task is not None:  # it may wait for leases
            self._unload_task.cancel()
        await self._stop("the daemon is shutting down")

    async def retire(self) -> None:
        """For a model that has left the configuration: ends it when its last request has."""
        await self._unleased.wait()
        self._ending = True
        await self._stop("the model has left the configuration")

    async def _unload(self) -> None:
        try:
            if self._resident is not None:
                await self._unleased.wait()
            await self._stop("the model was unloaded")
        finally:
            self._unload_task = None

    # --- its life ----------------------------------------------------------------------------

    def _begin(self) -> asyncio.Future[Resident]:
        """The load in progress, or a new one."""
        if self._attempt is None:
            self._attempt = self._new_attempt()
            self._live_task = asyncio.create_task(self._live())
        return self._attempt

    def _new_attempt(self) -> asyncio.Future[Resident]:
        self._retry_at = None
        self._progress = LoadProgress("", 0, 0)
        self._attempt = attempt = asyncio.get_running_loop().create_future()
        self._enter("loading")
        return attempt

    async def _live(self) -> None:
        """Loads the model and keeps it loaded, until it fails for good or `_stop` cancels this."""
        if self._leaving:
            await asyncio.wait(self._leaving)
            self._leaving.clear()
        while True:
            try:
                resident = await self._loader.load(self.settings, self._on_progress)
            except Exception as error:
                delay = self._note_failure(_as_unavailable(self.name, error))
                if delay is None:
                    return
                await self._timing.sleep(delay)
                self._new_attempt()
                continue
            try:
                self._enter_ready(resident)
                await asyncio.wait([resident.run])
                delay = self._leave_ready(resident)
            finally:
                await resident.close()
            if delay is None:
                return
            await self._timing.sleep(delay)

    def _enter_ready(self, resident: Resident) -> None:
        attempt, self._attempt = self._attempt, None
        assert attempt is not None
        self._resident = resident
        self._failure = None
        attempt.set_result(resident)
        self._enter("ready")
        seconds = round(resident.info.seconds, 3)
        _log.info("model ready", model=self.name, pid=resident.pid, seconds=seconds)
        for note in resident.info.notes:
            _log.warning("model note", model=self.name, note=note)
        if self._num_leases == 0:
            self._start_idle_timer()

    def _leave_ready(self, resident: Resident) -> float | None:
        """The engine has ended. Seconds until the model is loaded again; None: not by itself."""
        self._resident = None
        self._stop_idle_timer()
        if resident.engine.stats().finished > 0:
            self._num_failures = 0
        if self._ending:
            self._enter("cold")
            return None
        delay = self._note_failure(Unavailable(resident.run.result()))
        if delay is not None:
            # Requests wait for the next load: it did load before, so it will probably again.
            self._new_attempt()
        return delay

    def _note_failure(self, failure: Unavailable) -> float | None:
        """Tells those who wait. Seconds until the next load; None: not by itself."""
        self._num_failures += 1
        self._failure = failure
        final = self._num_failures >= MAX_FAILURES or isinstance(failure, ModelRefused)
        delay = None if final else float(2 ** (self._num_failures - 1))
        self._retry_at = None if delay is None else self._timing.clock() + delay
        _log.error("model failed", model=self.name, reason=str(failure), retry_seconds=delay)
        self._fail_attempt(failure)
        self._enter("failed")
        return delay

    def _fail_attempt(self, failure: Unavailable) -> None:
        attempt, self._attempt = self._attempt, None
        if attempt is not None:
            attempt.set_exception(failure)
            attempt.exception()  # no warning when nobody waits

    async def _stop(self, reason: str) -> None:
        """Cold and without failures at once; returns when what was in memory is gone. A load
        that begins meanwhile waits for that too."""
        self._stop_idle_timer()
        self._fail_attempt(Unavailable(f"model {self.name!r}: {reason}"))
        if self._live_task is not None:
            self._live_task.cancel()
            self._leaving.add(self._live_task)
            self._live_task = None
        self._resident = None
        self._failure = None
        self._retry_at = None
        self._kept = None
        self._num_failures = 0
        if self._state != "cold":
            self._enter("cold")
        if self._leaving:
            await asyncio.wait(self._leaving)

    def _on_progress(self, progress: LoadProgress) -> None:
        self._progress = progress
        self._on_change(self.status())

    def _enter(self, state: State) -> None:
        """Last of what a change does, so that who is told sees all of it."""
        self._state = state
        self._on_change(self.status())

    # --- keep_alive --------------------------------------------------------------------------

    def _start_idle_timer(self) -> None:
        if self._resident is None or self._ending:
            return
        self._idle_since = self._timing.clock()
        if self.keep_alive >= 0:
            self._idle_task = asyncio.create_task(self._unload_when_idle())

    def _stop_idle_timer(self) -> None:
        self._idle_since = None
        if self._idle_task is not None:
            self._idle_task.cancel()
            self._idle_task = None

    async def _unload_when_idle(self) -> None:
        keep_alive = self.keep_alive
        await self._timing.sleep(keep_alive)
        _log.info("model idle", model=self.name, keep_alive=keep_alive)
        self._idle_task = None  # from here on it is an unload, which a lease waits for
        await self.unload()


def _as_unavailable(name: str, error: Exception) -> Unavailable:
    if isinstance(error, Unavailable):
        return error
    _log.exception("loading failed", model=name)
    return Unavailable(
        f"internal error while model {name!r} loads: {type(error).__name__}: {error}"
    )

"""One loaded model at work: takes requests in, steps the batch, hands tokens out."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import msgspec
import structlog

from quantd.daemon.engine.executor import Executor
from quantd.daemon.engine.metrics import EngineMetrics, Totals
from quantd.daemon.engine.stats import EngineStats, RequestState
from quantd.daemon.engine.stream import Leaving, TokenStream
from quantd.daemon.errors import RequestError, Unavailable
from quantd.daemon.scheduler import admission
from quantd.daemon.scheduler.scheduler import Scheduler
from quantd.daemon.scheduler.sequence import Sequence
from quantd.daemon.scheduler.updates import SequenceUpdate
from quantd.daemon.types import DiskDone, DiskIndex, ModelInfo, Request, StepPlan, StepResult

_log = structlog.get_logger("quantd.engine")


_NO_VECTORS: Mapping[int, bytes | None] = MappingProxyType({})

IDLE_SECONDS = 30.0
"""At rest for so long, an engine gives back the memory that only its load has needed."""


class _Active:
    """A request that has not ended: its sequence, and the stream to its caller."""

    __slots__ = ("sequence", "stream", "last_token_at")

    def __init__(self, sequence: Sequence, stream: TokenStream) -> None:
        self.sequence = sequence
        self.stream = stream
        self.last_token_at: float | None = None


class _Step(NamedTuple):
    """A step that is committed and not yet delivered."""

    plan: StepPlan
    result: StepResult
    updates: list[SequenceUpdate]
    at: float


class Engine:
    """Drives one scheduler and one executor.

    Event loop only. `submit`, `stats` and a stream's `abort` and `stop` never wait and may be
    called at any moment; `run` is the one task that plans and commits. It ends when the worker
    dies or at `close`, and from then on `submit` raises `Unavailable` with the reason: an engine
    is used once, whoever wants the model back starts another.
    """

    def __init__(
        self,
        executor: Executor,
        info: ModelInfo,
        scheduler: Scheduler,
        metrics: EngineMetrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._executor = executor
        self._info = info
        self._scheduler = scheduler
        self._metrics = metrics
        self._totals = Totals(scheduler, info.block_bytes, metrics)
        self._clock = clock
        self._active: dict[int, _Active] = {}
        self._ids = itertools.count(1)
        self._work = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._refusal: str | None = None
        """Why no request is taken in any more."""
        self._ended = False
        self._releases_memory = self._has_worked = False
        self._num_steps = 0
        self._num_finished = 0
        self._num_prompt_tokens = self._num_cached_tokens = self._num_generated_tokens = 0
        executor.on_disk = self._on_disk
        executor.died.add_done_callback(lambda died: self._end(died.result()))

    @property
    def info(self) -> ModelInfo:
        """Of the model, with the budget for KV blocks as it is now."""
        return self._info

    @property
    def num_active(self) -> int:
        """Requests that are waiting or running."""
        return len(self._active)

    @property
    def has_ended(self) -> bool:
        """The worker is gone or about to go; `submit` raises from now on."""
        return self._ended

    def stats(self) -> EngineStats:
        """As it is now. The model's metrics are up to date afterwards."""
        self._totals.carry()
        scheduler = self._scheduler
        return EngineStats(
            running=scheduler.num_running,
            waiting=scheduler.num_waiting,
            kv=scheduler.kv.stats(),
            preemptions=scheduler.preemptions,
            steps=self._num_steps,
            finished=self._num_finished,
            prompt_tokens=self._num_prompt_tokens,
            cached_tokens=self._num_cached_tokens,
            generated_tokens=self._num_generated_tokens,
        )

    def requests(self) -> list[RequestState]:
        """Every request that has not ended, in order of arrival."""
        now = self._clock()
        return [_state(seq, doing, now) for seq, doing in self._scheduler.sequences()]

    def check(self) -> None:
        """Recount sequences and blocks from scratch, at any moment; AssertionError where a number
        does not hold. Takes about a second for a million blocks, in which nothing else happens."""
        self._scheduler.check()

    def resize(self, kv_bytes: int) -> int:
        """The budget for KV blocks from now on; gives the bytes that it comes to. Raises
        RequestError for less than one block, or more than the address space that was reserved."""
        block, most = self._info.block_bytes, self._scheduler.kv.pool.capacity
        if block == 0:
            raise RequestError("this model keeps no KV blocks", param="kv_bytes")
        if not block <= kv_bytes < (most + 1) * block:
            raise RequestError(
                f"kv_bytes is {kv_bytes}, must be between {block} (one block) and {most * block}",
                param="kv_bytes",
            )
        self._scheduler.resize(kv_bytes // block)
        self._info = msgspec.structs.replace(self._info, num_blocks=kv_bytes // block)
        self._after_shrinking()
        return self._info.num_blocks * block

    def shrink(self) -> None:
        """Give up cached blocks, and the memory of all that are free."""
        self._scheduler.kv.shrink()
        self._after_shrinking()

    def forget(self, mark: str) -> None:
        """Give up the cached blocks that only requests with this mark have used."""
        self._scheduler.kv.forget(mark)
        self._work.set()  # files go with a plan

    def unmark(self, mark: str) -> None:
        """What requests with this mark have left is as that of others."""
        self._scheduler.kv.unmark(mark)

    def _after_shrinking(self) -> None:
        self._deliver_ended()
        self._releases_memory = True
        self._work.set()

    def submit(self, request: Request) -> TokenStream:
        """Takes a request in; its tokens come from the stream.

        Raises `ContextLengthExceeded` or `RequestError` for what can never run, `QueueFull`, and
        `Unavailable` when the engine drains or has ended.
        """
        if self._refusal is not None:
            raise Unavailable(self._refusal)
        admission.check(request, self._info, self._scheduler, self._clock())
        sequence = Sequence(next(self._ids), request)
        stream = TokenStream(lambda reason: self._leave(sequence.id, reason))
        self._active[sequence.id] = _Active(sequence, stream)
        self._scheduler.add(sequence)
        self._idle.clear()
        self._work.set()
        return stream

    async def run(self) -> str:
        """The step loop. Returns when the engine has ended, with the reason; raises nothing but
        cancellation: an error of ours ends the engine as a dead worker would."""
        try:
            await self._run_steps()
        except Unavailable as error:
            self._end(str(error))
        except Exception as error:
            _log.exception("the step loop failed")
            self._end(f"internal error in the step loop: {type(error).__name__}: {error}")
        finally:
            self._end("the engine was stopped")
        assert self._refusal is not None
        return self._refusal

    async def drain(self, seconds: float) -> bool:
        """Takes nothing in any more; True when all requests ran to their end. Those that are left
        after `seconds` end with the error "shutting down", and the engine with them: False."""
        if self._refusal is None:
            self._refusal = "the daemon is shutting down"
        try:
            async with asyncio.timeout(seconds):  # `wait_for` of 0 s fails also where nothing waits
                await self._idle.wait()
        except TimeoutError:
            self._end("shutting down")
            return False
        return True

    async def close(self) -> None:
        """Ends every request with an error, and the worker. Idempotent."""
        self._end("the model was unloaded")
        await self._executor.close()

    async def _run_steps(self) -> None:
        scheduler = self._scheduler
        flights: deque[tuple[StepPlan, asyncio.Future[StepResult]]] = deque()
        done: _Step | None = None
        while not self._ended:
            plan = scheduler.plan(self._clock())
            try:
                if plan is not None:
                    flights.append((plan, self._execute(plan)))
            finally:
                # The worker computes while the last step's tokens become text.
                self._deliver(done)
                self._deliver_ended()  # behind the tokens that a timeout came too late for
            done = None
            if plan is not None and scheduler.may_plan:
                continue
            if not flights:
                if not scheduler.kv.save():
                    await self._rest()
                continue
            plan, running = flights.popleft()
            result = await running
            now = self._clock()
            done = _Step(plan, result, scheduler.commit(plan, result, now), now)

    def _execute(self, plan: StepPlan) -> asyncio.Future[StepResult]:
        running = self._executor.execute(plan)
        # Of two that fail together only the first is awaited.
        running.add_done_callback(lambda future: future.cancelled() or future.exception())
        return running

    async def _rest(self) -> None:
        """There is nothing to do until somebody sets `_work`, or a sequence's patience ends."""
        if self._releases_memory:
            self._releases_memory = False
            self._executor.release_memory(self._scheduler.kv.pool.free_ranges())
        self._has_worked |= self._work.is_set()
        self._work.clear()
        due = self._scheduler.wake_at()
        seconds = None if due is None else max(0.0, due - self._clock())
        if seconds is None and not self._scheduler.has_work:
            self._scheduler.check_counts()
            seconds = IDLE_SECONDS if self._has_worked else None
        try:
            await asyncio.wait_for(self._work.wait(), seconds)
        except TimeoutError:
            if not self._scheduler.has_work:
                # At rest for long: what it does not need goes back, what is cached stays.
                self._releases_memory, self._has_worked = self._has_worked, False

    def _on_disk(self, message: DiskDone | DiskIndex) -> None:
        if isinstance(message, DiskDone):
            self._scheduler.disk_done(message)
        elif self._scheduler.kv.disk is not None:
            self._scheduler.disk_open(message)
        self._work.set()  # somebody may go on, or the folder be over its budget

    def _deliver_ended(self) -> None:
        """Hands over what ended without a step."""
        for update in self._scheduler.take_ended():
            assert update.finish_reason is not None
            active = self._active[update.seq.id]
            active.stream.finish(update.finish_reason, update.error)
            self._forget(update.seq.id, update.finish_reason)

    def _deliver(self, step: _Step | None) -> None:
        """Hands a step's tokens to the streams, all of which are there: nothing is awaited between
        `commit` and this."""
        if step is None:
            return
        vectors = self._vectors(step.result)
        for update in step.updates:
            active = self._active[update.seq.id]
            active.stream.vector = vectors.get(update.seq.id)
            active.stream.push(update.tokens, update.logprobs, update.prompt_logprobs)
            active.stream.num_cached_tokens = update.seq.num_cached_tokens
            if update.tokens:
                self._measure_tokens(active, step.at)
            if update.finish_reason is not None:
                active.stream.finish(update.finish_reason, update.error, update.complete)
                self._forget(update.seq.id, update.finish_reason)
        self._num_steps += 1
        num_tokens = sum(chunk.stop - chunk.start for chunk in step.plan.chunks)
        result = step.result
        self._metrics.observe_step(result.seconds, num_tokens)
        if result.num_masks:
            self._metrics.count_masks(
                result.num_masks, result.mask_seconds, result.mask_wait_seconds
            )
        num_generated = 0
        if self._info.pooling is None:
            num_generated = sum(len(update.tokens) for update in step.updates)
        self._num_generated_tokens += num_generated
        self._metrics.count_generated(num_generated)

    def _vectors(self, result: StepResult) -> Mapping[int, bytes | None]:
        if self._info.pooling is None:
            return _NO_VECTORS
        return {item.seq: item.vector for item in result.sampled}

    def _measure_tokens(self, active: _Active, now: float) -> None:
        if active.last_token_at is None:
            sequence, stream = active.sequence, active.stream
            stream.started_at, stream.first_token_at = sequence.started_at, now
            self._metrics.observe_queue(sequence.queue_seconds or 0.0)
            self._metrics.observe_ttft(now - sequence.request.arrival)
            self._num_prompt_tokens += sequence.num_prompt_tokens
            self._num_cached_tokens += sequence.num_cached_tokens
            self._metrics.count_prompt(sequence.num_prompt_tokens, sequence.num_cached_tokens)
        else:
            self._metrics.observe_itl(now - active.last_token_at)
        active.last_token_at = now

    def _leave(self, seq_id: int, reason: Leaving) -> None:
        """The reader of a stream that has not ended is done with it."""
        self._scheduler.abort(seq_id)
        self._active[seq_id].stream.finish(reason)
        self._forget(seq_id, reason)

    def _end(self, reason: str) -> None:
        """No request lives on; the first reason counts."""
        if self._ended:
            return
        self._ended = True
        self._refusal = reason
        for seq_id, active in list(self._active.items()):
            self._scheduler.abort(seq_id)
            active.stream.finish("error", reason)
            self._forget(seq_id, "error")
        self._totals.carry()
        self._work.set()

    def _forget(self, seq_id: int, reason: str) -> None:
        del self._active[seq_id]
        self._metrics.count_finished(reason)
        if reason in ("stop", "length"):
            self._num_finished += 1
        if not self._active:
            self._idle.set()


def _state(seq: Sequence, doing: str, now: float) -> RequestState:
    request = seq.request
    return RequestState(
        id=request.id,
        caller=request.caller,
        phase=doing,
        priority=request.priority,
        prompt_tokens=seq.num_prompt_tokens,
        cached_tokens=seq.num_cached_tokens,
        computed_tokens=seq.num_computed_tokens,
        output_tokens=seq.num_output_tokens,
        max_tokens=request.sampling.max_tokens,
        blocks=len(seq.blocks),
        preemptions=seq.num_preemptions,
        age=now - request.arrival,
        queue_seconds=seq.queue_seconds,
    )

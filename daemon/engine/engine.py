"""One loaded model at work: takes requests in, steps the batch, hands tokens out."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import structlog

from quantd.daemon.engine.executor import Executor
from quantd.daemon.engine.metrics import EngineMetrics
from quantd.daemon.engine.stream import Leaving, TokenStream
from quantd.daemon.errors import Unavailable
from quantd.daemon.scheduler import admission
from quantd.daemon.scheduler.scheduler import Scheduler, SequenceUpdate
from quantd.daemon.scheduler.sequence import Sequence
from quantd.daemon.types import ModelInfo, Request, StepPlan, StepResult

_log = structlog.get_logger("quantd.engine")


class EngineStats(NamedTuple):
    """A look at an engine, for metrics and `ps`."""

    running: int
    waiting: int
    blocks_free: int
    blocks_used: int
    blocks_total: int
    preemptions: Mapping[str, int]
    """Since the start, by reason."""
    steps: int
    finished: int
    """Requests that ran to their end: neither aborted nor failed."""


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
        self._clock = clock
        self._active: dict[int, _Active] = {}
        self._ids = itertools.count(1)
        self._work = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._refusal: str | None = None
        """Why no request is taken in any more."""
        self._ended = False
        self._num_steps = 0
        self._num_finished = 0
        executor.died.add_done_callback(lambda died: self._end(died.result()))

    @property
    def num_active(self) -> int:
        """Requests that are waiting or running."""
        return len(self._active)

    @property
    def has_ended(self) -> bool:
        """The worker is gone or about to go; `submit` raises from now on."""
        return self._ended

    def stats(self) -> EngineStats:
        counts = self._scheduler.counts()
        return EngineStats(
            running=counts.running,
            waiting=counts.waiting,
            blocks_free=counts.blocks_free,
            blocks_used=counts.blocks_used,
            blocks_total=self._info.num_blocks,
            preemptions=counts.preemptions,
            steps=self._num_steps,
            finished=self._num_finished,
        )

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
            await asyncio.wait_for(self._idle.wait(), seconds)
        except TimeoutError:
            self._end("shutting down")
            return False
        return True

    async def close(self) -> None:
        """Ends every request with an error, and the worker. Idempotent."""
        self._end("the model was unloaded")
        await self._executor.close()

    async def _run_steps(self) -> None:
        done: _Step | None = None
        while not self._ended:
            plan = self._scheduler.plan(self._clock())
            if plan is None:
                self._deliver(done)
                done = None
                self._work.clear()
                await self._work.wait()
                continue
            # The worker computes this step while the last one's tokens become text.
            try:
                running = self._executor.execute(plan)
            finally:
                self._deliver(done)
            result = await running
            now = self._clock()
            done = _Step(plan, result, self._scheduler.commit(plan, result, now), now)

    def _deliver(self, step: _Step | None) -> None:
        """Hands a step's tokens to the streams. What was aborted since is passed over."""
        if step is None:
            return
        for update in step.updates:
            active = self._active.get(update.seq.id)
            if active is None:
                continue
            active.stream.push(update.tokens, update.logprobs, update.prompt_logprobs)
            if update.tokens:
                self._measure_tokens(active, step.at)
            if update.finish_reason is not None:
                active.stream.finish(update.finish_reason, update.error)
                self._forget(update.seq.id, update.finish_reason)
        self._num_steps += 1
        num_tokens = sum(chunk.stop - chunk.start for chunk in step.plan.chunks)
        self._metrics.observe_step(step.result.seconds, num_tokens)
        self._metrics.count_generated(sum(len(update.tokens) for update in step.updates))

    def _measure_tokens(self, active: _Active, now: float) -> None:
        if active.last_token_at is None:
            sequence = active.sequence
            self._metrics.observe_queue(sequence.queue_seconds or 0.0)
            self._metrics.observe_ttft(now - sequence.request.arrival)
            self._metrics.count_prompt(sequence.num_prompt_tokens, 0)
        else:
            self._metrics.observe_itl(now - active.last_token_at)
        active.last_token_at = now

    def _leave(self, seq_id: int, reason: Leaving) -> None:
        """The stream's reader is done with it."""
        active = self._active.get(seq_id)
        if active is None:
            return
        # False when the last step finished it and its update is not yet delivered.
        self._scheduler.abort(seq_id)
        active.stream.finish(reason)
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
        self._work.set()

    def _forget(self, seq_id: int, reason: str) -> None:
        del self._active[seq_id]
        self._metrics.count_finished(reason)
        if reason in ("stop", "length"):
            self._num_finished += 1
        if not self._active:
            self._idle.set()

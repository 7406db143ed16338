"""The scheduler as it is, on a clock and a worker that are only arithmetic.

Plans and commits happen in the order of the engine's step loop: at most one plan ahead, made as
soon as the plan before it runs, and nothing planned while a step is awaited. What a step takes is
computed by `StepCost`. Same jobs, same numbers: nothing here is random.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from unittest import mock

from quantd.daemon.config import SchedulerSettings
from quantd.daemon.kv.cache import KvCache
from quantd.daemon.kv.pool import BlockPool
from quantd.daemon.scheduler import policy
from quantd.daemon.scheduler.predict import OutputPredictor
from quantd.daemon.scheduler.scheduler import Scheduler
from quantd.daemon.scheduler.sequence import Sequence
from quantd.daemon.scheduler.tables import BlockTables
from quantd.daemon.scheduler.updates import SequenceUpdate
from quantd.daemon.types import Request, Sampled, SamplingParams, StepPlan, StepResult

STOP = 2
"""The token that ends an output; no prompt has it."""
FIRST_TOKEN = 3
VOCABULARY = 100_000


@dataclass(frozen=True)
class Job:
    """One request of a trace. Times in seconds."""

    arrival: float
    """On the trace's clock; with `after`, since the end of that job."""
    prompt: tuple[int, ...]
    output: int
    """Tokens it really makes, the last of them a stop token."""
    max_tokens: int
    """What the caller asks for, >= output."""
    priority: int = 0
    after: int | None = None
    """Index of the job whose answer it follows, in the same trace and before it."""
    fresh: int = 0
    """Prompt tokens that no job before it has had; for the load of a trace only."""


def output_token(job: int, position: int) -> int:
    """What job number `job` answers at `position`, counted from 0, before its stop token."""
    return FIRST_TOKEN + (job * 7919 + position) % VOCABULARY


@dataclass(frozen=True)
class Work:
    """What a step or many of them compute. Adds up."""

    steps: int = 0
    prefill_tokens: int = 0
    """Of chunks of more than one token."""
    decodes: int = 0
    """Chunks of one token."""
    attended: int = 0
    """Pairs of a computed position and one that it reads."""

    def __add__(self, other: Work) -> Work:
        return Work(
            self.steps + other.steps,
            self.prefill_tokens + other.prefill_tokens,
            self.decodes + other.decodes,
            self.attended + other.attended,
        )


def work_of(plan: StepPlan) -> Work:
    prefill = decodes = attended = 0
    for chunk in plan.chunks:
        size = chunk.stop - chunk.start
        if size == 1:
            decodes += 1
        else:
            prefill += size
        attended += size * chunk.start + size * (size + 1) // 2
    return Work(1, prefill, decodes, attended)


@dataclass(frozen=True)
class StepCost:
    """Seconds. The defaults: a model of 1.24 B parameters in Q4_K_M on a CPU."""

    step: float = 0.024
    prefill_token: float = 0.0075
    decode: float = 0.009
    attended: float = 1e-6
    """Per pair; keys and values of a position are read in about this time."""
    request: float = 0.0
    """Between a client and the scheduler, once per request: it delays and occupies nothing."""

    def seconds(self, work: Work) -> float:
        return (
            self.step * work.steps
            + self.prefill_token * work.prefill_tokens
            + self.decode * work.decodes
            + self.attended * work.attended
        )


@dataclass(frozen=True)
class Outcome:
    """What one job saw; seconds."""

    arrival: float
    ttft: float
    latency: float
    waited: float
    """Outside the batch, over all its waits."""
    aged: bool
    """It was started because it had waited long."""
    priority: int


@dataclass
class Run:
    outcomes: list[Outcome] = field(default_factory=list)
    """In the jobs' order."""
    work: Work = Work()
    longest_step: float = 0.0
    seconds: float = 0.0
    """Until the last job's end."""
    busy: float = 0.0
    """Of these, in steps."""
    preemptions: int = 0


def simulate(
    jobs: Many[Job],
    settings: SchedulerSettings,
    cost: StepCost,
    *,
    num_blocks: int = 1 << 14,
    max_context: int = 1 << 20,
    lengths_known: bool = False,
) -> Run:
    """Every job to its end. A job that the pool can never hold is an AssertionError.
    lengths_known: the policy's estimates of outputs are exact."""
    predictor = (lambda: _Known(jobs)) if lengths_known else OutputPredictor
    with mock.patch.object(policy, "OutputPredictor", predictor):
        return _Simulation(jobs, settings, cost, num_blocks, max_context).run()


class _Known(OutputPredictor):
    def __init__(self, jobs: Many[Job]) -> None:
        super().__init__()
        self._jobs = jobs

    def output_tokens(self, seq: Sequence) -> float:
        return self._jobs[seq.id].output


class _Simulation:
    def __init__(
        self,
        jobs: Many[Job],
        settings: SchedulerSettings,
        cost: StepCost,
        num_blocks: int,
        max_context: int,
    ) -> None:
        self._jobs, self._cost = jobs, cost
        tables = BlockTables(KvCache(BlockPool(num_blocks)), "simulated")
        self._scheduler = Scheduler(tables, settings, max_context)
        self._arrivals = [(job.arrival, i) for i, job in enumerate(jobs) if job.after is None]
        heapq.heapify(self._arrivals)
        self._followers: dict[int, list[int]] = {}
        for i, job in enumerate(jobs):
            if job.after is not None:
                assert job.after < i
                self._followers.setdefault(job.after, []).append(i)
        self._sequences: dict[int, Sequence] = {}
        self._outcomes: dict[int, Outcome] = {}
        self._run = Run()

    def run(self) -> Run:
        flights: deque[tuple[StepPlan, float, float]] = deque()
        scheduler, run = self._scheduler, self._run
        now = free_at = 0.0
        while len(self._outcomes) < len(self._jobs):
            self._take_in(now)
            plan = scheduler.plan(now) if scheduler.may_plan else None
            assert not scheduler.take_ended(), "no job has a deadline"
            if plan is not None:
                work = work_of(plan)
                seconds = self._cost.seconds(work)
                free_at = max(now, free_at) + seconds
                flights.append((plan, free_at, seconds))
                run.work += work
                run.busy += seconds
                run.longest_step = max(run.longest_step, seconds)
                if scheduler.may_plan:
                    continue
            if flights:
                plan, now, seconds = flights.popleft()
                self._take_in(now)
                result = StepResult(plan.step, self._sample(plan), seconds=seconds)
                for update in scheduler.commit(plan, result, now):
                    self._end(update, now)
            else:
                assert self._arrivals, "the scheduler has work and does nothing"
                now = max(now, self._arrivals[0][0])
        run.outcomes = [self._outcomes[i] for i in range(len(self._jobs))]
        run.seconds = now
        run.preemptions = sum(scheduler.preemptions.values())
        return run

    def _take_in(self, now: float) -> None:
        """Whoever has arrived until `now`."""
        while self._arrivals and self._arrivals[0][0] <= now:
            arrival, i = heapq.heappop(self._arrivals)
            job = self._jobs[i]
            sampling = SamplingParams(max_tokens=job.max_tokens, stop_token_ids=(STOP,))
            request = Request(str(i), job.prompt, sampling, job.priority, arrival)
            self._sequences[i] = Sequence(i, request)
            self._scheduler.add(self._sequences[i])

    def _sample(self, plan: StepPlan) -> tuple[Sampled, ...]:
        sampled = []
        for chunk in plan.chunks:
            if chunk.sample:
                job = self._jobs[chunk.seq]
                position = chunk.stop - len(job.prompt)
                last = position + 1 >= job.output
                sampled.append(
                    Sampled(chunk.seq, STOP if last else output_token(chunk.seq, position))
                )
        return tuple(sampled)

    def _end(self, update: SequenceUpdate, now: float) -> None:
        if update.finish_reason is None:
            return
        seq = update.seq
        arrival, first = seq.request.arrival, seq.first_token_at
        assert first is not None and seq.num_output_tokens == self._jobs[seq.id].output
        extra = self._cost.request
        self._outcomes[seq.id] = Outcome(
            arrival=arrival,
            ttft=first - arrival + extra,
            latency=now - arrival + extra,
            waited=seq.seconds_waited,
            aged=seq.aged,
            priority=seq.request.priority,
        )
        for i in self._followers.get(seq.id, ()):
            heapq.heappush(self._arrivals, (now + self._jobs[i].arrival, i))


def percentile(values: Many[float], percent: float) -> float:
    """Nearest rank: a value that occurred; 0 for no values."""
    if not values:
        return 0.0
    return sorted(values)[max(0, math.ceil(len(values) * percent / 100) - 1)]

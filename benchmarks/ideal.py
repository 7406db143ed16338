"""What a scheduler could do that knows every length and loses nothing by an interruption: in each
step the requests with the least left to do (shortest remaining processing time).

On one machine that serves one request at a time no order has a smaller mean latency (Schrage 1968).
For a batch that is not proven, so it is a mark to measure by and no bound.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence as Many
from dataclasses import dataclass

from simulator import Job, Outcome, StepCost, Work

from quantd.daemon.config import SchedulerSettings
from quantd.daemon.scheduler.division import STEP_SECONDS


@dataclass
class _Left:
    """A job that has arrived and has not ended."""

    job: Job
    id: int
    arrival: float
    prompt: int
    """Tokens of it still to compute, of those that no job before has had."""
    output: int
    first_at: float = 0.0
    served: float = 0.0
    """Seconds of steps that it was part of."""

    def seconds(self, cost: StepCost, max_running: int) -> float:
        return cost.prefill_token * self.prompt + self.output * (
            cost.decode + cost.step / max_running
        )


def least_left_first(jobs: Many[Job], settings: SchedulerSettings, cost: StepCost) -> list[Outcome]:
    """Every job to its end; the outcomes in the jobs' order."""
    arrivals = [(job.arrival, i) for i, job in enumerate(jobs) if job.after is None]
    heapq.heapify(arrivals)
    followers: dict[int, list[int]] = {}
    for i, job in enumerate(jobs):
        if job.after is not None:
            followers.setdefault(job.after, []).append(i)
    there: list[_Left] = []
    outcomes: dict[int, Outcome] = {}
    now = 0.0
    while len(outcomes) < len(jobs):
        if not there:
            now = max(now, arrivals[0][0])
        while arrivals and arrivals[0][0] <= now:
            arrival, i = heapq.heappop(arrivals)
            there.append(_Left(jobs[i], i, arrival, jobs[i].fresh, jobs[i].output))
        there.sort(key=lambda left: (left.seconds(cost, settings.max_running), left.id))
        batch = there[: settings.max_running]
        seconds = cost.seconds(_step(batch, settings, cost))
        now += seconds
        for left in batch:
            left.served += seconds
            if left.prompt == 0 and left.output == left.job.output - 1:
                left.first_at = left.first_at or now
            if left.output == 0:
                outcomes[left.id] = _outcome(left, now, cost)
                for i in followers.get(left.id, ()):
                    heapq.heappush(arrivals, (now + jobs[i].arrival, i))
        there = [left for left in there if left.output]
    return [outcomes[i] for i in range(len(jobs))]


def _step(batch: Many[_Left], settings: SchedulerSettings, cost: StepCost) -> Work:
    """A token for each that has its prompt; what is left of the step to the prompts, from the
    front. A step is no longer than the scheduler's."""
    budget = min(settings.token_budget, int(STEP_SECONDS / cost.prefill_token))
    budget -= sum(not left.prompt for left in batch)
    prefill = decodes = attended = 0
    for left in batch:
        size = min(left.prompt, budget) if left.prompt else 1
        start = len(left.job.prompt) - left.prompt + left.job.output - left.output
        if left.prompt:
            prefill += size
            budget -= size
            left.prompt -= size
        else:
            decodes += 1
        left.output -= size > 0 and left.prompt == 0
        attended += size * start + size * (size + 1) // 2
    return Work(1, prefill, decodes, attended)


def _outcome(left: _Left, now: float, cost: StepCost) -> Outcome:
    latency = now - left.arrival
    return Outcome(
        arrival=left.arrival,
        ttft=left.first_at - left.arrival + cost.request,
        latency=latency + cost.request,
        waited=latency - left.served,
        aged=False,
        priority=left.job.priority,
    )

"""Requests as a day may bring them, made from a seed: same seed, same trace.

Lengths are heavy-tailed, as recorded traces are. Half of the callers say how long their answer
may be to within a power of two; the other half ask for far more than they use.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

from simulator import FIRST_TOKEN, VOCABULARY, Job, StepCost, output_token

LARGE = 4096
"""The max_tokens of who does not know."""
HIGH, LOW = 0, 10
"""Priorities: one job in ten is HIGH."""


def _tokens(rng: random.Random, count: int) -> tuple[int, ...]:
    return tuple(FIRST_TOKEN + int(rng.random() * VOCABULARY) for _ in range(count))


def _lognormal(rng: random.Random, median: float, sigma: float, high: int) -> int:
    return max(1, min(high, round(median * rng.lognormvariate(0, sigma))))


def _pareto(rng: random.Random, low: float, alpha: float, high: int) -> int:
    return max(1, min(high, round(low * rng.paretovariate(alpha))))


def _job(rng: random.Random, arrival: float, prompt: tuple[int, ...], output: int) -> Job:
    known = 1 << (output - 1).bit_length()
    return Job(
        arrival=arrival,
        prompt=prompt,
        output=output,
        max_tokens=known if rng.random() < 0.5 else max(LARGE, known),
        priority=HIGH if rng.random() < 0.1 else LOW,
        fresh=len(prompt),
    )


def poisson(rng: random.Random, count: int) -> list[Job]:
    """Chats that come one by one: lognormal prompts, Pareto outputs."""
    now, jobs = 0.0, []
    for _ in range(count):
        now += rng.expovariate(1)
        prompt = _tokens(rng, _lognormal(rng, 120, 1.2, 4000))
        jobs.append(_job(rng, now, prompt, _pareto(rng, 24, 1.3, 1500)))
    return jobs


def bursts(rng: random.Random, count: int) -> list[Job]:
    """The same, but twelve on average come within a moment."""
    now, jobs = 0.0, []
    while len(jobs) < count:
        now += rng.expovariate(1 / 12)
        for _ in range(min(count - len(jobs), 1 + int(rng.expovariate(1 / 12)))):
            prompt = _tokens(rng, _lognormal(rng, 120, 1.2, 4000))
            arrival = now + 0.1 * rng.random()
            jobs.append(_job(rng, arrival, prompt, _pareto(rng, 24, 1.3, 1500)))
    return jobs


def agents(rng: random.Random, count: int) -> list[Job]:
    """Sessions of several turns over one of four long instructions; a turn is sent some seconds
    after the answer before it, with all that was said."""
    instructions = [_tokens(rng, 1500) for _ in range(4)]
    now, jobs = 0.0, []
    while len(jobs) < count:
        turns = min(count - len(jobs), 1 + int(rng.expovariate(1 / 5)))
        now += rng.expovariate(1 / turns)
        said = rng.choice(instructions)
        for turn in range(turns):
            new = _tokens(rng, _lognormal(rng, 80, 1.0, 1000))
            output = _lognormal(rng, 60, 0.8, 600)
            arrival = now if turn == 0 else rng.expovariate(1 / 4)
            job = _job(rng, arrival, said + new, output)
            after = None if turn == 0 else len(jobs) - 1
            jobs.append(replace(job, after=after, fresh=len(new)))
            made = tuple(output_token(len(jobs) - 1, i) for i in range(output - 1))
            said = said + new + made
    return jobs


def documents(rng: random.Random, count: int) -> list[Job]:
    """Chats, and one in twenty brings a document of up to 16,000 tokens for a short answer."""
    jobs = poisson(rng, count)
    for i, job in enumerate(jobs):
        if rng.random() < 0.05:
            prompt = _tokens(rng, _pareto(rng, 3000, 1.2, 16_000))
            output = _lognormal(rng, 80, 0.5, 300)
            jobs[i] = replace(_job(rng, job.arrival, prompt, output), priority=LOW)
    return jobs


TRACES: dict[str, Callable[[random.Random, int], list[Job]]] = {
    "poisson": poisson,
    "bursts": bursts,
    "agents": agents,
    "documents": documents,
}


def seconds_of(job: Job, cost: StepCost, max_running: int) -> float:
    """What a job takes of a machine whose batch is full: its share of the steps, of what is
    read, and its own tokens."""
    prompt, output = len(job.prompt), job.output
    read = job.fresh * (prompt - job.fresh / 2) + output * (prompt + output / 2)
    own = cost.prefill_token * job.fresh + cost.decode * output + cost.attended * read
    return own + cost.step * output / max_running


def make(
    name: str, seed: int, count: int, load: float, cost: StepCost, max_running: int
) -> list[Job]:
    """A trace whose jobs bring `load` seconds of work per second of arrivals. At 1 a batch that is
    always full just keeps up; jobs that wait for another's answer may come later than that."""
    jobs = TRACES[name](random.Random(f"{name}/{seed}"), count)
    work = sum(seconds_of(job, cost, max_running) for job in jobs)
    last = max(job.arrival for job in jobs if job.after is None)
    stretch = work / load / last
    return [
        replace(job, arrival=job.arrival * stretch) if job.after is None else job for job in jobs
    ]

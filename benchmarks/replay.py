"""A real daemon under a trace, and what its steps cost, learned from it.

The daemon serves the embedded model in float32, or a model that is given, with one thread;
everything goes through HTTP.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import aiohttp
import load
import numpy as np
from peers import Peer
from simulator import Job, StepCost, simulate

from quantd.daemon.config import SchedulerSettings

VOCABULARY = 1000
"""Of the embedded model, without its special tokens."""
FIRST_TOKEN = 20
SHAPES = (
    (1, 16, 2),
    (1, 16, 120),
    (1, 400, 1),
    (1, 1600, 1),
    (1, 1600, 60),
    (2, 100, 60),
    (3, 16, 120),
    (3, 200, 60),
    (4, 400, 20),
    (5, 16, 120),
    (6, 100, 60),
    (7, 16, 120),
    (8, 16, 120),
    (8, 200, 60),
)
"""(streams, prompt tokens, output tokens) of what is timed for a fit. Not powers of two alone:
kernels take rows in tiles, and 7 cost more than seven eighths of 8."""
REPEATS = 3


def demo(settings: SchedulerSettings, model: str = "") -> Peer:
    """How to start the daemon; its socket is where no other one looks."""
    socket = Path(tempfile.mkdtemp(), "quantd.sock")
    command = [sys.executable, "-m", "quantd.daemon", "serve"]
    command += [f"model={model}"] if model else ["model=embedded:demo", "--dtype", "float32"]
    command += ["--host", "127.0.0.1", "--port", "{port}", "--socket", str(socket)]
    command += ["--threads", "1", "--policy", settings.policy]
    command += ["--max-running", str(settings.max_running)]
    command += ["--token-budget", str(settings.token_budget)]
    return Peer("quantd", "quantd", tuple(command))


def for_demo(jobs: Sequence[Job]) -> list[Job]:
    """The same lengths and times in tokens that the embedded model has, with known ends."""
    return [
        replace(
            job,
            prompt=tuple(FIRST_TOKEN + token % VOCABULARY for token in job.prompt),
            max_tokens=job.output,
        )
        for job in jobs
    ]


async def replay(url: str, jobs: Sequence[Job]) -> list[tuple[float, float]]:
    """(ttft, latency) of each job, sent at its time. No job may follow another's answer."""
    timeout = aiohttp.ClientTimeout(total=600)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        start = time.perf_counter()

        async def send(job: Job) -> tuple[float, float]:
            assert job.after is None
            await asyncio.sleep(max(0.0, start + job.arrival - time.perf_counter()))
            body = {"prompt": list(job.prompt), "max_tokens": job.output}
            stream = await load.complete(session, url, "model", body)
            if stream.error:
                raise RuntimeError(f"a request failed: {stream.error}")
            # A first token without text that is the last one too shows in the end only.
            first = stream.token_times[0] if stream.token_times else stream.end
            return first - stream.start, stream.end - stream.start

        return await asyncio.gather(*(send(job) for job in jobs))


def fit(url: str, settings: SchedulerSettings, seed: int = 0) -> StepCost:
    """Least squares of relative errors over the whole times of SHAPES, none below zero. Each call
    to one daemon needs another `seed`, or its prompts are in the prefix cache."""
    rows, walls = [], []
    for streams, prompt, output in SHAPES:
        times = []
        for repeat in range(REPEATS):
            scenario = load.Scenario("fit", streams, prompt, output)
            jobs = for_demo(
                [
                    Job(0.0, tuple(p), output, output)
                    for p in scenario.prompts(seed * REPEATS + repeat)
                ]
            )
            seen = asyncio.run(replay(url, jobs))
            times.append(max(latency for _, latency in seen))
        work = simulate(jobs, settings, StepCost()).work
        rows.append([work.steps, work.prefill_tokens, work.decodes, work.attended, 1])
        walls.append(statistics.median(times))
    return StepCost(*_least_squares(rows, walls))


def _least_squares(rows: list[list[int]], walls: list[float]) -> list[float]:
    wall = np.array(walls)
    matrix = np.array(rows, dtype=float) / wall[:, None]
    used = list(range(matrix.shape[1]))
    while True:
        scale = np.linalg.norm(matrix[:, used], axis=0)
        solution = np.linalg.lstsq(matrix[:, used] / scale, np.ones(len(wall)), rcond=None)[0]
        if (solution >= 0).all():
            break
        del used[int(np.argmin(solution))]
    result = [0.0] * matrix.shape[1]
    for column, value in zip(used, solution / scale, strict=True):
        result[column] = float(value)
    return result

"""What the scheduler itself costs per step: python benchmarks/scheduler_cost.py

Times `Scheduler.plan` and `commit` in the steady state, every running sequence decoding and a
queue of waiting ones behind, and with a long prompt computed beside them. No model runs. The
times are of the CPU, so a busy machine does not show in them.
"""

from __future__ import annotations

import itertools
import statistics
import time

from quantd.daemon.config import SchedulerSettings
from quantd.daemon.kv.pool import BlockPool
from quantd.daemon.scheduler.scheduler import Scheduler
from quantd.daemon.scheduler.sequence import Sequence
from quantd.daemon.types import Request, Sampled, SamplingParams, StepPlan, StepResult

STEPS = 500
NUM_WAITING = 1000
LONG = 1_000_000


def make_scheduler(policy: str, num_running: int, *, long_prompt: bool) -> Scheduler:
    """`num_running` sequences that never end, one of them in its prompt if asked for."""
    settings = SchedulerSettings(
        policy=policy,  # type: ignore[arg-type]
        max_running=num_running,
        max_waiting=NUM_WAITING,
    )
    scheduler = Scheduler(BlockPool(10**6), settings, max_context=10**7)
    ids = itertools.count()

    def add(num_prompt_tokens: int) -> None:
        sampling = SamplingParams(max_tokens=LONG, stop_token_ids=(2, 3))
        seq_id = next(ids)
        scheduler.add(Sequence(seq_id, Request(str(seq_id), (1,) * num_prompt_tokens, sampling)))

    for _ in range(num_running - long_prompt):
        add(100)
    if long_prompt:
        add(2 * LONG)
    while scheduler.num_waiting:
        step(scheduler)
    for _ in range(NUM_WAITING):
        add(100)
    return scheduler


def step(scheduler: Scheduler) -> tuple[float, float, StepPlan]:
    """CPU seconds of one plan and of its commit."""
    start = time.thread_time()
    plan = scheduler.plan(start)
    planned = time.thread_time()
    assert plan is not None
    sampled = tuple(Sampled(chunk.seq, 7) for chunk in plan.chunks if chunk.sample)
    result = StepResult(plan.step, sampled)
    ran = time.thread_time()
    scheduler.commit(plan, result, ran)
    return planned - start, time.thread_time() - ran, plan


def measure(policy: str, num_running: int, *, long_prompt: bool) -> str:
    scheduler = make_scheduler(policy, num_running, long_prompt=long_prompt)
    timings = [step(scheduler) for _ in range(STEPS)]
    assert all(len(plan.chunks) == num_running for _, _, plan in timings)
    columns = []
    for seconds in ([t[0] for t in timings], [t[1] for t in timings]):
        microseconds = [s * 1e6 for s in seconds]
        p99 = statistics.quantiles(microseconds, n=100)[98]
        columns.append(f"{statistics.median(microseconds):8.0f} {p99:8.0f}")
    load = "decode + long prompt" if long_prompt else "decode"
    return f"{policy:9} {num_running:7} {load:21} {columns[0]}  {columns[1]}"


def main() -> None:
    print(f"{STEPS} steps each, {NUM_WAITING} waiting; CPU microseconds: median and p99")
    print(f"{'policy':9} {'running':>7} {'load':21} {'plan':>17}  {'commit':>17}")
    for policy in ("fcfs", "priority", "sjf"):
        for num_running in (64, 256):
            for long_prompt in (False, True):
                print(measure(policy, num_running, long_prompt=long_prompt))


if __name__ == "__main__":
    main()

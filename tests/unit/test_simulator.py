"""The simulator's arithmetic: times that can be worked out by hand."""

from __future__ import annotations

import pytest
import traces
from ideal import least_left_first
from simulator import Job, StepCost, Work, percentile, simulate

from quantd.daemon.config import SchedulerSettings

COST = StepCost(step=1.0, prefill_token=0.1, decode=0.5, attended=0.0)


def job(arrival: float, prompt: int, output: int, **fields: int) -> Job:
    tokens = tuple(range(1000 * (int(arrival) + 1), 1000 * (int(arrival) + 1) + prompt))
    return Job(arrival, tokens, output, max_tokens=100, **fields)


def test_one_job_alone() -> None:
    run = simulate([job(5.0, 10, 3)], SchedulerSettings(), COST)
    # Its prompt takes 1 + 10 * 0.1 = 2 s and brings the first token; two decodes of 1.5 s follow.
    [outcome] = run.outcomes
    assert outcome.ttft == pytest.approx(2.0)
    assert outcome.latency == pytest.approx(5.0)
    assert outcome.waited == 0
    # One decode more was planned before the stop token was known, and it is not waited for.
    assert run.work == Work(4, 10, 3, 10 * 11 // 2 + 11 + 12 + 13)
    assert run.seconds == pytest.approx(10.0)
    assert run.longest_step == pytest.approx(2.0)


def test_who_comes_during_a_step_waits_for_the_one_that_is_planned_too() -> None:
    run = simulate([job(0.0, 10, 3), job(1.0, 10, 1)], SchedulerSettings(), COST)
    first, second = run.outcomes
    # Steps: [0, 2) the first prompt, [2, 3.5) its decode, planned at 0; at 2 the second prompt
    # joins the other decode: 1 + 10 * 0.1 + 0.5 = 2.5 s, until 6.
    assert first.latency == pytest.approx(6.0)
    assert second.ttft == pytest.approx(5.0)
    assert second.waited == pytest.approx(1.0)


def test_one_place_is_taken_in_turn() -> None:
    settings = SchedulerSettings(max_running=1, overlap=False)
    run = simulate([job(0.0, 10, 1), job(1.0, 20, 1)], settings, COST)
    # [0, 2) and [2, 5): the second waits one second and is computed for three.
    assert [o.latency for o in run.outcomes] == pytest.approx([2.0, 4.0])
    assert run.outcomes[1].waited == pytest.approx(1.0)
    assert run.busy == pytest.approx(5.0)


def test_a_turn_follows_its_answer_and_shares_its_blocks() -> None:
    first = job(0.0, 32, 1)
    turn = Job(3.0, (*first.prompt, *range(5000, 5016)), 1, 1, after=0)
    run = simulate([first, turn], SchedulerSettings(overlap=False), COST)
    assert run.outcomes[0].latency == pytest.approx(4.2)
    assert run.outcomes[1].arrival == pytest.approx(7.2)
    # Only the 16 tokens that are new: 1 + 1.6 s.
    assert run.outcomes[1].latency == pytest.approx(2.6)


def test_shortest_first_lets_the_short_one_pass() -> None:
    jobs = [job(0.0, 10, 1), job(1.0, 200, 1), job(2.0, 10, 1)]
    jobs[1] = Job(0.5, jobs[1].prompt, 1, 100)
    ends = {}
    for policy in ("fcfs", "sjf"):
        settings = SchedulerSettings(policy=policy, max_running=1, overlap=False)  # type: ignore[arg-type]
        run = simulate([jobs[0], jobs[1], Job(1.5, jobs[2].prompt, 1, 100)], settings, COST)
        ends[policy] = [outcome.arrival + outcome.latency for outcome in run.outcomes]
    assert ends["fcfs"] == pytest.approx([2, 23, 25])
    assert ends["sjf"] == pytest.approx([2, 25, 4])


def test_who_is_told_the_lengths_is_not_misled_by_what_callers_ask_for() -> None:
    # A first step takes 1.1 s; meanwhile a long answer that is asked for as a short one waits, and
    # the other way round.
    first = Job(0.0, (5,), 1, 1)
    jobs = [first, Job(0.1, (6,), 40, 50), Job(0.2, (7,), 2, 100)]
    settings = SchedulerSettings(policy="sjf", max_running=1, overlap=False)
    for known, shorter in ((False, 1), (True, 2)):
        run = simulate(jobs, settings, COST, lengths_known=known)
        assert min((1, 2), key=lambda i: run.outcomes[i].waited) == shorter


def test_least_left_first_interrupts_at_no_cost() -> None:
    settings = SchedulerSettings(max_running=1)
    cost = StepCost(step=0.0, prefill_token=0.1, decode=0.5, attended=0.0)
    long = Job(0.0, tuple(range(3, 23)), 1, 1, fresh=20)
    short = Job(0.4, (100, 101), 3, 3, fresh=2)
    # Steps of 0.5 s: five tokens of the long prompt, then the short one's two, which bring its
    # first token, and its two decodes of 0.5 s; then the other fifteen in three steps.
    first, second = least_left_first([long, short], settings, cost)
    assert (second.ttft, second.latency) == pytest.approx((0.3, 1.3))
    assert (first.ttft, first.latency) == pytest.approx((3.2, 3.2))
    assert first.waited == pytest.approx(1.2)


def test_least_left_first_knows_what_turns_share() -> None:
    first = Job(0.0, tuple(range(3, 35)), 1, 1, fresh=32)
    turn = Job(3.0, (*first.prompt, 50), 2, 2, after=0, fresh=1)
    cost = StepCost(step=1.0, prefill_token=0.1, decode=0.5, attended=0.0)
    outcomes = least_left_first([first, turn], SchedulerSettings(), cost)
    # 32 tokens in steps of five: seven steps.
    assert outcomes[0].latency == pytest.approx(7 + 3.2)
    assert outcomes[1].arrival == pytest.approx(13.2)
    assert (outcomes[1].ttft, outcomes[1].latency) == pytest.approx((1.1, 2.6))


@pytest.mark.parametrize("name", traces.TRACES)
def test_a_trace_is_the_same_again_and_brings_the_load_it_says(name: str) -> None:
    cost, load = StepCost(), 0.5
    jobs = traces.make(name, 3, 60, load, cost, 8)
    assert jobs == traces.make(name, 3, 60, load, cost, 8)
    work = sum(traces.seconds_of(job, cost, 8) for job in jobs)
    last = max(job.arrival for job in jobs if job.after is None)
    assert work / last == pytest.approx(load)
    assert all(1 <= job.output <= job.max_tokens for job in jobs)


def test_percentile_is_a_value_that_occurred() -> None:
    values = [3.0, 1.0, 2.0, 4.0]
    assert [percentile(values, p) for p in (0, 50, 75, 99)] == [1, 2, 3, 4]
    assert percentile([], 99) == 0

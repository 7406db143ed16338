"""Lines of batches: they give way to everybody else, and get on under any load."""

from __future__ import annotations

import random

import pytest
from fakes import StepLoop
from hypothesis import given
from hypothesis import strategies as st

from quantd.daemon.config import SchedulerSettings
from quantd.daemon.errors import QueueFull
from quantd.daemon.scheduler import admission
from quantd.daemon.scheduler.division import BATCH_STEP_SECONDS
from quantd.daemon.scheduler.sequence import Phase
from quantd.daemon.scheduler.share import BATCH_SHARE, BatchShare
from quantd.daemon.types import StepPlan

POLICIES = ["fcfs", "priority", "sjf"]


def settings(policy: str = "fcfs", **fields: object) -> SchedulerSettings:
    return SchedulerSettings(policy=policy, **fields)  # type: ignore[arg-type]


def tokens_of(loop: StepLoop, plan: StepPlan, *, is_batch: bool) -> int:
    return sum(
        chunk.stop - chunk.start
        for chunk in plan.chunks
        if loop.sequences[chunk.seq].request.is_batch is is_batch
    )


# --- the share of a step --------------------------------------------------------------------------


@given(
    steps=st.lists(
        st.tuples(
            st.lists(st.integers(1, 300), min_size=1, max_size=8),
            st.lists(st.integers(10, 300), min_size=1, max_size=8),  # always enough
        ),
        min_size=1,
        max_size=60,
    )
)
def test_lines_get_a_tenth_of_the_others_and_never_more(
    steps: list[tuple[list[int], list[int]]],
) -> None:
    share, budget, num_others, num_lines = BatchShare(), 64, 0, 0
    for others, lines in steps:
        sizes = share.divide(budget, others, lines)
        assert len(sizes) == len(others) + len(lines) and sum(sizes) <= budget
        of_others, of_lines = sizes[: len(others)], sizes[len(others) :]
        assert all(1 <= size <= left for size, left in zip(of_others, others, strict=True))
        assert all(0 <= size <= left for size, left in zip(of_lines, lines, strict=True))
        num_others += sum(of_others)
        num_lines += sum(of_lines)
    assert num_lines <= BATCH_SHARE * num_others + 1e-6
    last = BATCH_SHARE * budget  # what the last step has earned is spent in the next one
    assert num_lines > BATCH_SHARE * num_others - last - 1 - 1e-6


def test_alone_lines_get_all() -> None:
    assert BatchShare().divide(10, [], [4, 9]) == [4, 6]
    assert BatchShare().divide(10, [3], []) == [3]


def test_lines_take_no_token_that_one_of_the_others_needs() -> None:
    share = BatchShare()
    for _ in range(100):
        share.divide(64, [64], [64])
    assert share.divide(8, [5] * 8, [64]) == [1] * 8 + [0]
    assert share.divide(8, [1] * 6, [64]) == [1] * 6 + [1]


def test_what_lines_did_not_use_is_not_saved_up() -> None:
    """At most a tenth of a step, and the token that it may be short of."""
    share = BatchShare()
    for _ in range(1000):
        share.divide(60, [60], [1])
    assert share.divide(60, [1], [60]) == [1, 7]
    assert share.divide(60, [1], [60]) == [1, 0]


# --- who starts, who makes way --------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
def test_whoever_waits_for_an_answer_goes_first(policy: str) -> None:
    loop = StepLoop(settings=settings(policy, max_running=1))
    line = loop.add(5, max_tokens=2, is_batch=True, priority=-5)
    other = loop.add(5, max_tokens=2, priority=5)
    loop.run()
    assert [new.seq for plan in loop.plans for new in plan.add] == [other.id, line.id]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("overlap", [False, True])
def test_a_line_that_runs_makes_way_in_a_full_batch(policy: str, overlap: bool) -> None:
    loop = StepLoop(settings=settings(policy, max_running=2), overlap=overlap)
    lines = [loop.add(5, max_tokens=30, is_batch=True) for _ in range(2)]
    for _ in range(4):
        loop.step()
    other = loop.add(5, max_tokens=3)
    loop.begin() if loop.scheduler.may_plan else loop.step()
    loop.step()
    assert other.phase is not Phase.WAITING
    assert sum(line.phase is Phase.WAITING for line in lines) == 1
    loop.run()
    loop.check_outputs()


@pytest.mark.parametrize("policy", POLICIES)
def test_lines_never_displace_anybody(policy: str) -> None:
    loop = StepLoop(settings=settings(policy, max_running=1))
    other = loop.add(5, max_tokens=20, priority=9)
    loop.step()
    loop.add(5, max_tokens=2, is_batch=True, priority=-9)
    loop.run()
    assert other.num_preemptions == 0


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("max_running", [1, 2, 8])
def test_lines_get_on_under_an_endless_load(policy: str, max_running: int) -> None:
    """As many others as find a place at any time; and a line ends all the same."""
    loop = StepLoop(
        num_blocks=256,
        settings=settings(policy, max_running=max_running, aging_seconds=10, token_budget=64),
    )
    lines = [loop.add(40, max_tokens=10, is_batch=True) for _ in range(3)]
    for _ in range(6000):
        while loop.scheduler.num_waiting - loop.scheduler.num_lines_waiting < 2:
            loop.add(8, max_tokens=12)
        loop.step()
        loop.clock.advance(0.1)
        if all(line.finished_at is not None for line in lines):
            break
    else:
        pytest.fail("the lines starve")
    loop.run()
    loop.check_outputs()


def test_while_others_run_lines_compute_a_tenth_of_what_they_do() -> None:
    loop = StepLoop(num_blocks=512, max_context=4000, settings=settings(max_running=16))
    for _ in range(4):
        loop.add(10, max_tokens=500)
    for _ in range(6):
        loop.add(300, max_tokens=400, is_batch=True)
    loop.step()  # the others' prompts
    plans = []
    for _ in range(400):
        loop.step()
        plans.append(loop.plans[-1])
    others = [tokens_of(loop, plan, is_batch=False) for plan in plans]
    lines = [tokens_of(loop, plan, is_batch=True) for plan in plans]
    assert others == [4] * 400, "the others are never held up"
    assert sum(lines) == pytest.approx(BATCH_SHARE * sum(others), abs=8)
    assert max(lines) <= 8
    loop.run()
    loop.check_outputs()


def test_a_step_of_lines_alone_is_short() -> None:
    loop = StepLoop(num_blocks=512, max_context=6000, settings=settings(token_budget=2048))
    line = loop.add(3000, max_tokens=2, is_batch=True)
    loop.begin()
    loop.clock.advance(1.0)
    loop.end()
    seconds = loop.kv.cost.token_seconds
    if seconds is not None:
        plan = loop.begin()
        assert plan is not None
        tokens = plan.chunks[0].stop - plan.chunks[0].start
        assert tokens <= max(256, int(BATCH_STEP_SECONDS / seconds), 65)
        loop.end()
    loop.run()
    assert line.phase is Phase.FINISHED


@pytest.mark.parametrize("seed", range(20))
def test_with_few_blocks_everybody_ends_with_the_same_tokens(seed: int) -> None:
    """An overdue line holds blocks, keeps its place and sits most steps out."""
    rng = random.Random(seed)
    loop = StepLoop(
        num_blocks=12,
        max_context=180,
        settings=settings(max_running=4, aging_seconds=0.5, token_budget=32),
    )
    for _ in range(30):
        loop.add(rng.randint(1, 100), max_tokens=rng.randint(1, 70), is_batch=rng.random() < 0.5)
        for _ in range(rng.randint(0, 20)):
            loop.step()
            loop.clock.advance(0.05)
    loop.run()
    loop.check_outputs()
    assert loop.pool.num_used == 0


# --- the queue's bound ----------------------------------------------------------------------------


def test_lines_that_wait_do_not_take_the_others_places_in_the_queue() -> None:
    loop = StepLoop(settings=settings(max_running=1, max_waiting=1))
    loop.add(5, max_tokens=50)
    loop.step()
    line = loop.add(5, is_batch=True)
    other = next(iter(loop.sequences.values())).request
    admission.check_queue(other, loop.scheduler, 0.0)
    with pytest.raises(QueueFull):
        admission.check_queue(line.request, loop.scheduler, 0.0)
    loop.run()

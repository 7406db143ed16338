"""Who goes first: fcfs, sjf and priority, and what age does to each."""

from __future__ import annotations

import math
import random

import pytest
from fakes import StepLoop

from quantd.daemon.config import SchedulerSettings
from quantd.daemon.scheduler.sequence import Phase, Sequence
from quantd.daemon.types import BLOCK_TOKENS


def settings(policy: str, **fields: object) -> SchedulerSettings:
    return SchedulerSettings(policy=policy, **fields)  # type: ignore[arg-type]


def start_order(loop: StepLoop) -> list[int]:
    return [new.seq for plan in loop.plans for new in plan.add]


def test_fcfs_starts_in_order_of_arrival_whatever_the_priority() -> None:
    loop = StepLoop(settings=settings("fcfs", max_running=1))
    for priority in (2, 0, 1):
        loop.add(5, max_tokens=2, priority=priority)
        loop.clock.advance(1)
    loop.run()
    assert start_order(loop) == [0, 1, 2]


# --- shortest job first ---------------------------------------------------------------------------


def test_sjf_starts_the_least_work_first() -> None:
    loop = StepLoop(settings=settings("sjf", max_running=1))
    loop.add(100, max_tokens=100)
    loop.add(90, max_tokens=20)
    loop.add(20, max_tokens=60)
    loop.run()
    assert start_order(loop) == [2, 1, 0]


def test_sjf_learns_how_long_a_callers_outputs_are() -> None:
    loop = StepLoop(settings=settings("sjf", max_running=1))
    loop.add(5, max_tokens=3, caller="terse")
    loop.add(5, max_tokens=80, caller="verbose")
    loop.run()
    verbose = loop.add(5, max_tokens=100, caller="verbose")
    terse = loop.add(20, max_tokens=100, caller="terse")
    loop.run()
    assert start_order(loop)[-2:] == [terse.id, verbose.id]


def test_under_sjf_whoever_has_much_less_left_takes_the_place_of_who_has_most() -> None:
    loop = StepLoop(num_blocks=200, settings=settings("sjf", max_running=2, token_budget=40))
    long = [loop.add(num, max_tokens=40) for num in (600, 400)]
    loop.step()
    near = loop.add(160, max_tokens=20)  # more than a quarter of what both have left
    loop.step()
    assert near.phase is Phase.WAITING
    short = loop.add(10, max_tokens=10)
    loop.step()
    assert [seq.phase for seq in long] == [Phase.WAITING, Phase.RUNNING]
    assert short.phase is Phase.RUNNING
    loop.run()
    loop.check_outputs()
    assert [seq.num_preemptions for seq in (*long, near, short)] == [1, 0, 0, 0]
    computed = sum(c.stop - c.start for plan in loop.plans for c in plan.chunks)
    once = 600 + 400 + 160 + 10 + 39 + 39 + 19 + 9
    assert once <= computed < once + BLOCK_TOKENS  # all but a block that was not full


def test_under_sjf_what_is_nearly_done_keeps_its_place() -> None:
    loop = StepLoop(num_blocks=200, settings=settings("sjf", max_running=1))
    long = loop.add(600, max_tokens=40)
    loop.step()
    assert long.num_computed_tokens == 256
    while long.num_computed_tokens < 600:
        loop.step()
    loop.add(10, max_tokens=5)
    loop.run()
    assert long.num_preemptions == 0
    loop.check_outputs()


@pytest.mark.parametrize(("caller", "num_preemptions"), [("busy", 0), ("new", 1)])
def test_under_sjf_nobody_displaces_a_caller_who_has_had_less(
    caller: str, num_preemptions: int
) -> None:
    loop = StepLoop(num_blocks=200, settings=settings("sjf", max_running=1))
    other = loop.add(800, max_tokens=1, caller="other")
    for num in (300, 900):
        loop.add(num, max_tokens=1, caller="busy")
    while other.num_computed_tokens < 256:
        loop.step()
    loop.add(5, max_tokens=2, caller=caller)
    loop.step()
    assert other.num_preemptions == num_preemptions
    loop.run()
    loop.check_outputs()


def test_under_sjf_age_ends_that_a_long_one_is_displaced() -> None:
    loop = StepLoop(
        num_blocks=400, settings=settings("sjf", max_running=1, aging_seconds=10, token_budget=20)
    )
    long = loop.add(2000, max_tokens=1)
    seen = []
    for i in range(90):
        loop.step()
        loop.clock.advance(1)
        if i % 3 == 0:
            loop.add(5, max_tokens=1)
        seen.append(long.num_preemptions)
    assert long.aged and seen[-1] > 1
    assert seen[-30:] == [seen[-1]] * 30
    loop.run()
    loop.check_outputs()


LONG_PROMPT = 32_000
SHORT_PROMPT = 500
TOKENS_PER_SECOND = 250.0
LOAD = 0.95


def wait_of_a_long_job(aging_seconds: float, seed: int, patience: float) -> float:
    """Seconds until a long job starts on a machine kept 95 % busy by Poisson short ones.

    Discrete events: one job at a time, and a step takes as long as its tokens. Gives up, with
    what has passed, after `patience` seconds.
    """
    rng = random.Random(seed)
    loop = StepLoop(
        num_blocks=4096,
        settings=settings("sjf", max_running=1, token_budget=1000, aging_seconds=aging_seconds),
    )
    rate = LOAD * TOKENS_PER_SECOND / SHORT_PROMPT
    for _ in range(20):  # the long one comes in the middle of a busy hour
        loop.add(SHORT_PROMPT, max_tokens=1)
    long = loop.add(LONG_PROMPT, max_tokens=1)
    next_arrival = rng.expovariate(rate)
    while long.started_at is None and loop.clock() < patience:
        plan = loop.begin()
        assert plan is not None
        tokens = sum(chunk.stop - chunk.start for chunk in plan.chunks)
        end = loop.clock() + tokens / TOKENS_PER_SECOND
        while next_arrival <= end:
            loop.clock.advance(next_arrival - loop.clock())
            loop.add(SHORT_PROMPT, max_tokens=1)
            next_arrival += rng.expovariate(rate)
        loop.clock.advance(end - loop.clock())
        loop.end()
    return loop.clock() if long.queue_seconds is None else long.queue_seconds


AGING_SECONDS = 60.0
BOUND = AGING_SECONDS + 2 * SHORT_PROMPT / TOKENS_PER_SECOND
"""Its age, and the job that runs at that moment."""


@pytest.mark.parametrize("seed", range(4))
def test_with_aging_a_long_job_starts_within_the_bound(seed: int) -> None:
    assert AGING_SECONDS <= wait_of_a_long_job(AGING_SECONDS, seed, patience=1000) <= BOUND


@pytest.mark.parametrize("seed", range(4))
def test_without_aging_the_same_job_starves(seed: int) -> None:
    """The negative control: the load above does starve it."""
    assert wait_of_a_long_job(math.inf, seed, patience=2 * BOUND) > 1.5 * BOUND


# --- priority -------------------------------------------------------------------------------------


def test_priority_starts_the_smallest_number_first() -> None:
    loop = StepLoop(settings=settings("priority", max_running=1))
    for priority in (2, 1, 1, 0):
        loop.add(5, max_tokens=2, priority=priority)
    loop.run()
    assert start_order(loop) == [3, 1, 2, 0]


def test_a_smaller_number_starts_at_once_in_a_full_batch() -> None:
    loop = StepLoop(settings=settings("priority", max_running=3))
    low = [loop.add(10, max_tokens=20, priority=p) for p in (5, 7, 7)]
    for _ in range(4):
        loop.step()
    urgent = loop.add(10, max_tokens=20, priority=1)
    assert [update.seq for update in loop.step()] == [urgent, low[0], low[1]]
    assert loop.scheduler.preemptions == {"memory": 0, "priority": 1}
    assert [seq.num_preemptions for seq in low] == [0, 0, 1]  # the larger number, the later one
    loop.run()
    loop.check_outputs()


def test_equal_numbers_never_displace_each_other() -> None:
    loop = StepLoop(settings=settings("priority", max_running=2))
    for _ in range(20):
        loop.add(10, max_tokens=10, priority=3)
        loop.clock.advance(1)
        loop.step()
    loop.run()
    assert loop.scheduler.preemptions == {"memory": 0, "priority": 0}
    assert start_order(loop) == list(range(20))


def test_a_displaced_sequence_does_not_displace_back() -> None:
    loop = StepLoop(settings=settings("priority", max_running=1))
    low = loop.add(10, max_tokens=10, priority=1)
    loop.step()
    high = loop.add(10, max_tokens=10, priority=0)
    loop.run()
    assert (low.num_preemptions, high.num_preemptions) == (1, 0)
    loop.check_outputs()


def test_a_restart_does_not_count_as_the_start() -> None:
    loop = StepLoop(settings=settings("priority", max_running=1))
    low = loop.add(10, max_tokens=10, priority=1)
    loop.clock.advance(2)
    loop.step()
    loop.add(10, max_tokens=10, priority=0)
    while loop.scheduler.has_work:
        loop.clock.advance(1)
        loop.step()
    assert (low.num_preemptions, low.queue_seconds) == (1, 2)


def test_displaced_many_times_and_still_the_same_tokens() -> None:
    loop = StepLoop(settings=settings("priority", max_running=1))
    low = loop.add(10, max_tokens=40, priority=1)
    for _ in range(5):
        for _ in range(6):
            loop.step()
        loop.add(10, max_tokens=2, priority=0)
    loop.run()
    assert low.num_preemptions == 5
    loop.check_outputs()


def test_it_displaces_for_blocks_as_many_as_it_needs_and_no_more() -> None:
    loop = StepLoop(num_blocks=16, settings=settings("priority", max_running=8))
    low = [loop.add(16 * 4 - 8, max_tokens=4, priority=5 + i) for i in range(3)]
    loop.step()
    loop.add(16 * 6, max_tokens=2, priority=0)
    loop.step()
    assert [seq.phase for seq in low] == [Phase.RUNNING, Phase.RUNNING, Phase.WAITING]
    loop.run()
    loop.check_outputs()


def test_it_displaces_nobody_where_that_would_not_be_enough() -> None:
    loop = StepLoop(num_blocks=16, settings=settings("priority", max_running=8))
    equal = loop.add(16 * 10 - 8, max_tokens=8, priority=0)
    low = loop.add(16 * 2 - 8, max_tokens=8, priority=9)
    loop.step()
    loop.add(16 * 8, max_tokens=2, priority=0)
    loop.step()
    assert {equal.phase, low.phase} == {Phase.RUNNING}
    loop.run()
    assert loop.scheduler.preemptions == {"memory": 0, "priority": 0}
    loop.check_outputs()


def test_what_it_shares_with_whom_it_displaces_is_no_gain() -> None:
    """Five of the victim's six blocks are its own beginning, which it needs all the same."""
    loop = StepLoop(num_blocks=16, settings=settings("priority", max_running=8))
    loop.add(16 * 6 - 8, max_tokens=8, priority=0)
    beginning = list(range(100, 100 + 16 * 5))
    low = loop.add(0, max_tokens=8, prompt=[*beginning, 1, 2, 3, 4], priority=9)
    loop.step()
    urgent = loop.add(0, max_tokens=2, prompt=[*beginning, *range(16 * 6)], priority=0)
    loop.step()
    assert (low.phase, urgent.phase) == (Phase.RUNNING, Phase.WAITING)
    smaller = loop.add(0, max_tokens=2, prompt=[*beginning, *range(16 * 3)], priority=-1)
    loop.step()
    assert (low.phase, smaller.phase) == (Phase.WAITING, Phase.RUNNING)
    loop.run()
    loop.check_outputs()


def test_what_a_victim_shares_with_another_running_one_does_not_come_free() -> None:
    loop = StepLoop(num_blocks=16, settings=settings("priority", max_running=8))
    beginning = list(range(100, 100 + 16 * 6))
    loop.add(0, max_tokens=8, prompt=[*beginning, 1], priority=0)
    low = loop.add(0, max_tokens=8, prompt=[*beginning, 2], priority=9)
    loop.step()
    assert loop.kv.num_available == 8
    urgent = loop.add(16 * 10, max_tokens=1, priority=0)
    loop.step()
    assert (low.phase, urgent.phase) == (Phase.RUNNING, Phase.WAITING)
    loop.run()
    assert sum(loop.scheduler.preemptions.values()) == 0
    loop.check_outputs()


def test_what_a_victim_has_a_claim_to_is_gained_too() -> None:
    """Its prompt is computed to a small part, and the rest is kept for it."""
    loop = StepLoop(num_blocks=24, settings=settings("priority", token_budget=32))
    loop.add(16 * 4, max_tokens=2, priority=0)
    low = loop.add(16 * 16, max_tokens=2, priority=9)
    loop.step()
    urgent = loop.add(16 * 18, max_tokens=2, priority=0)
    loop.step()
    assert (low.phase, urgent.phase) == (Phase.WAITING, Phase.RUNNING)
    loop.run()
    loop.check_outputs()


def test_it_displaces_nobody_where_an_overdue_one_waits_for_the_room() -> None:
    loop = StepLoop(num_blocks=32, settings=settings("priority", aging_seconds=5.0))
    low = loop.add(16 * 4 - 8, max_tokens=8, priority=5)
    loop.step()
    overdue = loop.add(16 * 31, max_tokens=2, priority=9)
    loop.step()
    loop.clock.advance(6)
    urgent = loop.add(16 * 10, max_tokens=8, priority=0)
    while low.phase is not Phase.FINISHED:
        loop.step()
        assert (low.num_preemptions, urgent.phase) == (0, Phase.WAITING)
    loop.step()
    assert overdue.phase is Phase.RUNNING
    loop.run()
    loop.check_outputs()


def test_a_smaller_number_displaces_whatever_its_caller_has_had() -> None:
    loop = StepLoop(settings=settings("priority", max_running=1))
    loop.add(100, max_tokens=1, priority=0, caller="busy")
    low = loop.add(10, max_tokens=20, priority=5, caller="new")
    while low.phase is Phase.WAITING:
        loop.step()
    urgent = loop.add(10, max_tokens=2, priority=1, caller="busy")
    loop.step()
    assert (low.phase, urgent.phase) == (Phase.WAITING, Phase.RUNNING)
    loop.run()
    loop.check_outputs()


def low_one_under_endless_load(aging_seconds: float, max_running: int) -> tuple[StepLoop, Sequence]:
    """100 s of small numbers that always fill the batch, and one large number from the start."""
    loop = StepLoop(
        settings=settings("priority", max_running=max_running, aging_seconds=aging_seconds)
    )
    low = loop.add(10, max_tokens=30, priority=9)
    for _ in range(200):
        while loop.scheduler.num_waiting < max_running:
            loop.add(10, max_tokens=5, priority=0)
        loop.step()
        loop.clock.advance(0.5)
    return loop, low


@pytest.mark.parametrize("max_running", [1, 4, 16])
def test_with_aging_a_large_number_is_served_under_an_endless_load(max_running: int) -> None:
    loop, low = low_one_under_endless_load(10.0, max_running)
    assert low.phase is Phase.FINISHED
    assert low.finished_at is not None and low.finished_at <= 10 + 0.5 * (5 + 30 + 1)
    loop.check_outputs()


def test_without_aging_it_starves() -> None:
    _, low = low_one_under_endless_load(math.inf, 4)
    assert low.phase is Phase.WAITING


def test_urgent_ones_start_at_once_under_a_load_that_is_all_overdue() -> None:
    """A backlog older than aging_seconds holds an eighth of the batch and displaces nobody."""
    loop = StepLoop(num_blocks=256, settings=settings("priority", max_running=8, aging_seconds=1.0))
    for _ in range(60):
        loop.add(10, max_tokens=20, priority=9)
    for _ in range(10):
        loop.step()
        loop.clock.advance(1)
    for _ in range(12):
        urgent = loop.add(10, max_tokens=3, priority=0)
        assert urgent in [update.seq for update in loop.step()]
        loop.clock.advance(1)
    assert sum(seq.aged for seq in loop.sequences.values() if seq.phase is Phase.RUNNING) == 1
    loop.run()
    loop.check_outputs()


def test_room_that_an_overdue_one_waits_for_is_not_taken_by_others() -> None:
    """Who displaces lives on what it displaces, also where the free room would do."""
    loop = StepLoop(num_blocks=32, settings=settings("priority", aging_seconds=5.0))
    for _ in range(3):
        loop.add(16 * 4 - 8, max_tokens=8, priority=5)
    loop.step()
    overdue = loop.add(16 * 24, max_tokens=2, priority=9)
    loop.step()
    loop.clock.advance(6)
    free = loop.kv.num_available
    urgent = loop.add(16 * 8, max_tokens=8, priority=0)
    loop.step()
    assert (overdue.phase, urgent.phase) == (Phase.WAITING, Phase.RUNNING)
    assert (sum(loop.scheduler.preemptions.values()), loop.kv.num_available) == (2, free)
    loop.run()
    loop.check_outputs()


def test_an_overdue_one_that_displaces_uses_the_free_room_too() -> None:
    loop = StepLoop(num_blocks=32, settings=settings("priority", aging_seconds=5.0))
    equal = loop.add(16 * 12 - 8, max_tokens=4, priority=5)
    lower = loop.add(16 * 4 - 8, max_tokens=8, priority=9)
    loop.step()
    large = loop.add(16 * 28, max_tokens=2, priority=5)
    loop.clock.advance(6)
    while equal.phase is Phase.RUNNING:
        loop.step()
        assert large.phase is Phase.WAITING  # without the equal one's blocks it would not fit
    loop.step()
    assert (large.phase, lower.phase) == (Phase.RUNNING, Phase.WAITING)
    loop.run()
    loop.check_outputs()


def test_room_gained_by_displacing_serves_the_next_in_the_same_step() -> None:
    loop = StepLoop(num_blocks=32, settings=settings("priority"))
    loop.add(16 * 30 - 8, max_tokens=8, priority=9)
    loop.step()
    urgent = [loop.add(16 * 5, max_tokens=2, priority=0) for _ in range(3)]
    assert [update.seq for update in loop.step()] == urgent
    loop.run()
    loop.check_outputs()


def test_time_spent_running_is_not_waiting() -> None:
    """One that is displaced after a long run is not overdue at once."""
    loop = StepLoop(settings=settings("priority", max_running=1, aging_seconds=5.0))
    low = loop.add(10, max_tokens=100, priority=1)
    for _ in range(20):
        loop.step()
        loop.clock.advance(1)
    for _ in range(3):
        loop.add(10, max_tokens=2, priority=0)
    while low.phase is Phase.RUNNING or low.num_preemptions == 0:
        loop.step()
    assert low.waiting_since == 20
    while low.phase is Phase.WAITING:
        loop.step()
        loop.clock.advance(1)
    assert (low.aged, low.seconds_waited) == (True, 5.0)
    loop.run()
    loop.check_outputs()

"""The scheduler's small parts alone: budget shares, the queue, the predictor, the pace."""

from __future__ import annotations

import math
import random

import pytest
from fakes import make_request
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from quantd.daemon.config import SchedulerSettings
from quantd.daemon.scheduler.deadlines import Deadlines, is_hopeless, why_hopeless
from quantd.daemon.scheduler.pace import StartPace
from quantd.daemon.scheduler.policy import Fcfs, make_policy
from quantd.daemon.scheduler.predict import WINDOW, OutputPredictor
from quantd.daemon.scheduler.ready import ReadyQueue
from quantd.daemon.scheduler.sequence import Sequence
from quantd.daemon.scheduler.share import share_budget
from quantd.daemon.scheduler.shares import CallerShares

# --- shares ---------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.integers(1, 5000), max_size=40), st.integers(0, 3000))
def test_shares_are_exact_and_leave_nobody_out(left: list[int], extra: int) -> None:
    budget = len(left) + extra
    sizes = share_budget(budget, left)
    assert sum(sizes) == min(budget, sum(left))
    assert all(1 <= size <= most for size, most in zip(sizes, left, strict=True))
    prompts = sum(tokens > 1 for tokens in left)
    for size, tokens in zip(sizes, left, strict=True):
        assert size == tokens or size >= 1 + extra // 2 // prompts


@settings(deadline=None)
@given(st.lists(st.integers(1, 500), max_size=20), st.integers(0, 3000))
def test_who_has_less_left_is_not_behind(left: list[int], extra: int) -> None:
    after = [a - b for a, b in zip(left, share_budget(len(left) + extra, left), strict=True)]
    for a, b in zip(left, after, strict=True):
        for c, d in zip(left, after, strict=True):
            assert a >= c or b <= d


def test_prompts_of_the_same_length_finish_one_after_another() -> None:
    sizes = share_budget(2048, [100] * 60)
    assert sizes[:5] == [100] * 5
    assert min(sizes) == 1 + (2048 - 60) // 2 // 60


# --- the queue ------------------------------------------------------------------------------------


def sequence(seq_id: int, arrival: float, priority: int = 0) -> Sequence:
    return Sequence(seq_id, make_request([1], arrival=arrival, priority=priority))


AGING = 10.0


def one_caller() -> CallerShares:
    shares = CallerShares({})
    shares.enter("")
    return shares


class ReadyMachine(RuleBasedStateMachine):
    """The queue against a plain list that is searched."""

    def __init__(self) -> None:
        super().__init__()
        self.policy = make_policy(SchedulerSettings(policy="priority"))
        self.queue = ReadyQueue(self.policy, AGING, one_caller())
        self.waiting: list[Sequence] = []
        self.taken: list[Sequence] = []
        self.now = 0.0
        self.next_id = 0

    @rule(priority=st.integers(0, 2))
    def add(self, priority: int) -> None:
        seq = sequence(self.next_id, self.now, priority)
        self.next_id += 1
        self.queue.add(seq)
        self.waiting.append(seq)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        seq = self.waiting.pop(data.draw(st.integers(0, len(self.waiting) - 1)))
        self.queue.remove(seq)
        seq.seconds_waited += self.now - seq.waiting_since
        self.taken.append(seq)

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def come_back(self, data: st.DataObject) -> None:
        seq = self.taken.pop(data.draw(st.integers(0, len(self.taken) - 1)))
        seq.waiting_since = self.now
        self.queue.add(seq)
        self.waiting.append(seq)

    @rule(seconds=st.integers(0, 6))
    def time_passes(self, seconds: int) -> None:
        self.now += seconds

    @invariant()
    def agrees(self) -> None:
        self.queue.check()
        assert len(self.queue) == len(self.waiting)
        first = min(self.waiting, key=self.policy.start_key, default=None)
        assert self.queue.first() is first
        overdue = [
            seq
            for seq in self.waiting
            if seq.seconds_waited + self.now - seq.waiting_since >= AGING
        ]
        earliest = min(overdue, key=lambda seq: (seq.request.arrival, seq.id), default=None)
        assert self.queue.first_overdue(self.now) is earliest


TestReadyMachine = ReadyMachine.TestCase


def test_removed_sequences_do_not_pile_up() -> None:
    queue = ReadyQueue(Fcfs(), math.inf, one_caller())
    stays = sequence(0, 0.0)
    queue.add(stays)
    for i in range(1, 5000):
        seq = sequence(i, float(i))
        queue.add(seq)
        queue.remove(seq)
    assert len(queue._by_due_time._heap) < 50
    assert len(queue._by_caller[""]._heap) < 50
    assert queue.first() is stays


# --- callers' shares ------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_callers_are_charged_by_weight_and_begin_level_with_those_who_are_there(seed: int) -> None:
    rng = random.Random(seed)
    weights = {"a": 0.5, "b": 4.0}
    shares = CallerShares(weights)
    requests: dict[str, int] = {}
    used: dict[str, float] = {}
    last = 0.0
    for _ in range(2000):
        caller, what = rng.choice("abc"), rng.random()
        if what < 0.4:
            if caller not in requests:
                used[caller], requests[caller] = min(used.values(), default=last), 0
            requests[caller] += 1
            shares.enter(caller)
        elif caller not in requests:
            continue
        elif what < 0.8:
            requests[caller] -= 1
            if not requests[caller]:
                del requests[caller]
                last = used.pop(caller)
            shares.leave(caller)
        else:
            used[caller] += 10 / weights.get(caller, 1.0)
            shares.charge(caller, 10)
        assert {caller: shares.used(caller) for caller in requests} == used
        assert shares._used.keys() == shares._num_requests.keys() == requests.keys()


# --- deadlines ------------------------------------------------------------------------------------


def timed(seq_id: int, deadline: float | None, num_prompt_tokens: int = 1) -> Sequence:
    return Sequence(seq_id, make_request([1] * num_prompt_tokens, deadline=deadline))


@pytest.mark.parametrize("seed", range(5))
def test_each_is_due_once_and_in_time(seed: int) -> None:
    """Against a dictionary, with many that come and go, so that the heap is swept."""
    rng = random.Random(seed)
    deadlines, live = Deadlines(), dict[int, Sequence]()
    for now in range(2000):
        for i in range(3):
            deadline = float(now + rng.randint(1, 300)) if rng.random() < 0.8 else None
            seq = timed(3 * now + i, deadline)
            deadlines.add(seq)
            live[seq.id] = seq
        for seq in rng.sample(list(live.values()), rng.randint(0, min(4, len(live)))):
            deadlines.remove(seq)
            del live[seq.id]
        due = deadlines.due(now)
        over = {i for i, seq in live.items() if (seq.request.deadline or math.inf) <= now}
        assert len(due) == len(over) and {seq.id for seq in due} == over
        for seq in due:
            deadlines.remove(seq)
            del live[seq.id]


@pytest.mark.parametrize(
    ("num_known_blocks", "now", "is_late"),
    [(0, 0.0, False), (0, 0.5, True), (2, 2.0, False), (2, 2.5, True), (6, 6.0, False)],
)
def test_what_is_hopeless(num_known_blocks: int, now: float, is_late: bool) -> None:
    """A hundred tokens of 0.0625 s each, until 6.25."""
    seq = timed(0, 6.25, 100)
    assert is_hopeless(seq, num_known_blocks, now, 0.0625) is is_late
    assert not is_hopeless(seq, num_known_blocks, now, None)
    assert not is_hopeless(timed(0, None, 100), num_known_blocks, now, 0.0625)
    assert why_hopeless(seq) == (
        "the timeout of 6.25 s cannot be met: at the present speed the 100 tokens of the prompt "
        "take longer than what is left of it"
    )


# --- predicted work -------------------------------------------------------------------------------


def finished(caller: str, num_output_tokens: int) -> Sequence:
    seq = Sequence(0, make_request([1, 2], max_tokens=10_000, caller=caller))
    seq.tokens.extend([7] * num_output_tokens)
    return seq


def waiting(caller: str, max_tokens: int, num_prompt_tokens: int = 5) -> Sequence:
    return Sequence(1, make_request([1] * num_prompt_tokens, max_tokens=max_tokens, caller=caller))


def test_with_no_history_a_request_is_taken_at_its_word() -> None:
    assert OutputPredictor().work_left(waiting("a", 40)) == 45


def test_the_estimate_is_the_callers_own_or_else_everybodys_and_never_over_max_tokens() -> None:
    predictor = OutputPredictor()
    for n in (10, 30):
        predictor.observe(finished("a", n))
    predictor.observe(finished("b", 80))
    assert predictor.output_tokens(waiting("a", 1000)) == 20
    assert predictor.output_tokens(waiting("b", 1000)) == 80
    assert predictor.output_tokens(waiting("new", 1000)) == 40
    assert predictor.output_tokens(waiting("b", 50)) == 50


def test_work_left_shrinks_with_what_is_done() -> None:
    predictor = OutputPredictor()
    predictor.observe(finished("a", 20))
    seq = waiting("a", 1000, num_prompt_tokens=100)
    assert predictor.work_left(seq) == 120
    seq.num_known_blocks = 5
    assert predictor.work_left(seq) == 40
    seq.tokens.extend([7] * 25)
    seq.num_known_blocks = 7
    assert predictor.work_left(seq) == 14  # 13 tokens without a block, and at least one to come


def test_the_estimate_follows_a_change() -> None:
    predictor = OutputPredictor()
    for _ in range(1000):
        predictor.observe(finished("a", 10))
    for _ in range(4 * WINDOW):
        predictor.observe(finished("a", 500))
    assert predictor.output_tokens(waiting("a", 10_000)) == pytest.approx(500, rel=0.05)


# --- the pace -------------------------------------------------------------------------------------


def test_the_pace_is_the_mean_time_between_starts() -> None:
    pace = StartPace()
    pace.waits_from(100.0)
    for now in (102.0, 102.0, 104.0, 104.0):
        pace.started(now)
    assert pace.seconds_per_start(104.0) == 1.0


def test_a_queue_that_stands_still_is_not_called_fast() -> None:
    pace = StartPace()
    for now in (1.0, 2.0, 3.0):
        pace.started(now)
    assert pace.seconds_per_start(23.0) == 20.0


def test_an_idle_hour_is_not_a_slow_queue() -> None:
    pace = StartPace()
    pace.started(1.0)
    pace.waits_from(3601.0)
    pace.started(3602.0)
    assert pace.seconds_per_start(3602.0) == 1.0

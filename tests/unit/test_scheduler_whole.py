"""Prompts that are computed in one step: encoders, and vectors of all hidden states.

`StepLoop` checks of each plan that its prompts are whole and within the budget.
"""

from __future__ import annotations

from fakes import StepLoop
from hypothesis import given
from hypothesis import strategies as st

from quantd.daemon.config import SchedulerSettings
from quantd.daemon.scheduler.sequence import Phase

CALLS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 90), st.integers(0, 2)),
        st.tuples(st.just("begin"), st.just(0), st.just(0)),
        st.tuples(st.just("end"), st.just(0), st.just(0)),
        st.tuples(st.just("abort"), st.integers(0, 20), st.just(0)),
    ),
    max_size=60,
)


def lengths(loop: StepLoop) -> list[list[int]]:
    return [[chunk.stop for chunk in plan.chunks] for plan in loop.plans]


def test_as_many_prompts_as_the_budget_has_room_for() -> None:
    loop = StepLoop(settings=SchedulerSettings(token_budget=100), whole=True)
    for length in (40, 50, 20, 30, 100, 1):
        loop.add(length, max_tokens=1)
    loop.run()
    assert lengths(loop) == [[40, 50], [20, 30], [100], [1]]
    assert set(loop.reasons().values()) == {"length"} and loop.pool.num_used == 0


def test_a_prompt_over_the_budget_goes_alone() -> None:
    loop = StepLoop(settings=SchedulerSettings(token_budget=64), whole=True)
    for length in (200, 10, 150):
        loop.add(length, max_tokens=1)
    loop.run()
    assert lengths(loop) == [[200], [10], [150]]


def test_equal_prompts_take_nothing_over() -> None:
    loop = StepLoop(whole=True)
    for _ in range(3):
        loop.add(48, max_tokens=1, prompt=range(48))
    loop.run()
    loop.add(48, max_tokens=1, prompt=range(48))
    loop.run()
    assert sum(map(len, lengths(loop))) == 4
    assert (loop.pool.num_cached, loop.kv.tree.num_nodes) == (0, 0), "nothing is kept for anybody"


def test_the_prompt_of_a_displaced_one_is_computed_again_from_its_beginning() -> None:
    settings = SchedulerSettings(policy="priority", max_running=1)
    loop = StepLoop(settings=settings, overlap=True, whole=True)
    loop.add(40, max_tokens=1, priority=2)
    assert loop.begin() is not None
    loop.add(40, max_tokens=1, priority=0)
    assert loop.begin() is not None
    loop.run()
    assert set(loop.reasons()) == {0, 1}
    loop.check_outputs()


@given(
    calls=CALLS,
    policy=st.sampled_from(["fcfs", "priority", "sjf"]),
    overlap=st.booleans(),
    budget=st.integers(16, 64),
    max_running=st.integers(1, 5),
)
def test_any_calls(
    calls: list[tuple[str, int, int]], policy: str, overlap: bool, budget: int, max_running: int
) -> None:
    settings = SchedulerSettings(
        policy=policy,  # type: ignore[arg-type]
        token_budget=budget,
        max_running=max_running,
    )
    loop = StepLoop(num_blocks=12, settings=settings, overlap=overlap, whole=True)
    aborted: set[int] = set()
    for call, number, priority in calls:
        if call == "add":
            loop.add(number, max_tokens=1, priority=priority)
        elif call == "begin" and loop.scheduler.may_plan:
            loop.begin()
        elif call == "end" and loop.in_flight:
            loop.end()
        elif call == "abort" and loop.scheduler.abort(number):
            aborted.add(number)
        loop.clock.advance(0.1)
    loop.run()
    ended = set(loop.reasons())
    assert ended | aborted == set(loop.sequences)
    assert all(seq.phase is Phase.FINISHED for seq in loop.sequences.values())
    assert loop.pool.num_used == 0
    loop.check_outputs()

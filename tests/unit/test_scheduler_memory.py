"""What happens when the blocks run out."""

from __future__ import annotations

import random

from fakes import StepLoop

from quantd.daemon.config import SchedulerSettings
from quantd.daemon.scheduler.sequence import Phase
from quantd.daemon.types import SamplingParams


def test_two_that_each_need_over_half_of_the_pool() -> None:
    """The older one never loses a step; the younger one comes back and says the same."""
    loop = StepLoop(num_blocks=10)
    older = loop.add(16, max_tokens=100)
    younger = loop.add(16, max_tokens=100)
    computed = -1
    while older.phase is not Phase.FINISHED:
        loop.step()
        assert older.num_tokens > computed
        computed = older.num_tokens
    loop.run(max_steps=300)
    assert older.num_preemptions == 0
    assert 1 <= younger.num_preemptions <= 2
    loop.check_outputs()


def test_many_preemptions_change_no_token() -> None:
    """The youngest loses its blocks again and again as the older ones grow and finish."""
    loop = StepLoop(num_blocks=24)
    for i in range(8):
        loop.add(16, max_tokens=40 + 40 * i)
    last = loop.add(16, max_tokens=200)
    loop.run()
    assert last.num_preemptions >= 3
    counts = loop.scheduler.preemptions
    assert counts["memory"] >= last.num_preemptions and counts["priority"] == 0
    loop.check_outputs()


def test_a_preempted_sequence_comes_back_with_its_output() -> None:
    loop = StepLoop(num_blocks=6)
    loop.add(16, max_tokens=70)
    younger = loop.add(16, max_tokens=40)
    while younger.num_preemptions == 0:
        loop.step()
    kept = younger.num_output_tokens
    assert kept > 0
    assert (younger.phase, younger.blocks, younger.num_computed_tokens) == (Phase.WAITING, [], 0)
    assert younger.id in loop.plans[-1].drop
    assert younger.num_known_blocks == 3
    loop.run()
    back = [new for plan in loop.plans for new in plan.add if new.seq == younger.id]
    assert [len(new.tokens) for new in back] == [16, 16 + kept]
    assert all(new.num_prompt_tokens == 16 for new in back)
    loop.check_outputs()


def test_a_prompt_does_not_start_where_it_would_be_preempted_at_once() -> None:
    loop = StepLoop(num_blocks=8)
    loop.add(16 * 5, max_tokens=20)
    loop.step()
    waiting = loop.add(16 * 3, max_tokens=5)
    loop.step()
    assert waiting.phase is Phase.WAITING
    loop.run()
    assert loop.scheduler.preemptions == {"memory": 0, "priority": 0}
    loop.check_outputs()


def test_prompts_in_progress_keep_their_claim_on_blocks() -> None:
    """A second prompt does not start on blocks that the first one's later chunks need."""
    loop = StepLoop(num_blocks=20, settings=SchedulerSettings(token_budget=32))
    loop.add(16 * 12, max_tokens=2)
    second = loop.add(16 * 12, max_tokens=2)
    loop.step()
    assert second.phase is Phase.WAITING
    loop.run()
    assert loop.scheduler.preemptions == {"memory": 0, "priority": 0}
    loop.check_outputs()


def test_what_is_behind_a_large_one_does_not_keep_it_waiting_for_ever() -> None:
    loop = StepLoop(num_blocks=16)
    for _ in range(4):
        loop.add(32, max_tokens=30)
    loop.step()
    large = loop.add(16 * 14, max_tokens=4)
    steps = 0
    while large.started_at is None:
        loop.add(8, max_tokens=4)
        loop.step()
        steps += 1
    assert steps <= 30
    loop.run()
    loop.check_outputs()


def test_a_sequence_that_fills_the_pool_to_the_last_position() -> None:
    loop = StepLoop(num_blocks=4)
    loop.add(16, max_tokens=49)
    loop.run()
    assert len(loop.outputs[0]) == 49
    assert loop.reasons() == {0: "length"}


def test_prompt_logprobs_survive_preemption_of_a_half_computed_prompt() -> None:
    loop = StepLoop(num_blocks=64, settings=SchedulerSettings(token_budget=16, policy="priority"))
    sampling = SamplingParams(max_tokens=2, prompt_logprobs=1)
    seq = loop.add(100, sampling=sampling, priority=1)
    for _ in range(3):
        loop.step()
    loop.add(16 * 60, max_tokens=1, priority=0)
    loop.run()
    assert seq.num_preemptions == 1
    update = next(u for u in loop.updates if u.seq is seq)
    assert [p.token for p in update.prompt_logprobs[1:] if p] == list(seq.request.prompt[1:])
    assert len(update.prompt_logprobs) == 100


def workload(seed: int) -> StepLoop:
    rng = random.Random(seed)
    policy = rng.choice(["fcfs", "priority", "sjf"])
    loop = StepLoop(
        num_blocks=24, settings=SchedulerSettings(max_running=6, token_budget=48, policy=policy)
    )
    for _ in range(60):
        if rng.random() < 0.5:
            loop.add(rng.randint(1, 120), rng.randint(1, 80), priority=rng.randint(0, 2))
        loop.clock.advance(rng.random())
        loop.step()
    loop.run()
    return loop


def test_random_loads_finish_exactly_and_the_same_each_time() -> None:
    preemptions = 0
    for seed in range(6):
        loop = workload(seed)
        assert set(loop.reasons()) == set(loop.sequences)
        assert loop.pool.num_used == 0
        loop.check_outputs()
        assert loop.plans == workload(seed).plans
        preemptions += sum(loop.scheduler.preemptions.values())
    assert preemptions > 10  # or these loads would test nothing


def test_who_leaves_and_comes_back_in_one_plan_takes_no_token_twice() -> None:
    """What it had in flight is of its stay before."""
    settings = SchedulerSettings(policy="priority")
    loop = StepLoop(num_blocks=12, settings=settings, overlap=True)
    large = loop.add(80, 30, priority=1, caller="a")
    small = loop.add(20, 30, priority=1, caller="b")
    for _ in range(8):
        loop.step()
    loop.add(120, 2, priority=0, caller="c")
    while not large.num_preemptions:
        if not loop.scheduler.may_plan:
            loop.end()
        loop.begin()
    # Both had to go, and the small one, whose caller has had less, fits again.
    assert (small.num_preemptions, small.phase, loop.in_flight) == (1, Phase.RUNNING, True)
    loop.run()
    loop.check_outputs()

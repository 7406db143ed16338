"""Scheduler.plan and commit: chunks, budget, ends, aborts, and what the worker is told."""

from __future__ import annotations

import pytest
from fakes import StepLoop, expected_output

from quantd.daemon.config import SchedulerSettings
from quantd.daemon.scheduler.sequence import Phase
from quantd.daemon.types import BLOCK_TOKENS, Chunk, Sampled, SamplingParams, StepResult


def settings(**fields: object) -> SchedulerSettings:
    return SchedulerSettings(**fields)  # type: ignore[arg-type]


def test_one_request_from_prompt_to_end() -> None:
    loop = StepLoop()
    seq = loop.add(20, max_tokens=3)
    loop.run()
    assert [plan.chunks for plan in loop.plans] == [
        (Chunk(0, 0, 20, blocks=(0, 1), sample=True),),
        (Chunk(0, 20, 21, sample=True),),
        (Chunk(0, 21, 22, sample=True),),
    ]
    assert loop.plans[0].add[0].tokens == seq.request.prompt
    assert all(not plan.add for plan in loop.plans[1:])
    assert loop.reasons() == {0: "length"}
    assert (seq.phase, seq.num_output_tokens, loop.pool.num_used) == (Phase.FINISHED, 3, 0)
    loop.check_outputs()


def test_a_long_prompt_goes_in_chunks_and_samples_once_at_its_end() -> None:
    loop = StepLoop(settings=settings(token_budget=32, max_running=4))
    loop.add(70, max_tokens=1)
    loop.run()
    chunks = [plan.chunks[0] for plan in loop.plans]
    assert [(c.start, c.stop, c.sample) for c in chunks] == [
        (0, 32, False),
        (32, 64, False),
        (64, 70, True),
    ]
    assert len(loop.updates) == 1


def test_a_new_block_comes_with_the_token_that_needs_it() -> None:
    loop = StepLoop()
    loop.add(BLOCK_TOKENS - 1, max_tokens=4)
    loop.run()
    assert [len(plan.chunks[0].blocks) for plan in loop.plans] == [1, 0, 1, 0]


def test_decodes_go_on_while_prompts_are_computed() -> None:
    loop = StepLoop(num_blocks=512, settings=settings(token_budget=32))
    decoding = [loop.add(4, max_tokens=40) for _ in range(3)]
    loop.step()
    loop.add(2000, max_tokens=1)
    for _ in range(30):
        plan = loop.begin()
        assert plan is not None
        sizes = {chunk.seq: chunk.stop - chunk.start for chunk in plan.chunks}
        assert [sizes[seq.id] for seq in decoding] == [1, 1, 1]
        assert 32 - 4 < sum(sizes.values()) <= 32  # whole blocks where that costs little
        loop.end()


def test_a_short_prompt_is_not_stuck_behind_a_long_one() -> None:
    loop = StepLoop(num_blocks=1024, settings=settings(token_budget=256))
    long = loop.add(10_000, max_tokens=1)
    loop.step()
    short = loop.add(100, max_tokens=1)
    before = long.num_computed_tokens
    assert [update.seq for update in loop.step()] == [short]
    assert long.num_computed_tokens > before


def test_128k_tokens_beside_16_decodes_delay_no_token_by_more_than_a_step() -> None:
    """Nobody skips a step, no step is longer than its budget, and a short request that comes
    meanwhile has its first token after one."""
    loop = StepLoop(num_blocks=9000, settings=settings(token_budget=2048))
    loop.kv.cost.computed(1000, 0.01)  # fast, so that the budget alone bounds a step
    decoding = [loop.add(8, max_tokens=200) for _ in range(16)]
    loop.step()
    long = loop.add(131_072, max_tokens=1)
    steps = 0
    while long.first_token_at is None:
        short = loop.add(60, max_tokens=1) if steps % 20 == 5 else None
        updated = {update.seq.id for update in loop.step()}
        assert {seq.id for seq in decoding} <= updated
        assert short is None or short.id in updated
        size = sum(chunk.stop - chunk.start for chunk in loop.plans[-1].chunks)
        assert size <= 2048
        steps += 1
    # Nor does it pay for them: nearly all of each step is the long prompt's.
    assert steps <= 131_072 / (2048 - 16 - 60) + 2


@pytest.mark.parametrize(
    ("token_seconds", "num_tokens"),
    [(None, 256), (1e-5, 2048), (1e-3, 500), (0.1, 64 + 1)],
)
def test_a_step_s_prompts_take_half_a_second(token_seconds: float | None, num_tokens: int) -> None:
    """As measured; before that, and on a machine that is slower than that, a small number."""
    loop = StepLoop(num_blocks=1024, settings=settings(token_budget=2048))
    if token_seconds is not None:
        loop.kv.cost.computed(100, 100 * token_seconds)
    loop.add(5000, max_tokens=1)
    loop.step()
    (chunk,) = loop.plans[0].chunks
    assert num_tokens - 16 < chunk.stop <= num_tokens


def test_a_long_prompt_gets_on_behind_ever_new_short_ones() -> None:
    loop = StepLoop(num_blocks=1024, settings=settings(token_budget=64, max_running=8))
    long = loop.add(1000, max_tokens=1)
    steps = 0
    while long.first_token_at is None:
        for _ in range(4):
            loop.add(40, max_tokens=1)
        loop.step()
        steps += 1
    assert steps <= 1000 // (32 // 8)  # half the budget over at most eight prompts
    for seq in loop.sequences.values():
        loop.scheduler.abort(seq.id)


def test_no_more_run_at_once_than_max_running() -> None:
    loop = StepLoop(settings=settings(max_running=3))
    for _ in range(8):
        loop.add(5, max_tokens=5)
    most = 0
    while loop.scheduler.has_work:
        plan = loop.begin()
        assert plan is not None
        most = max(most, len(plan.chunks))
        assert loop.scheduler.num_running == len(plan.chunks)
        loop.end()
    assert most == 3
    loop.check_outputs()


def test_the_budget_bounds_the_batch_too() -> None:
    loop = StepLoop(settings=settings(max_running=64, token_budget=16))
    for _ in range(20):
        loop.add(3, max_tokens=5)
    loop.run()
    assert max(len(plan.chunks) for plan in loop.plans) == 16
    loop.check_outputs()


# --- how a sequence ends --------------------------------------------------------------------------


def first_tokens(n: int) -> list[int]:
    """The first outputs of a request that `StepLoop.add(10)` makes first."""
    loop = StepLoop()
    loop.add(10, max_tokens=n)
    loop.run()
    return loop.outputs[0]


def test_a_stop_token_ends_it_and_counts_as_output() -> None:
    tokens = first_tokens(5)
    assert tokens[3] not in tokens[:3]
    loop = StepLoop()
    seq = loop.add(10, sampling=SamplingParams(max_tokens=5, stop_token_ids=(tokens[3],)))
    loop.run()
    assert loop.updates[-1].finish_reason == "stop"
    assert loop.updates[-1].tokens == (tokens[3],)
    assert (seq.output_tokens, seq.num_output_tokens) == (tokens[:4], 4)


def test_stop_beats_length_when_both_come_at_once() -> None:
    tokens = first_tokens(3)
    loop = StepLoop()
    loop.add(10, sampling=SamplingParams(max_tokens=3, stop_token_ids=(tokens[2],)))
    loop.run()
    assert loop.reasons() == {0: "stop"}


def test_min_tokens_holds_stop_tokens_back() -> None:
    stop = first_tokens(1)[0]
    sampling = SamplingParams(max_tokens=8, min_tokens=3, stop_token_ids=(stop,))
    loop = StepLoop()
    seq = loop.add(10, sampling=sampling)
    loop.run()
    assert seq.num_output_tokens > 3
    loop.check_outputs()


@pytest.mark.parametrize("overlap", [False, True])
def test_a_complete_grammar_ends_it_with_a_token_that_is_text(overlap: bool) -> None:
    """Also before min_tokens and as the last that max_tokens allows, and what a plan in flight
    has computed beyond it is dropped."""
    for num_tokens, max_tokens in ((2, 8), (3, 3)):
        loop = StepLoop(settings=settings(overlap=overlap))
        seq = loop.add(10, sampling=SamplingParams(max_tokens=max_tokens, min_tokens=max_tokens))
        loop.worker.completes[seq.id] = num_tokens
        loop.run()
        last = loop.updates[-1]
        assert (last.finish_reason, last.complete) == ("stop", True)
        assert last.tokens == (seq.output_tokens[-1],)
        assert seq.num_output_tokens == num_tokens
        assert [update.complete for update in loop.updates[:-1]] == [False] * (num_tokens - 1)
        assert loop.pool.num_used == 0


def test_a_stop_token_is_hidden_also_where_the_grammar_is_complete() -> None:
    tokens = first_tokens(2)
    loop = StepLoop()
    seq = loop.add(10, sampling=SamplingParams(max_tokens=5, stop_token_ids=(tokens[1],)))
    loop.worker.completes[seq.id] = 2
    loop.run()
    assert (loop.updates[-1].finish_reason, loop.updates[-1].complete) == ("stop", False)


def test_the_context_ends_it() -> None:
    loop = StepLoop(max_context=13)
    seq = loop.add(10, max_tokens=100)
    loop.run()
    assert (loop.reasons(), seq.num_tokens) == ({0: "length"}, 13)


@pytest.mark.parametrize(("max_context", "max_tokens"), [(20, 100), (100, 10)])
def test_what_is_certain_to_end_is_not_planned_ahead(max_context: int, max_tokens: int) -> None:
    """Nor has the worker a place for a position beyond the context."""
    loop = StepLoop(max_context=max_context, overlap=True)
    seq = loop.add(10, max_tokens=max_tokens)
    loop.run()
    assert seq.num_tokens == 20
    assert [chunk.stop for plan in loop.plans for chunk in plan.chunks] == list(range(10, 20))


def test_an_error_ends_only_its_own_sequence() -> None:
    loop = StepLoop()
    bad, good = loop.add(10), loop.add(12)
    loop.step()
    loop.worker.errors[bad.id] = "logits are not finite"
    loop.run()
    assert loop.reasons() == {bad.id: "error", good.id: "length"}
    update = next(u for u in loop.updates if u.finish_reason == "error")
    assert (update.error, update.tokens) == ("logits are not finite", ())
    assert loop.pool.num_used == 0
    loop.check_outputs()


@pytest.mark.parametrize(("is_excluded", "reason"), [(False, "error"), (True, "excluded")])
def test_an_error_says_whose_fault_it_is(is_excluded: bool, reason: str) -> None:
    loop = StepLoop()
    seq = loop.add(10)
    plan = loop.scheduler.plan(0.0)
    assert plan is not None
    sampled = Sampled(seq.id, 0, error="nothing is left", is_excluded=is_excluded)
    (update,) = loop.scheduler.commit(plan, StepResult(plan.step, (sampled,)), 0.0)
    assert (update.finish_reason, update.error) == (reason, "nothing is left")


# --- aborts and drops -----------------------------------------------------------------------------


def test_abort_of_a_waiting_sequence() -> None:
    loop = StepLoop(settings=settings(max_running=1))
    loop.add(5)
    waiting = loop.add(5)
    loop.step()
    assert loop.scheduler.abort(waiting.id)
    assert not loop.scheduler.abort(waiting.id)
    loop.run()
    assert loop.reasons() == {0: "length"}
    assert waiting.phase is Phase.FINISHED
    assert all(waiting.id not in plan.drop for plan in loop.plans)


def test_abort_while_its_step_is_in_flight() -> None:
    loop = StepLoop()
    gone, stays = loop.add(40), loop.add(8)
    loop.begin()
    assert loop.scheduler.abort(gone.id)
    loop.scheduler.check()
    assert loop.pool.num_used == 1
    assert [update.seq for update in loop.end()] == [stays]
    assert gone.num_output_tokens == 0
    plan = loop.begin()
    assert plan is not None and plan.drop == (gone.id,)
    loop.end()
    loop.run()
    loop.check_outputs()


def test_blocks_of_an_aborted_sequence_are_given_out_by_the_next_plan() -> None:
    loop = StepLoop(num_blocks=2)
    gone = loop.add(32, max_tokens=1)
    loop.begin()
    loop.scheduler.abort(gone.id)
    heir = loop.add(32, max_tokens=1)
    loop.end()
    plan = loop.begin()
    assert plan is not None
    assert (plan.drop, plan.chunks[0].blocks) == ((gone.id,), (0, 1))
    assert [update.seq for update in loop.end()] == [heir]
    loop.check_outputs()


def test_abort_of_an_unknown_sequence() -> None:
    loop = StepLoop()
    seq = loop.add(5, max_tokens=1)
    loop.run()
    assert not loop.scheduler.abort(seq.id)
    assert not loop.scheduler.abort(99)


def test_drops_wait_for_the_next_plan_and_are_not_lost() -> None:
    loop = StepLoop()
    loop.add(5, max_tokens=1)
    loop.run()
    assert loop.scheduler.plan(1.0) is None
    assert list(loop.worker.rows) == [0]
    loop.add(5, max_tokens=1)
    loop.run()
    assert loop.plans[-1].drop == (0,)
    assert list(loop.worker.rows) == [1]


def test_the_worker_remembers_at_most_one_batch() -> None:
    loop = StepLoop(settings=settings(max_running=3))
    for i in range(40):
        seq = loop.add(1 + i % 20, max_tokens=1 + i % 3)
        loop.step()
        if i % 5 == 0:
            loop.scheduler.abort(seq.id)
        assert len(loop.worker.rows) <= 3
    loop.run()
    assert len(loop.worker.rows) <= 3


@pytest.mark.parametrize("overlap", [False, True])
def test_what_is_computed_is_charged_to_its_caller(overlap: bool) -> None:
    loop = StepLoop(settings=settings(token_budget=16, caller_weights={"b": 2.0}), overlap=overlap)
    loop.add(70, max_tokens=50, caller="a")
    loop.add(40, max_tokens=50, caller="b")
    for _ in range(30):
        loop.step()
    computed = {seq_id: 0 for seq_id in loop.sequences}
    for chunk in (chunk for plan in loop.plans for chunk in plan.chunks):
        computed[chunk.seq] += chunk.stop - chunk.start
    used = loop.scheduler._queues._others.shares.used
    assert (used("a"), used("b")) == (computed[0], computed[1] / 2)
    loop.run()


# --- logprobs and times ---------------------------------------------------------------------------


def test_what_a_step_cost_is_learnt_of_its_own_plan() -> None:
    """Two prompts in steps that take a second for 50 tokens, with a plan ahead."""
    loop = StepLoop(settings=settings(token_budget=50, max_running=4), overlap=True)
    loop.worker.seconds = 1.0
    for length in (80, 90):
        loop.add(length, max_tokens=1)
    loop.run()
    assert loop.kv.cost.token_seconds == pytest.approx(1 / 50, rel=0.2)
    assert loop.kv.cost.fetch_seconds is None


def test_prompt_logprobs_of_two_in_one_step() -> None:
    loop = StepLoop()
    sampling = SamplingParams(max_tokens=1, prompt_logprobs=0)
    for length in (20, 30):
        loop.add(length, sampling=sampling)
    loop.run()
    assert [len(update.prompt_logprobs) for update in loop.updates] == [20, 30]


def test_prompt_logprobs_come_whole_with_the_first_token() -> None:
    loop = StepLoop(settings=settings(token_budget=16))
    sampling = SamplingParams(max_tokens=3, logprobs=0, prompt_logprobs=0)
    seq = loop.add(50, sampling=sampling)
    loop.run()
    first, *others = loop.updates
    assert first.prompt_logprobs[0] is None
    assert [p.token for p in first.prompt_logprobs[1:] if p] == list(seq.request.prompt[1:])
    assert all(update.prompt_logprobs == () for update in others)
    assert [update.logprobs[0].token for update in loop.updates] == seq.output_tokens


def test_the_times_of_a_sequence() -> None:
    loop = StepLoop(settings=settings(max_running=1))
    loop.clock.advance(10)
    first = loop.add(5, max_tokens=2)
    second = loop.add(5, max_tokens=2)
    assert second.queue_seconds is None
    while loop.scheduler.has_work:
        loop.clock.advance(1)
        loop.begin()
        loop.clock.advance(0.5)
        loop.end()
    assert (first.started_at, first.first_token_at, first.finished_at) == (11, 11.5, 13)
    assert (first.queue_seconds, second.queue_seconds) == (1, 4)


def test_plan_before_commit_is_our_bug() -> None:
    loop = StepLoop()
    loop.add(5)
    loop.begin()
    with pytest.raises(AssertionError, match="not committed"):
        loop.scheduler.plan(0.0)


def test_the_fake_model_is_what_the_oracle_says() -> None:
    loop = StepLoop()
    seq = loop.add(30, max_tokens=12)
    loop.run()
    assert (loop.outputs[seq.id], "length") == expected_output(seq.request)

"""Prefixes shared between sequences, tiers and overlap: the same tokens as alone, computed once."""

from __future__ import annotations

import pytest
from fakes import VOCAB_SIZE, FakeWorker, StepLoop, expected_output, make_request, make_tables
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from quantd.daemon.config import SchedulerSettings
from quantd.daemon.kv.window import NO_WINDOW, Window
from quantd.daemon.scheduler.sequence import Phase
from quantd.daemon.types import BLOCK_TOKENS, Chunk, SamplingParams

PROMPT = [i * 7 % VOCAB_SIZE for i in range(200)]
BOTH = pytest.mark.parametrize("overlap", [False, True])


@BOTH
def test_a_burst_computes_a_shared_prefix_once(overlap: bool) -> None:
    loop = StepLoop(num_blocks=256, overlap=overlap)
    for i in range(16):
        loop.add(0, 4, prompt=[*PROMPT[:128], *[i] * 20])
    loop.run()
    loop.check_outputs()
    shared, own, decoded = 128, 16 * 20, 16 * 3
    spare = 16 if overlap else 0  # a step too many at most, where the end was not foreseen
    assert shared + own + decoded <= loop.worker.num_computed_tokens
    assert loop.worker.num_computed_tokens <= shared + own + decoded + spare
    cached = [seq.num_cached_tokens for seq in loop.sequences.values()]
    assert cached == [0, *[128] * 15]
    assert loop.pool.num_used == 0


@pytest.mark.parametrize("is_batch", [False, True])
@pytest.mark.parametrize("budget", [24, 50, 100, 300])
@BOTH
def test_a_burst_in_many_steps_computes_a_shared_prefix_once(
    overlap: bool, budget: int, is_batch: bool
) -> None:
    settings = SchedulerSettings(token_budget=budget, max_running=16)
    loop = StepLoop(num_blocks=256, settings=settings, overlap=overlap)
    for i in range(16):
        loop.add(0, 4, prompt=[*PROMPT[:128], *[i] * 20], is_batch=is_batch)
    loop.run()
    loop.check_outputs()
    shared, own, decoded = 128, 16 * 20, 16 * 3
    spare = 16 if overlap else 0
    assert loop.worker.num_computed_tokens <= shared + own + decoded + spare
    assert [seq.num_cached_tokens for seq in loop.sequences.values()] == [0, *[128] * 15]


def test_who_leads_a_shared_prefix_may_leave() -> None:
    loop = StepLoop(settings=SchedulerSettings(token_budget=24))
    leaders = [loop.add(0, 4, prompt=[*PROMPT[:128], i]) for i in range(3)]
    for leader in leaders[:2]:
        loop.step()
        assert leader.num_scheduled_tokens > leaders[2].num_scheduled_tokens - 16
        loop.scheduler.abort(leader.id)
    loop.run()
    loop.check_outputs()
    assert loop.worker.num_computed_tokens <= 128 + 3 + 3 + 2 * 16


def test_a_request_does_not_wait_for_a_line_of_a_batch() -> None:
    settings = SchedulerSettings(token_budget=32)
    loop = StepLoop(settings=settings)
    loop.add(0, 4, prompt=[*PROMPT[:160], 1], is_batch=True)
    loop.step()
    asked = loop.add(0, 4, prompt=[*PROMPT[:160], 2])
    for _ in range(6):
        loop.step()
    assert asked.first_token_at is not None
    loop.run()
    loop.check_outputs()


@BOTH
def test_one_of_two_that_compute_the_same_is_aborted_half_way(overlap: bool) -> None:
    settings = SchedulerSettings(token_budget=32)
    loop = StepLoop(num_blocks=64, settings=settings, overlap=overlap)
    first = loop.add(0, 4, prompt=PROMPT)
    second = loop.add(0, 4, prompt=PROMPT)
    loop.step()
    loop.scheduler.abort(first.id)
    loop.scheduler.check()
    loop.run()
    loop.check_outputs()
    assert loop.reasons() == {second.id: "length"}
    assert loop.worker.num_computed_tokens < 200 + 64


@pytest.mark.parametrize("length", [31, 32, 33])
@BOTH
def test_a_prompt_that_is_known_whole_computes_one_token_into_its_own_block(
    length: int, overlap: bool
) -> None:
    loop = StepLoop(overlap=overlap)
    loop.add(0, 1, prompt=PROMPT[:length])
    loop.run()
    before = loop.worker.num_computed_tokens
    again = loop.add(0, 6, prompt=PROMPT[:length])
    plan = loop.begin()
    assert plan is not None
    (chunk,) = plan.chunks
    known = {31: 16, 32: 31, 33: 32}[length]
    assert (chunk.start, chunk.stop) == (known, length)
    assert [copy.kind for copy in plan.copies] == (["cow"] if length == 32 else [])
    assert again.num_cached_tokens == known
    loop.run()
    loop.check_outputs()
    assert loop.worker.num_computed_tokens >= before + length - known


def test_two_that_decode_the_same_end_with_one_copy() -> None:
    loop = StepLoop()
    one = loop.add(0, 40, prompt=PROMPT[:20])
    two = loop.add(0, 40, prompt=PROMPT[:20])
    for _ in range(35):
        loop.step()
    shared = set(one.blocks) & set(two.blocks)
    assert len(shared) == 3  # 48 of their 55 tokens
    assert sum(len(plan.rebinds) for plan in loop.plans) == 2  # what both had decoded
    loop.run()
    loop.check_outputs()


def test_salts_share_nothing() -> None:
    loop = StepLoop()
    for salt in ("a", "b", "a"):
        loop.add(0, 1, prompt=PROMPT[:100], cache_salt=salt)
        loop.run()
    assert [seq.num_cached_tokens for seq in loop.sequences.values()] == [0, 0, 96]


def test_the_second_turn_computes_what_is_new() -> None:
    loop = StepLoop()
    first = loop.add(0, 30, prompt=PROMPT[:50])
    loop.run()
    second = loop.add(0, 3, prompt=[*first.tokens, 1, 2, 3])
    loop.run()
    # 79 of the 80 tokens were computed: the last one was only sampled.
    assert second.num_cached_tokens == 64
    third = loop.add(0, 3, prompt=[*first.tokens[:60], 99, *first.tokens[61:]])
    loop.run()
    assert third.num_cached_tokens == 48, "to the last block before the difference"
    # A template that leaves a part of the answer out, as many do with the reasoning.
    stripped = loop.add(0, 3, prompt=[*first.tokens[:66], *first.tokens[74:], 1, 2, 3])
    loop.run()
    assert stripped.num_cached_tokens == 64
    # A tokenizer that makes other tokens of the answer's end and what follows.
    merged = loop.add(0, 3, prompt=[*first.tokens[:62], 250, *range(40)])
    loop.run()
    assert merged.num_cached_tokens == 48
    loop.check_outputs()


@BOTH
def test_a_token_beyond_the_end_reaches_nothing(overlap: bool) -> None:
    """The stop token fills a block, which a step planned ahead may have computed."""
    request = make_request(PROMPT[:40], max_tokens=40)
    tokens, _ = expected_output(request)
    stop = next(t for i, t in enumerate(tokens) if (40 + i) % 16 == 15 and t not in tokens[:i])
    at = tokens.index(stop)
    loop = StepLoop(overlap=overlap)
    sampling = SamplingParams(max_tokens=40, stop_token_ids=(stop,))
    seq = loop.add(0, prompt=PROMPT[:40], sampling=sampling)
    loop.run()
    assert seq.output_tokens == tokens[: at + 1]
    assert loop.reasons() == {seq.id: "stop"}
    known = loop.kv.match(seq.namespace, seq.key, 100)  # type: ignore[arg-type]
    assert known.num_blocks == (40 + at) // BLOCK_TOKENS
    loop.add(0, 5, prompt=seq.tokens + [3] * 20)
    loop.run()
    loop.check_outputs()


def test_prompt_logprobs_take_nothing_over() -> None:
    loop = StepLoop()
    loop.add(0, 1, prompt=PROMPT[:64])
    loop.run()
    sampling = SamplingParams(max_tokens=2, prompt_logprobs=0)
    seq = loop.add(0, prompt=PROMPT[:64], sampling=sampling)
    loop.run()
    assert seq.num_cached_tokens == 0
    first = next(u for u in loop.updates if u.seq is seq)
    assert len(first.prompt_logprobs) == 64
    loop.check_outputs()


def test_without_sharing_nothing_stays() -> None:
    tables = make_tables(16, share=False)
    loop = StepLoop(tables=tables)
    for _ in range(2):
        seq = loop.add(0, 3, prompt=PROMPT[:60])
        loop.run()
        assert (seq.num_cached_tokens, loop.pool.num_cached) == (0, 0)
    assert tables.kv.tree.num_nodes == 0 and not tables.kv.tree._roots


@BOTH
def test_a_prompt_that_is_known_whole_and_has_no_room_for_a_copy_computes_its_last_block(
    overlap: bool,
) -> None:
    loop = StepLoop(num_blocks=2, overlap=overlap)
    for _ in range(2):
        seq = loop.add(0, 1, prompt=PROMPT[:32])
        loop.run()
        loop.check_outputs()
    assert seq.num_cached_tokens == 16
    assert not any(plan.copies for plan in loop.plans)


def test_short_prompts_of_those_who_share_nothing_leave_nothing() -> None:
    tables = make_tables(16, share=False)
    loop = StepLoop(tables=tables)
    loop.add(3, 3)
    loop.run()
    assert not tables.kv.tree._roots


def test_a_spoilt_sequence_leaves_nothing_to_share() -> None:
    loop = StepLoop()
    bad = loop.add(0, 10, prompt=PROMPT[:64])
    loop.worker.errors[bad.id] = "the logits were not finite"
    loop.run()
    assert loop.pool.num_cached == 0
    good = loop.add(0, 3, prompt=PROMPT[:64])
    loop.run()
    assert good.num_cached_tokens == 0
    loop.check_outputs()


# --- tiers ----------------------------------------------------------------------------------------


@BOTH
def test_a_victim_s_blocks_spill_and_return(overlap: bool) -> None:
    tables = make_tables(8, num_places=32)
    settings = SchedulerSettings(policy="priority")
    loop = StepLoop(tables=tables, settings=settings, overlap=overlap)
    low = loop.add(0, 20, prompt=PROMPT[:100], priority=5)
    for _ in range(4):
        loop.step()
    loop.add(0, 4, prompt=[*PROMPT[100:200], 1], priority=0)
    loop.run()
    loop.check_outputs()
    assert low.num_preemptions >= 1
    assert tables.kv.num_moved["out", "host"] >= tables.kv.num_moved["in", "host"] >= 5
    assert tables.kv.num_fetches == low.num_preemptions
    # Nothing but the last, partly filled block was computed twice.
    computed = 100 + 101 + 19 + 3 + low.num_preemptions * (BLOCK_TOKENS + 1)
    assert loop.worker.num_computed_tokens <= computed + 4 * overlap


def test_what_a_fetch_costs_is_measured_and_then_weighed() -> None:
    tables = make_tables(8, num_places=32)
    loop = StepLoop(tables=tables, settings=SchedulerSettings(token_budget=512))
    for start in (0, 100, 0):
        loop.worker.copy_seconds = 0.5
        loop.worker.seconds = 0.6
        loop.add(0, 1, prompt=PROMPT[start : start + 97])
        loop.run()
    copies = [copy.kind for copy in loop.plans[-1].copies]
    assert copies.count("fetch") == 5
    assert loop.kv.cost.fetch_seconds == pytest.approx(0.5 / len(copies))
    assert loop.kv.cost.token_seconds == pytest.approx(0.1 / 97)
    loop.add(0, 1, prompt=PROMPT[100:197])  # 16 tokens take a fifth of what a block does
    loop.run()
    assert (loop.kv.num_fetches, loop.kv.num_recomputes) == (1, 1)
    loop.check_outputs()


# --- time and fairness ----------------------------------------------------------------------------


def test_a_timeout_ends_it_wherever_it_is() -> None:
    loop = StepLoop(settings=SchedulerSettings(max_running=1))
    running = loop.add(10, 100, deadline=5.0)
    waiting = loop.add(10, 100, deadline=3.0)
    untimed = loop.add(10, 3)
    loop.step()
    loop.clock.advance(4)
    loop.step()
    loop.clock.advance(2)
    loop.run()
    assert loop.reasons() == {running.id: "timeout", waiting.id: "timeout", untimed.id: "length"}
    texts = [u.error for u in loop.updates if u.finish_reason == "timeout"]
    assert texts[0] == "the timeout of 3 s is over: the request was still waiting"
    assert texts[1] is not None and "2 of at most 100 tokens were made" in texts[1]
    assert waiting.num_output_tokens == 0
    assert loop.worker.num_computed_tokens == 10 + 1 + 10 + 2


def test_a_timeout_that_cannot_be_met_costs_nothing() -> None:
    loop = StepLoop()
    loop.kv.cost.computed(1000, 10.0)
    hopeless = loop.add(300, 5, deadline=2.0)
    possible = loop.add(100, 5, deadline=2.0)
    loop.run()
    assert loop.reasons() == {hopeless.id: "timeout", possible.id: "length"}
    assert loop.worker.num_computed_tokens == 104


def test_whether_a_timeout_can_be_met_is_asked_of_what_is_known_by_then() -> None:
    """Nothing of its prompt was known when it came, and all of it when its turn comes."""
    loop = StepLoop(settings=SchedulerSettings(max_running=1))
    loop.kv.cost.computed(1000, 10.0)
    loop.add(0, 5, prompt=PROMPT)
    waiting = loop.add(0, 5, prompt=PROMPT[:150], deadline=2.0)
    loop.clock.advance(1.5)
    loop.run()
    assert (loop.reasons()[waiting.id], waiting.num_cached_tokens) == ("length", 144)
    loop.check_outputs()


def test_all_whose_time_is_over_end_in_one_plan() -> None:
    loop = StepLoop(settings=SchedulerSettings(max_running=2))
    seqs = [loop.add(10, 100, deadline=deadline) for deadline in (1.0, 2.0, 2.0, 2.0)]
    stays = loop.add(10, 5, deadline=2.5)
    loop.step()
    loop.clock.advance(2.0)
    loop.step()
    assert loop.reasons() == {seq.id: "timeout" for seq in seqs}
    loop.run()
    assert loop.reasons()[stays.id] == "length"


def test_callers_get_their_shares_of_a_backlog() -> None:
    settings = SchedulerSettings(max_running=2, caller_weights={"big": 3.0})
    loop = StepLoop(settings=settings)
    for _ in range(40):
        loop.add(20, 10, caller="many")
    for _ in range(40):
        loop.add(20, 10, caller="big")
    ended: list[str] = []
    while len(ended) < 40:
        ended += [u.seq.request.caller for u in loop.step() if u.finish_reason]
    assert 26 <= ended.count("big") <= 34  # three of four
    for seq in loop.sequences.values():
        loop.scheduler.abort(seq.id)


def test_who_comes_back_after_a_pause_has_saved_nothing_up() -> None:
    loop = StepLoop(settings=SchedulerSettings(max_running=1))
    for _ in range(10):
        loop.add(20, 5, caller="busy")
    for _ in range(15):
        loop.step()
    for _ in range(10):
        loop.add(20, 5, caller="late")
    ended: list[str] = []
    while len(ended) < 10:
        ended += [u.seq.request.caller for u in loop.step() if u.finish_reason]
    assert 4 <= ended.count("late") <= 6
    loop.run()


def test_sjf_ranks_by_what_is_not_cached() -> None:
    loop = StepLoop(
        num_blocks=400, settings=SchedulerSettings(policy="sjf", max_running=1, token_budget=512)
    )
    loop.add(0, 1, prompt=PROMPT * 10)
    loop.run()
    busy = loop.add(5, 2)
    loop.step()
    cold = loop.add(100, 1)
    long = loop.add(0, 1, prompt=PROMPT * 10 + [1])
    loop.run()
    assert busy.finished_at is not None
    order = [u.seq.id for u in loop.updates if u.finish_reason]
    assert order.index(long.id) < order.index(cold.id)


@pytest.mark.parametrize("kept", [0, 15, 16, 40])
def test_a_turn_that_is_written_otherwise_is_known_up_to_its_first_other_token(kept: int) -> None:
    """A template leaves out what was thought, or text becomes other tokens than those sampled."""
    loop = StepLoop(num_blocks=64)
    first = loop.add(0, 60, prompt=PROMPT[:37])
    loop.run()
    said = loop.outputs[first.id]
    again = [*first.request.prompt, *said[:kept], *said[kept + 7 :]]
    assert again[: 37 + kept + 1] != [*first.request.prompt, *said][: 37 + kept + 1]
    second = loop.add(0, 3, prompt=[*again, 1, 2, 3])
    loop.run()
    loop.check_outputs()
    assert second.num_cached_tokens == (37 + kept) // BLOCK_TOKENS * BLOCK_TOKENS


def test_a_pool_made_smaller_ends_what_can_never_fit() -> None:
    loop = StepLoop(tables=make_tables(32))
    large = loop.add(300, 20)
    small = loop.add(30, 20)
    loop.step()
    loop.scheduler.resize(8)
    loop.scheduler.check()
    loop.run()
    assert loop.reasons() == {large.id: "error", small.id: "length"}
    error = next(u.error for u in loop.updates if u.seq is large and u.finish_reason)
    assert error is not None and "up to 20 blocks, and there are 8" in error
    loop.check_outputs()


@pytest.mark.parametrize(("max_tokens", "num_blocks"), [(16, 2), (17, 3)])
def test_a_pool_that_just_holds_them_ends_nobody_and_a_smaller_one_all(
    max_tokens: int, num_blocks: int
) -> None:
    """The last token is sampled and never computed; what waits ends as well."""
    loop = StepLoop(num_blocks=8, settings=SchedulerSettings(max_running=1))
    kept = [loop.add(17, max_tokens) for _ in range(3)]
    loop.step()
    loop.scheduler.resize(num_blocks)
    assert loop.scheduler.take_ended() == []
    loop.scheduler.resize(num_blocks - 1)
    loop.scheduler.check()
    assert [update.seq for update in loop.scheduler.take_ended()] == kept
    assert (loop.scheduler.has_work, loop.pool.num_used) == (False, 0)


class Sharing(RuleBasedStateMachine):
    """Random sequences out of few prompts, aborts, priorities and a tiny pool over all tiers."""

    def __init__(self) -> None:
        super().__init__()
        self.loop: StepLoop | None = None

    @precondition(lambda self: self.loop is None)
    @rule(
        blocks=st.integers(7, 24),
        places=st.sampled_from([0, 3, 16]),
        files=st.sampled_from([0, 5, 64]),
        overlap=st.booleans(),
        policy=st.sampled_from(["fcfs", "priority", "sjf"]),
        budget=st.sampled_from([16, 40, 256]),
        share=st.booleans(),
        window=st.sampled_from([NO_WINDOW, Window(20, 0.5), Window(33, 0.8), Window(16, 1.0)]),
    )
    def begin(
        self,
        blocks: int,
        places: int,
        files: int,
        overlap: bool,
        policy: str,
        budget: int,
        share: bool,
        window: Window,
    ) -> None:
        tables = make_tables(
            blocks,
            num_places=places,
            disk_files=files if places and share else 0,
            share=share,
            window=window,
            capacity=100,
        )
        settings = SchedulerSettings(
            policy=policy,  # type: ignore[arg-type]
            token_budget=budget,
            max_running=5,
            aging_seconds=20.0,
        )
        self.loop = StepLoop(tables=tables, settings=settings, overlap=overlap)

    @precondition(lambda self: self.loop is not None)
    @rule(
        start=st.integers(0, 2),
        length=st.integers(1, 160),
        tail=st.integers(0, 3),
        max_tokens=st.integers(1, 30),
        priority=st.integers(0, 2),
    )
    def add(self, start: int, length: int, tail: int, max_tokens: int, priority: int) -> None:
        assert self.loop is not None
        most = self.loop.kv.window.most_blocks(self.loop.pool.limit) or 20
        length = min(length, most * BLOCK_TOKENS - max_tokens - tail)
        prompt = [*PROMPT[start * 15 : start * 15 + length], *[tail] * tail]
        self.loop.add(0, max_tokens, prompt=prompt, priority=priority)

    @precondition(lambda self: self.loop is not None)
    @rule(count=st.integers(1, 5))
    def steps(self, count: int) -> None:
        assert self.loop is not None
        for _ in range(count):
            self.loop.clock.advance(1)
            self.loop.step()

    @precondition(lambda self: self.loop is not None and self.loop.sequences)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        assert self.loop is not None
        seq_id = data.draw(st.sampled_from(sorted(self.loop.sequences)))
        self.loop.scheduler.abort(seq_id)
        self.loop.scheduler.check()

    def teardown(self) -> None:
        if self.loop is None:
            return
        self.loop.run()
        self.loop.check_outputs()
        assert self.loop.pool.num_used == 0
        self.loop.kv.shrink()
        self.loop.kv.check()
        assert self.loop.pool.num_free == self.loop.pool.limit


TestSharing = Sharing.TestCase
TestSharing.settings = hypothesis_settings(max_examples=60, stateful_step_count=25, deadline=None)


# --- controls: what must be found when it is broken ---------------------------------------------


def test_a_write_to_a_shared_block_is_found() -> None:
    worker = FakeWorker()
    loop = StepLoop()
    loop.worker = worker
    loop.add(0, 30, prompt=PROMPT[:20])
    loop.step()
    loop.add(0, 30, prompt=PROMPT[:20])
    plan = loop.scheduler.plan(0.0)
    assert plan is not None
    stolen = tuple(
        Chunk(c.seq, c.start, c.stop, (c.blocks[0], loop.sequences[0].blocks[1]), c.sample)
        if len(c.blocks) == 2
        else c
        for c in plan.chunks
    )
    assert stolen != plan.chunks
    broken = type(plan)(plan.step, stolen, plan.add, plan.drop, plan.copies, plan.rebinds)
    with pytest.raises(AssertionError, match="shared block"):
        worker.run(broken)


def test_a_partly_filled_block_in_the_tree_is_found() -> None:
    loop = StepLoop()
    seq = loop.add(0, 30, prompt=PROMPT[:40])
    loop.step()
    assert seq.node is not None
    key = bytes(seq.key[2 * 64 : 2 * 64 + 32]) * 2
    loop.kv.insert(seq.node, key, seq.blocks[2])
    with pytest.raises(AssertionError, match="not its own"):
        loop.scheduler.check()
    assert seq.phase is Phase.RUNNING

"""Sliding windows: what is trimmed, what it costs, and what can no longer be shared."""

from __future__ import annotations

import pytest
from fakes import VOCAB_SIZE, StepLoop, make_tables
from hypothesis import example, given
from hypothesis import strategies as st

from quantd.daemon.config import SchedulerSettings
from quantd.daemon.kv.window import NO_WINDOW, Window
from quantd.daemon.types import BLOCK_TOKENS

PROMPT = [i * 7 % VOCAB_SIZE for i in range(2000)]
windows = st.builds(Window, st.integers(1, 200), st.sampled_from([0.25, 0.5, 0.8, 22 / 26, 1.0]))


@given(windows, st.integers(0, 5000))
def test_a_block_is_outside_once_no_row_sees_it(window: Window, num_tokens: int) -> None:
    outside = window.num_outside(num_tokens)
    first_seen = max(0, num_tokens - window.tokens + 1)
    assert outside * BLOCK_TOKENS <= first_seen < (outside + 1) * BLOCK_TOKENS


@given(windows, st.integers(1, 500))
@example(Window(1, 1.0), 3)
def test_most_blocks_is_the_inverse_of_cost(window: Window, budget: int) -> None:
    most = window.most_blocks(budget)
    if most is None:
        assert window.share == 1 and window.cost(10**6) <= window.num_blocks + 2
    else:
        assert window.cost(most) <= budget < window.cost(most + 2)


def test_without_windows_nothing_changes() -> None:
    assert (NO_WINDOW.cost(77), NO_WINDOW.most_blocks(77), NO_WINDOW.num_outside(999)) == (
        77,
        77,
        0,
    )


def loop_of(num_blocks: int, window: Window, **settings: int) -> StepLoop:
    tables = make_tables(num_blocks, window=window, capacity=500)
    return StepLoop(tables=tables, settings=SchedulerSettings(**settings))


@pytest.mark.parametrize(("share", "num_trimmed"), [(0.5, 42), (1.0, 21)])
def test_a_sequence_much_longer_than_the_pool(share: float, num_trimmed: int) -> None:
    """48 blocks of it cost no more than 27."""
    loop = loop_of(27, Window(40, share), token_budget=64)
    seq = loop.add(700, 60)
    loop.run()
    loop.check_outputs()
    assert loop.reasons() == {seq.id: "length"}
    assert sum(copy.kind == "trim" for plan in loop.plans for copy in plan.copies) >= num_trimmed
    loop.kv.shrink()
    assert (loop.pool.num_free, loop.pool.num_trimmed) == (27, 0)


def test_nothing_is_trimmed_while_there_is_room() -> None:
    loop = loop_of(100, Window(16, 0.8))
    loop.add(400, 40)
    loop.run()
    assert not any(plan.copies for plan in loop.plans)


def test_what_is_waiting_is_made_room_for() -> None:
    """Two that would not fit side by side whole run at once."""
    loop = loop_of(40, Window(32, 0.75))
    for first in (1, 2):
        loop.add(0, 30, prompt=[first, *PROMPT[:399]])
        loop.step()
        loop.step()
    assert loop.scheduler.num_running == 2
    loop.run()
    loop.check_outputs()
    assert sum(loop.scheduler.preemptions.values()) == 0


def test_a_trimmed_beginning_is_shared_only_by_who_goes_on_behind_it() -> None:
    loop = loop_of(27, Window(40, 0.5), token_budget=64)
    first = loop.add(0, 60, prompt=PROMPT[:700])
    loop.run()
    assert first.namespace is not None
    whole = loop.kv.match(first.namespace, first.key, 100)
    assert whole.num_blocks == 759 // BLOCK_TOKENS
    # Further up its last window is gone: nobody can go on from there.
    assert loop.kv.match(first.namespace, first.key, 20).num_blocks == 0
    again = loop.add(0, 5, prompt=[*first.tokens, 1, 2, 3])
    other = loop.add(0, 5, prompt=[*PROMPT[:320], 5, 5])
    loop.run()
    loop.check_outputs()
    assert again.num_cached_tokens == 752
    assert other.num_cached_tokens == 0


def test_a_trimmed_block_that_nobody_works_with_is_replaced_by_a_whole_one() -> None:
    loop = loop_of(27, Window(40, 0.5), token_budget=64)
    loop.add(0, 60, prompt=PROMPT[:700])
    loop.run()
    loop.add(0, 1, prompt=PROMPT[:200])
    loop.run()
    third = loop.add(0, 1, prompt=[*PROMPT[:180], 9])
    loop.run()
    loop.check_outputs()
    assert third.num_cached_tokens == 176


def test_a_trimmed_block_does_not_go_to_the_host() -> None:
    tables = make_tables(27, window=Window(40, 0.5), capacity=500, num_places=64)
    loop = StepLoop(tables=tables, settings=SchedulerSettings(token_budget=64))
    loop.add(0, 60, prompt=PROMPT[:700])
    loop.run()
    loop.add(0, 60, prompt=[5, *PROMPT[:699]])  # drives the first one out
    loop.run()
    loop.check_outputs()  # and the worker asserts that no copy is made of a trimmed block
    spilled = sum(copy.kind == "spill" for plan in loop.plans for copy in plan.copies)
    assert 0 < spilled < 47


def test_who_takes_over_and_gets_no_block_gets_on_later() -> None:
    """In the first step the second prompt takes over seven blocks and finds none to go on."""
    loop = loop_of(9, Window(16, 1.0))
    loop.add(1, 1)
    first = loop.add(0, 2, prompt=[*PROMPT[:123], 3, 3, 3])
    second = loop.add(0, 1, prompt=[*PROMPT[:112], 1])
    loop.step()
    assert (second.num_chunks, second.num_computed_tokens) == (0, 112)
    loop.run()
    loop.check_outputs()
    assert loop.reasons() == {0: "length", first.id: "length", second.id: "length"}


def test_a_fetch_that_finds_no_block_goes_back_to_a_whole_window() -> None:
    """Preempted with a trimmed block, of which what lies behind it had gone to the host."""
    tables = make_tables(10, window=Window(20, 0.5), capacity=200, num_places=6)
    loop = StepLoop(tables=tables, settings=SchedulerSettings(token_budget=24), overlap=True)
    loop.add(0, 26, prompt=[*PROMPT[:96], 2, 2])
    second = loop.add(0, 29, prompt=[*PROMPT[:96], 3, *PROMPT[96:148]])
    loop.run()
    loop.check_outputs()
    assert second.num_preemptions == 1


def test_what_is_not_worth_fetching_is_no_part_of_a_window() -> None:
    tables = make_tables(16, window=Window(32, 0.5), capacity=100, num_places=16)
    kv = tables.kv
    loop = StepLoop(tables=tables, settings=SchedulerSettings(token_budget=16))
    seq = loop.add(0, 16, prompt=PROMPT[:320])
    loop.run()
    assert seq.namespace is not None
    loop.add(0, 1, prompt=[9] * 40)  # drives some of the end out, to the host
    loop.run()
    fetched = kv.match(seq.namespace, seq.key, 20)
    assert fetched.num_host > 0
    kv.cost.computed(100, 1e-6)
    kv.cost.copied(1, 1.0)
    spurned = kv.match(seq.namespace, seq.key, 20)
    assert spurned.num_spurned == fetched.num_host and spurned.num_host == 0
    assert spurned.node is not None
    last = spurned.node.path()[-2:]
    assert not any(kv.pool.is_trimmed(node.block) for node in last)


def test_a_block_that_is_trimmed_too_early_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of all these: one block more, and the worker says that it is missed."""
    num_outside = Window.num_outside
    monkeypatch.setattr(Window, "num_outside", lambda self, n: num_outside(self, n) + 1)
    loop = loop_of(5, Window(40, 1.0), token_budget=64)
    loop.add(700, 60)
    with pytest.raises(AssertionError, match="inside of the window"):
        loop.run()

"""Steps on a GPU: what was reused, moved, planned ahead or poisoned gives what it would have given.

Two models. All weights of `packed` are of a quantized format, whose rows have the same bits in any
batch: there results are equal bit for bit. The plain layers of `dense` are the vendor's, whose rows
may depend on how many there are: there they are equal where the shapes are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from gpu_harness import MARKS, sized
from gpu_models import PACKED, write
from gpu_steps import GREEDY, WARM, Said, Steps, fetches, poison, spills
from msgspec.structs import replace
from numerics.tiny import prompt_of

from quantd.daemon.types import BlockCopy, Chunk, NewSequence, Rebind, SamplingParams
from quantd.daemon.worker.gpu import runner as gpu_runner

pytestmark = MARKS

HOST = {"host_kv_bytes": 1 << 22}
PROMPT, OTHER = prompt_of(70), prompt_of(64, 9)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = tmp_path_factory.mktemp("models")
    return {"dense": write(made / "dense"), "packed": write(made / "packed", PACKED)}


@pytest.fixture(params=["bfloat16", "float16"])
def packed(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Steps:
    return Steps(folders["packed"], load_format="dummy", dtype=request.param, **HOST)


@pytest.fixture(params=["dense", "packed"])
def steps(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Steps:
    return Steps(folders[request.param], load_format="dummy", dtype="bfloat16", **HOST)


def new(seq: int, tokens: Any, prompt: int | None = None, how: Any = GREEDY) -> NewSequence:
    return NewSequence(seq, tuple(tokens), prompt or len(tokens), how)


def decode(seq: int, position: int, *blocks: int) -> Chunk:
    return Chunk(seq, position, position + 1, blocks, True)


def alone(steps: Steps, prompt: Any, decodes: int, seq: int = 900, how: Any = GREEDY) -> Said:
    (said,) = steps.run([prompt], decodes, sampling=how, first=seq, blocks=range(100, 140))
    return said


# --- what a row depends on ------------------------------------------------------------------------


def test_a_sequence_is_the_same_alone_and_among_others(packed: Steps) -> None:
    """At temperature 0 and above, first and last in the batch (E11, E12)."""
    count = sized(64, 9)
    prompts = [prompt_of(5 + 7 * i % 60, i) for i in range(count)]
    each = [GREEDY if i % 2 else replace(WARM, seed=i) for i in range(count)]
    together = packed.run(prompts, 12, sampling=each, blocks=range(sized(400, 90)))
    for i in {0, 1, count // 2, count - 2, count - 1}:
        by_itself = alone(packed, prompts[i], 12, how=each[i])
        assert by_itself.same(together[i]), f"sequence {i} of {count}"


@pytest.mark.parametrize("chunk", [1, 7, 16, 17])
def test_chunks_of_a_prompt(packed: Steps, chunk: int) -> None:
    whole, other = packed.run([PROMPT, OTHER], 4)
    chunked, _ = packed.run([PROMPT, OTHER], 4, chunk=chunk)
    assert chunked.same(whole)


def test_the_order_of_arrival(packed: Steps) -> None:
    prompts = [prompt_of(20 + i, i) for i in range(5)]
    each = [replace(WARM, seed=100 + i) for i in range(5)]
    forth = packed.run(prompts, 8, sampling=each)
    back = packed.run(prompts[::-1], 8, sampling=each[::-1])
    assert all(one.same(other) for one, other in zip(forth, back[::-1], strict=True))


def test_a_long_prompt(folders: dict[str, Path]) -> None:
    """131,072 positions, in chunks of two sizes."""
    length = sized(131072 - 8, 500)
    steps = Steps(folders["packed"], load_format="dummy", max_context=sized(131072, 512))
    how = SamplingParams(max_tokens=8, temperature=0.0, logprobs=5)
    prompt = prompt_of(length)
    room = range(steps.runner.info.num_blocks)
    one, two = (
        steps.run([prompt], 4, chunk=size, sampling=how, blocks=room)[0]
        for size in sized((8192, 5000), (256, 100))
    )
    assert one.tokens == two.tokens and len(one.rows) == 5


def test_no_block_near_the_first_one(folders: dict[str, Path]) -> None:
    """The pools' first addresses have no memory of their own then."""
    steps = Steps(folders["packed"], load_format="dummy", kv_bytes=sized(64 << 20, 1 << 22))
    count = steps.runner.info.num_blocks
    (far,) = steps.run([PROMPT], 4, blocks=range(count - 20, count))
    (near,) = steps.run([PROMPT], 4, blocks=range(20))
    assert near.same(far)
    steps.runner.release_memory([(0, 20)])
    (again,) = steps.run([PROMPT], 4, blocks=range(count - 20, count))
    assert again.same(far)


# --- the prefix cache ---------------------------------------------------------------------------


def test_cached_is_uncached(steps: Steps) -> None:
    """The second one reads the first one's blocks; its own last block is its own."""
    steps.put(Chunk(1, 0, 64, (3, 1, 7, 5)), add=(new(1, PROMPT),))
    steps.put(Chunk(1, 64, 70, (9,), True))
    steps.put(*(decode(1, 70 + i) for i in range(1)))
    start = len(steps.plans)
    steps.put(Chunk(2, 64, 70, (3, 1, 7, 5, 20), True), add=(new(2, PROMPT),), drop=(1,))
    steps.put(decode(2, 70), drop=())
    steps.settle()
    first, second = Said(list(PROMPT)), Said(list(PROMPT))
    steps.collect({1: first}, 0)
    steps.collect({2: second}, start)
    assert second.same(first)


def test_two_that_begin_alike_in_one_step(packed: Steps) -> None:
    """The second one's blocks are computed by the first one's chunk of the same plan."""
    want = alone(packed, PROMPT, 1)
    start = len(packed.plans)
    packed.put(
        Chunk(1, 0, 70, (3, 1, 7, 5, 9), True),
        Chunk(2, 64, 70, (3, 1, 7, 5, 20), True),
        add=(new(1, PROMPT), new(2, PROMPT)),
    )
    packed.put(decode(1, 70), decode(2, 70))
    packed.step(drop=(1, 2))
    got = {1: Said(list(PROMPT)), 2: Said(list(PROMPT))}
    packed.collect(got, start)
    assert got[1].same(want) and got[2].same(want)


def test_a_prompt_of_whole_blocks_that_is_cached(packed: Steps) -> None:
    """One token is computed, into a copy of the last shared block, which does not change."""
    want = alone(packed, OTHER, 2)
    start = len(packed.plans)
    packed.put(Chunk(1, 0, 64, (3, 1, 7, 5), True), add=(new(1, OTHER),))
    packed.put(
        Chunk(2, 63, 64, (3, 1, 7, 20), True),
        add=(new(2, OTHER),),
        copies=(BlockCopy("cow", 5, 20),),
    )
    packed.put(decode(2, 64, 21), decode(1, 64, 9))
    packed.put(decode(1, 65), decode(2, 65))
    packed.step(drop=(1, 2))
    got = {1: Said(list(OTHER)), 2: Said(list(OTHER))}
    packed.collect(got, start)
    assert got[1].same(want)
    assert got[2].same(want)


def test_a_block_that_becomes_another_with_the_same_bytes(packed: Steps) -> None:
    want = alone(packed, PROMPT, 3)
    start = len(packed.plans)
    packed.put(Chunk(1, 0, 70, (3, 1, 7, 5, 9), True), add=(new(1, PROMPT),))
    packed.put(decode(1, 70), copies=(BlockCopy("cow", 3, 30),), rebinds=(Rebind(1, 0, 30),))
    poison(packed, [3])
    packed.put(decode(1, 71))
    packed.put(decode(1, 72))
    packed.step(drop=(1,))
    got = Said(list(PROMPT))
    packed.collect({1: got}, start)
    assert got.tokens[: len(want.tokens)] == want.tokens and got.rows.keys() >= want.rows.keys()
    assert Said(want.tokens, got.rows).same(want)


# --- preemption and the tiers -------------------------------------------------------------------


@pytest.mark.parametrize("how", [GREEDY, WARM], ids=["greedy", "drawn"])
def test_preempted_three_times(packed: Steps, how: SamplingParams) -> None:
    """Its blocks are given up and computed again elsewhere, its next token is as it would be."""
    want = alone(packed, PROMPT, 12, how=how)
    tokens = list(PROMPT)
    for stay in range(4):
        known = len(tokens)
        first = 30 + 10 * stay
        blocks = tuple(range(first, first + -(-known // 16)))
        chunk = Chunk(1, 0, known, blocks, True)
        result = packed.step(chunk, add=(new(1, tokens, len(PROMPT), how),))
        tokens.append(result.sampled[0].token)
        for more in range(2):
            own = (first + 8,) if (known + more) % 16 == 0 else ()
            result = packed.step(decode(1, known + more, *own))
            tokens.append(result.sampled[0].token)
        packed.step(drop=(1,))
        poison(packed, blocks)
    assert tokens == want.tokens[: len(tokens)]


@pytest.mark.parametrize("ahead", [True, False], ids=["ahead", "one by one"])
def test_spilled_while_its_blocks_get_a_new_owner(steps: Steps, ahead: bool) -> None:
    """In one plan: the blocks are spilled, another prompt is computed into them; and poisoned."""
    blocks = (3, 1, 7, 5)
    steps.put(Chunk(1, 0, 64, blocks), add=(new(1, PROMPT),))
    want = steps.step(Chunk(1, 64, 70, (9,), True)).sampled[0]
    steps.ahead = ahead
    steps.put(Chunk(3, 0, 64, blocks, True), add=(new(3, OTHER),), drop=(1,), copies=spills(blocks))
    poison(steps, blocks)
    steps.put(drop=(3,), copies=fetches((20, 21, 22, 23)))
    got = steps.step(Chunk(2, 64, 70, (20, 21, 22, 23, 9), True), add=(new(2, PROMPT),))
    assert (got.sampled[0].token, got.sampled[0].logprob) == (want.token, want.logprob)


def test_fetched_into_the_block_that_was_just_spilled(steps: Steps) -> None:
    """A chain of copies of one plan, in its order."""
    steps.put(
        Chunk(1, 0, 16, (3,)), Chunk(2, 0, 16, (4,)), add=(new(1, PROMPT[:16]), new(2, OTHER[:16]))
    )
    swap = (*spills([3, 4]), *fetches([4, 3]), BlockCopy("cow", 4, 30), BlockCopy("cow", 3, 31))
    steps.step(copies=swap, drop=(1, 2))
    for pool in (*steps.pools.keys, *steps.pools.values):
        assert bool((pool[30] == pool[4]).all()) and bool((pool[31] == pool[3]).all())
        assert not bool((pool[3] == pool[4]).all())
    want = steps.step(Chunk(5, 0, 16, (3,)), add=(new(5, PROMPT[:16]),))
    assert want.sampled == ()
    for pool in (*steps.pools.keys, *steps.pools.values):
        assert bool((pool[3] == pool[30]).all()), "block 4 holds what block 3 had"


# --- what nobody owns -----------------------------------------------------------------------------


def test_poison_in_every_block_that_is_free(packed: Steps) -> None:
    """NaN in all blocks but one's own and in the one that is nobody's, before and between."""
    want = alone(packed, PROMPT, 12)
    own = (3, 1, 7, 5, 9, 11)
    free = [b for b in range(150) if b not in own] + [packed.pools.waste_block]
    start = len(packed.plans)
    poison(packed, [*range(150), packed.pools.waste_block])
    packed.put(Chunk(1, 0, 33, own[:3]), add=(new(1, PROMPT),))
    poison(packed, free)
    packed.put(Chunk(1, 33, 70, own[3:5], True))
    for i in range(12):
        poison(packed, free)
        packed.put(decode(1, 70 + i, *(own[5:] if 70 + i == 80 else ())))
    packed.step(drop=(1,))
    got = Said(list(PROMPT))
    packed.collect({1: got}, start)
    assert got.same(Said(got.tokens, want.rows)) and got.tokens[:82] == want.tokens[:82]


def test_a_poisoned_block_that_gets_an_owner(packed: Steps) -> None:
    """Keys behind the last one of a block are read by nobody."""
    want = alone(packed, PROMPT[:5], 20)
    poison(packed, range(150))
    got = alone(packed, PROMPT[:5], 20)
    assert got.same(want)


def test_one_that_fails_spoils_no_other(packed: Steps) -> None:
    want = alone(packed, PROMPT, 4)
    start = len(packed.plans)
    packed.put(Chunk(1, 0, 16, (3,)), add=(new(1, prompt_of(17)),))
    poison(packed, [3])
    packed.put(Chunk(1, 16, 17, (4,), True), Chunk(2, 0, 70, (30, 31, 32, 33, 34), True),
               add=(new(2, PROMPT),))  # fmt: skip
    for i in range(4):
        packed.put(decode(1, 17 + i), decode(2, 70 + i))
    packed.step(drop=(1, 2))
    errors = [s.error for r in packed.results[start:] for s in r.sampled if s.seq == 1]
    assert len(errors) == 5 and all("not finite" in str(error) for error in errors)
    got = Said(list(PROMPT))
    packed.collect({2: got}, start)
    assert got.tokens[: len(want.tokens)] == want.tokens


# --- planned ahead --------------------------------------------------------------------------------


def test_planned_ahead_or_not(steps: Steps) -> None:
    prompts = [prompt_of(20 + 9 * i, i) for i in range(5)]
    each = [GREEDY, WARM, GREEDY, replace(WARM, top_p=0.8, repetition_penalty=1.3), WARM]
    each[4] = replace(WARM, logit_bias=((5, 3.0),), frequency_penalty=0.7, min_tokens=4)
    ahead = steps.run(prompts, 20, chunk=16, sampling=each)
    steps.ahead = False
    one_by_one = steps.run(prompts, 20, chunk=16, sampling=each)
    assert all(a.same(b) for a, b in zip(ahead, one_by_one, strict=True))


def test_graphs_or_not(packed: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks of which none is left over, so that a row that pads may be written to none."""
    prompts, blocks = [prompt_of(20 + 9 * i, i) for i in range(5)], range(24)
    by_graphs = packed.run(prompts, 30, blocks=blocks)
    assert packed.runner._graphs._graphs, "no graph was recorded"
    monkeypatch.setattr(gpu_runner, "is_decode", lambda batch: False)
    without = packed.run(prompts, 30, blocks=blocks)
    assert all(a.same(b) for a, b in zip(by_graphs, without, strict=True))


def test_graphs_that_were_dropped(packed: Steps) -> None:
    prompts = [prompt_of(20, i) for i in range(3)]
    want = packed.run(prompts, 10)
    packed.runner._graphs.drop()
    again = packed.run(prompts, 10)
    assert all(a.same(b) for a, b in zip(want, again, strict=True))


def test_given_up_while_its_step_is_under_way(packed: Steps) -> None:
    """Its blocks go to the next one in the plan that drops it (E9)."""
    want, after = alone(packed, PROMPT, 10), alone(packed, OTHER, 6)
    start = len(packed.plans)
    packed.put(
        Chunk(1, 0, 64, (3, 1, 7, 5), True),
        Chunk(2, 0, 70, (30, 31, 32, 33, 34), True),
        add=(new(1, OTHER), new(2, PROMPT)),
    )
    packed.put(decode(1, 64, 9), decode(2, 70))
    packed.put(Chunk(3, 0, 64, (9, 5, 7, 1), True), decode(2, 71), drop=(1,), add=(new(3, OTHER),))
    for i in range(6):
        packed.put(decode(3, 64 + i, *((3,) if not i else ())), decode(2, 72 + i))
    packed.step(drop=(2, 3))
    got = {2: Said(list(PROMPT)), 3: Said(list(OTHER))}
    packed.collect(got, start)
    assert got[3].same(after)
    assert got[2].tokens == want.tokens[: len(got[2].tokens)]
    assert Said(want.tokens, got[2].rows).same(want)


def test_a_thousand_that_are_given_up(packed: Steps) -> None:
    """Nothing of them is kept (E9)."""
    want = alone(packed, PROMPT, 3)
    how = SamplingParams(max_tokens=50, temperature=0.0)
    count = sized(1000, 60)
    for seq in range(count):
        drop = (seq - 1,) if seq else ()
        packed.put(Chunk(seq, 0, 9, (5 + seq % 2,), True), add=(new(seq, PROMPT[:9], 9, how),),
                   drop=drop)  # fmt: skip
    packed.step(drop=(count - 1,))
    assert len(packed.results) == len(packed.plans)
    assert not packed.runner._mirror._sequences
    assert alone(packed, PROMPT, 3).same(want)

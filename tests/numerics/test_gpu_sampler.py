"""The sampler of a device gives what that of a CPU gives: tokens, errors, log-probabilities."""

from __future__ import annotations

import gc
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from numerics.mixed_rows import (
    NUM_ROWS,
    NoWaiting,
    mixed_logits,
    mixed_masks,
    mixed_row,
    on_device,
    sampled,
)

from quantd.daemon.types import Sampled, SamplingParams
from quantd.daemon.worker.gpu.frame import Upward
from quantd.daemon.worker.gpu.sampler import DeviceSampler, try_sampling
from quantd.daemon.worker.sampler import Sampler, SampleRow
from quantd.kernels import ops
from quantd.kernels.reference import sampling as spec
from quantd.kernels.sampling import MASKED

VOCAB = 203


def row(tokens: Sequence[int] = (1, 2), prompt: int = 2, seq: int = 0, **kw: object) -> SampleRow:
    kw = {"max_tokens": 100, "temperature": 0.0} | kw
    return SampleRow(seq, SamplingParams(**kw), list(tokens), prompt)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(12))
def test_the_same_as_on_a_cpu_step_after_step(seed: int) -> None:
    random = np.random.default_rng(seed)
    rows = [mixed_row(i, random, VOCAB) for i in range(NUM_ROWS)]
    device, cpu = DeviceSampler(VOCAB), Sampler(VOCAB)
    for _ in range(4):
        logits, masks = mixed_logits(random, VOCAB, VOCAB + 6), mixed_masks(random, VOCAB)
        logits = logits.to(torch.bfloat16 if seed % 2 else torch.float32)
        before = logits.clone()
        want = cpu.sample(logits, rows, masks)
        assert sampled(device, logits, rows, masks) == want
        torch.testing.assert_close(logits, before, rtol=0, atol=0, equal_nan=True)
        assert [result.error is not None for result in want[1:4]] == [True] * 3
        assert want[6].is_excluded
        for one, result in zip(rows, want, strict=True):
            one.tokens.append(result.token)


def test_what_is_kept_of_a_sequence_is_what_its_tokens_give() -> None:
    """An order of edits aside, which has no meaning."""
    random = np.random.default_rng(0)
    rows = [mixed_row(i, random, 40) for i in range(NUM_ROWS)]
    kept = DeviceSampler(40)
    for step in range(30):
        rows = rows[1:] + rows[:1]
        own, fresh = (s.stage(rows[step % 5 :]) for s in (kept, DeviceSampler(40)))
        for name, array in fresh.arrays.items():
            if not name.startswith(("edit_", "seen_")):
                assert np.array_equal(own.arrays[name], array), name
        for r in range(len(rows) - step % 5):
            was, now = ({e for e in _edits(plan.arrays, r) if any(e[1:])} for plan in (own, fresh))
            assert was == now
        for one in rows:
            one.tokens.append(int(random.integers(0, 40)))


def _edits(arrays: object, r: int) -> list[tuple[float, ...]]:
    names = ("edit_token", "edit_bias", "edit_count", "edit_flags")
    start, stop = arrays["edit_start"][r : r + 2]  # type: ignore[index]
    columns = [arrays[name][start:stop].tolist() for name in names]  # type: ignore[index]
    assert len(set(columns[0])) == len(columns[0])
    return list(zip(*columns, strict=True))


def test_edits_of_a_token_are_merged() -> None:
    one = row(
        [5, 6, 7, 7, 9],
        prompt=2,
        repetition_penalty=1.5,
        frequency_penalty=0.25,
        logit_bias=((7, 2.0), (8, -1.0)),
        bad_words=((7, 9, 6), (6, 6)),
        min_tokens=4,
        stop_token_ids=(7, VOCAB),
    )
    sampler = DeviceSampler(VOCAB)
    want = {(6, 0, 0, MASKED), (7, 2.0, 2, MASKED), (8, -1.0, 0, 0), (9, 0, 1, 0)}
    assert set(_edits(sampler.stage([one]).arrays, 0)) == want
    one.tokens.append(7)
    want -= {(6, 0, 0, MASKED), (7, 2.0, 2, MASKED)}
    want |= {(6, 0, 0, 0), (7, 2.0, 3, 0)}
    assert set(_edits(sampler.stage([one]).arrays, 0)) == want


def test_a_row_that_asks_for_nothing_takes_nothing() -> None:
    plain = [row(seq=i, min_tokens=1, tokens=[1, 2, 3], stop_token_ids=(4,)) for i in range(3)]
    plan = DeviceSampler(VOCAB).stage(plain)
    assert plan.arrays["edit_start"].tolist() == [0] * 4
    assert plan.arrays["mask"].shape == (0, 7)
    assert plan.arrays["mask_row"].tolist() == [-1] * 3
    assert plan.logprobs == {} and not len(plan.arrays["logprob_rows"])


def test_only_rows_with_a_mask_have_one() -> None:
    grammar = np.full(7, 0b1100, np.int32)
    rows = [row(), row(allowed_token_ids=(2, 64)), row(), row(allowed_token_ids=(0,))]
    plan = DeviceSampler(VOCAB).stage(rows, {0: grammar, 1: grammar})
    assert plan.arrays["mask_row"].tolist() == [0, 1, -1, 2]
    assert plan.arrays["mask"][:, :3].tolist() == [[12, 12, 12], [4, 0, 0], [1, 0, 0]]


def test_every_array_has_its_field_and_type() -> None:
    arrays = DeviceSampler(VOCAB).stage([row(logit_bias=((3, 1.0),))]).arrays
    assert set(arrays) == {*ops.SamplingRows.__slots__, "logprob_rows"} - {"seen"}
    assert all(array.flags.c_contiguous for array in arrays.values())
    assert {name: str(array.dtype) for name, array in arrays.items()} == {
        **dict.fromkeys(("seed", "position", "logprob_rows"), "int64"),
        **dict.fromkeys(("top_p", "min_p"), "float64"),
        **dict.fromkeys(("temperature", "repetition", "frequency", "presence"), "float32"),
        **dict.fromkeys(("edit_bias", "edit_count"), "float32"),
        **dict.fromkeys(("top_k", "mask", "mask_row", "edit_start"), "int32"),
        **dict.fromkeys(("edit_token", "edit_flags"), "int32"),
        **dict.fromkeys(("seen_row", "seen_new", "seen_start", "seen_token"), "int32"),
    }


def test_what_was_kept_goes_with_the_sequence() -> None:
    sampler = DeviceSampler(VOCAB)
    rows = [row(presence_penalty=2.0), row(presence_penalty=2.0)]
    sampler.stage(rows)
    assert len(sampler._edits) == 2
    rows.pop()
    gc.collect()
    assert len(sampler._edits) == 1


def test_a_step_sends_the_tokens_that_are_new() -> None:
    sampler = DeviceSampler(VOCAB)
    rows = [row([i, i + 1], repetition_penalty=2.0 if i != 1 else 1.0) for i in range(3)]

    def sent() -> tuple[list[list[int]], list[int], list[int]]:
        plan = sampler.stage(rows)
        a = {name: plan.arrays[f"seen_{name}"].tolist() for name in ("row", "new", "start")}
        tokens = plan.arrays["seen_token"].tolist()
        stops = zip(a["start"], a["start"][1:], strict=False)
        return [tokens[start:stop] for start, stop in stops], a["row"], a["new"]

    assert sent() == ([[0, 1], [], [2, 3]], [0, -1, 1], [1, 0, 1])
    rows[0].tokens.extend((7, 7))
    assert sent() == ([[7, 7], [], []], [0, -1, 1], [0, 0, 0])
    # One that goes leaves its place to one that comes, also to itself when it comes back.
    rows[0] = row([5], repetition_penalty=0.5)
    rows.append(row([6], repetition_penalty=0.5))
    gc.collect()
    tokens, places, is_new = sent()
    assert (tokens, is_new) == ([[5], [], [], [6]], [1, 0, 0, 1])
    assert sorted(places) == [-1, 0, 1, 2] and places[2] == 1


def test_the_table_grows_with_what_it_holds() -> None:
    sampler, cpu = DeviceSampler(VOCAB), Sampler(VOCAB)
    rows: list[SampleRow] = []
    random = np.random.default_rng(5)
    for count in (1, 3, 16, 17, 40, 2, 60):
        rows = [
            row(random.integers(0, VOCAB, 9).tolist(), seq=i, repetition_penalty=1.7)
            for i in range(count)
        ] + rows[: 2 * count]
        logits = torch.from_numpy(random.normal(0, 1, (len(rows), VOCAB)).astype(np.float32))
        want = cpu.sample(logits, rows)
        assert sampled(sampler, logits, rows, {}) == want
        for one, result in zip(rows, want, strict=True):
            one.tokens.append(result.token)


def test_no_rows() -> None:
    assert sampled(DeviceSampler(VOCAB), torch.empty(0, VOCAB), [], {}) == []


@pytest.mark.parametrize("k", [0, 1, 5, VOCAB + 1])
@pytest.mark.parametrize("count", [1, 16, 40])
def test_prompt_logprobs_are_those_of_a_cpu(count: int, k: int) -> None:
    random = np.random.default_rng(count)
    logits = mixed_logits(random, VOCAB, VOCAB + 6)[4:].repeat(2, 1)[:count]
    tokens = random.integers(0, VOCAB, count).tolist()
    device = DeviceSampler(VOCAB)
    with NoWaiting():
        outcome = device.run_prompt(logits, torch.from_numpy(np.array(tokens)), k)
    want = Sampler(VOCAB).prompt_logprobs(logits, tokens, k)
    assert device.read_prompt(outcome, tokens, k) == want
    assert len(want[0].top) == min(k, VOCAB)


def test_log_probabilities_wait_for_nothing() -> None:
    rows = [row(seq=i, logprobs=i if i % 3 else None) for i in range(NUM_ROWS)]
    random = np.random.default_rng(3)
    logits = mixed_logits(random, VOCAB, VOCAB)
    sampler = DeviceSampler(VOCAB)
    plan = sampler.stage(rows)
    tensors = on_device(plan.arrays)
    whole = sampler.run(logits, tensors, plan)
    at = tensors["logprob_rows"]
    with NoWaiting():
        got = ops.token_logprobs(logits[at], whole.tokens[at], 23)
    for a, b in zip(got, whole[2:], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_order_of_log_probabilities(dtype: torch.dtype) -> None:
    inf, nan = torch.inf, torch.nan
    logits = torch.tensor(
        [
            [0.0, -0.0, 1.0, 0.0, -0.0, -1.0],
            [-inf, 3.0, -inf, 3.0, -2.0, -2.0],
            [1.0, nan, inf, -inf, nan, inf],
            [-1.0, -1.0, -1.0, -1.0, -3.0, -0.5],
        ]
    ).to(dtype)
    _, ids, _ = ops.token_logprobs(logits, torch.zeros(4, dtype=torch.int64), 6)
    assert ids.tolist() == [
        [2, 0, 1, 3, 4, 5],
        [1, 3, 4, 5, 0, 2],
        [1, 4, 2, 5, 0, 3],
        [5, 0, 1, 2, 3, 4],
    ]
    for k in range(7):
        for logit, want in zip(logits, ids, strict=True):
            assert torch.equal(spec.top_tokens(logit, k), want[:k])


def test_a_failed_row_has_no_log_probability() -> None:
    logits = torch.zeros(3, VOCAB)
    logits[0, 9] = torch.nan
    rows = [row(logprobs=2), row(allowed_token_ids=(3,), bad_words=((3,),), logprobs=2), row()]
    got: list[Sampled] = sampled(DeviceSampler(VOCAB), logits, rows, {})
    assert [result.logprob for result in got] == [None] * 3
    assert [result.is_excluded for result in got] == [False, True, False]
    assert got[0].error is not None and "nan is the highest" in got[0].error


def test_one_row_compiles_what_all_rows_need(monkeypatch: pytest.MonkeyPatch) -> None:
    """While a model loads (`try_sampling`): for rows of any kind, as they come from a buffer, and
    for a vocabulary that is no multiple of 16."""
    pytest.importorskip("triton")
    from gpu_launches import launches
    from numerics.fake_queue import FakeQueue

    from quantd.kernels.triton import sampling

    def sample(logits: torch.Tensor, given: ops.SamplingRows) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, highest = sampling.sample_rows(logits, given)
        return tokens.zero_(), highest.zero_()

    monkeypatch.setattr(ops, "sample_rows", sample)
    random = np.random.default_rng(0)
    rows = [mixed_row(i, random, VOCAB) for i in range(NUM_ROWS)]
    logits = torch.zeros(NUM_ROWS, VOCAB + 6, dtype=torch.bfloat16)
    sampler, upward = DeviceSampler(VOCAB), Upward(FakeQueue(0, 1.0), lambda: None)
    with launches() as found:
        try_sampling(logits[:1], VOCAB)
        assert found.names() == {"sample_kernel"}
        for some in (rows, rows[:1], rows[3:4], rows[5:]):
            plan = sampler.stage(some, mixed_masks(random, VOCAB))
            sampler.run(logits[: len(some)], upward.upload(plan.arrays), plan)
    assert len(found.launched) == 5 and len(found.compiled) == 1

"""The sampler's exact behaviour: greedy, masks, ties, errors, log-probabilities, independence."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from quantd.daemon.types import SamplingParams
from quantd.daemon.worker.sampler import Sampler, SampleRow
from quantd.kernels.reference import sampling as spec

VOCAB = 1000
INF = math.inf


def logits(n: int, seed: int = 0, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randn(n, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def row(seq: int = 0, tokens: list[int] | None = None, prompt: int = 2, **kw: object) -> SampleRow:
    kw = {"max_tokens": 100, "temperature": 0.0} | kw
    return SampleRow(seq, SamplingParams(**kw), tokens or [1, 2], prompt)  # type: ignore[arg-type]


def one(x: torch.Tensor, r: SampleRow) -> int:
    (sampled,) = Sampler(x.shape[1]).sample(x, [r])
    assert sampled.error is None
    return sampled.token


# --- the generator ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # the known answers published with Random123
        (
            (0, 0, 0, 0),
            (0, 0),
            (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
        ),
        (
            (0xFFFFFFFF,) * 4,
            (0xFFFFFFFF,) * 2,
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(
    counter: spec.Words4, key: tuple[int, int], expected: spec.Words4
) -> None:
    assert spec.philox4x32(counter, key) == expected


def test_uniform_is_exact_in_float32_and_open_at_both_ends() -> None:
    values = [spec.philox_uniform(seed, position) for seed in range(40) for position in range(40)]
    assert torch.tensor(values, dtype=torch.float32).double().tolist() == values
    assert all(0 < value < 1 for value in values)
    assert len(set(values)) > len(values) - 3  # 2**23 values: a collision or two are no surprise


def test_uniform_depends_on_each_argument() -> None:
    base = spec.philox_uniform(5, 7, 0)
    others = [
        spec.philox_uniform(5 + 2**32, 7, 0),
        spec.philox_uniform(5, 7 + 2**32, 0),
        spec.philox_uniform(5, 7, 1),
    ]
    assert base not in others
    assert spec.philox_uniform(-1, 0) == spec.philox_uniform(2**64 - 1, 0)


# --- greedy -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_greedy_takes_the_lowest_id_of_equals(dtype: torch.dtype) -> None:
    x = torch.zeros(3, VOCAB, dtype=dtype)
    x[0, [700, 20, 21]] = 5.0
    x[2, 999] = 1.0
    sampled = Sampler(VOCAB).sample(x, [row(i) for i in range(3)])
    assert [(s.seq, s.token) for s in sampled] == [(0, 20), (1, 0), (2, 999)]


def test_padding_of_the_output_layer_is_never_sampled() -> None:
    x = logits(2)
    x[:, 990:] = 100.0
    sampled = Sampler(990).sample(x, [row(0), row(1, temperature=1.0)])
    assert all(s.token < 990 for s in sampled)


def test_the_logits_are_not_changed() -> None:
    x = logits(3)
    before = x.clone()
    rows = [row(i, temperature=1.0, logit_bias=((5, 3.0),), min_p=0.1, logprobs=2) for i in (0, 1)]
    Sampler(VOCAB).sample(x, [*rows, row(2)])
    Sampler(VOCAB).sample(x, [*rows, rows[0]])
    assert torch.equal(x, before)


# --- independence -------------------------------------------------------------------------------


def varied_rows(n: int) -> list[SampleRow]:
    kinds: list[dict[str, object]] = [
        {},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 20},
        {"temperature": 1.3, "top_p": 0.9},
        {"temperature": 1.0, "min_p": 0.05},
        {"temperature": 0.9, "repetition_penalty": 1.2, "frequency_penalty": 0.5},
        {"repetition_penalty": 1.5},
        {"temperature": 1.0, "allowed_token_ids": (3, 4, 900)},
    ]
    return [
        row(i, tokens=list(range(i, 2 * i + 4)), seed=i * 77, logprobs=3, **kinds[i % len(kinds)])
        for i in range(n)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_sampled_alike_in_any_batch(dtype: torch.dtype) -> None:
    x = logits(33, vocab=5003).to(dtype)
    rows = varied_rows(33)
    sampler = Sampler(5003)
    whole = sampler.sample(x, rows)
    alone = [sampler.sample(x[i : i + 1], [rows[i]])[0] for i in range(33)]
    order = torch.randperm(33, generator=torch.Generator().manual_seed(1)).tolist()
    shuffled = sampler.sample(x[order], [rows[i] for i in order])
    assert whole == alone
    assert [whole[i] for i in order] == shuffled


def test_a_failed_row_leaves_the_others_alone() -> None:
    x = logits(9)
    rows = varied_rows(8) + [row(8, temperature=1.0)]
    expected = Sampler(VOCAB).sample(x, rows)
    x[3, 5] = math.nan
    sampled = Sampler(VOCAB).sample(x, rows)
    assert sampled[3].error is not None
    assert [s for s in sampled if s.seq != 3] == [s for s in expected if s.seq != 3]


def test_the_position_moves_the_draw_and_the_seed_fixes_it() -> None:
    x = torch.zeros(1, VOCAB)
    at = [one(x, row(tokens=[1] * n, temperature=1.0, seed=9)) for n in range(2, 40)]
    again = [one(x, row(tokens=[1] * n, temperature=1.0, seed=9)) for n in range(2, 40)]
    other = [one(x, row(tokens=[1] * n, temperature=1.0, seed=10)) for n in range(2, 40)]
    assert at == again
    assert len(set(at)) > 30
    assert at != other


# --- filters ------------------------------------------------------------------------------------


def test_top_k_keeps_exactly_k_of_equal_logits() -> None:
    z = torch.tensor([0.0, -1.0, -1.0, -1.0, -2.0])
    assert spec.kept_tokens(z, 2, 1.0, 0.0).tolist() == [0, 1]
    assert spec.kept_tokens(z, 9, 1.0, 0.0).tolist() == [0, 1, 2, 3, 4]


def test_filters_never_keep_a_masked_token() -> None:
    z = torch.tensor([-INF, 0.0, -INF, -30.0])
    for top_k, top_p, min_p in [(3, 1.0, 0.0), (0, 0.9999999, 0.0), (3, 0.99999999, 0.0)]:
        assert 0 not in spec.kept_tokens(z, top_k, top_p, min_p).tolist()
        assert 2 not in spec.kept_tokens(z, top_k, top_p, min_p).tolist()


def test_top_p_keeps_the_token_that_crosses_and_ties_by_id() -> None:
    z = torch.tensor([0.1, 0.4, 0.1, 0.4]).log()
    z -= z.max()
    assert spec.kept_tokens(z, 0, 0.3, 0.0).tolist() == [1]
    assert spec.kept_tokens(z, 0, 0.5, 0.0).tolist() == [1, 3]
    assert spec.kept_tokens(z, 0, 0.85, 0.0).tolist() == [0, 1, 3]


def test_top_p_after_top_k_is_of_what_top_k_left() -> None:
    z = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    z -= z.max()
    assert spec.kept_tokens(z, 2, 0.55, 0.0).tolist() == [0]  # 0.4 / 0.7 > 0.55
    assert spec.kept_tokens(z, 0, 0.55, 0.0).tolist() == [0, 1]


def test_min_p_of_one_keeps_the_highest() -> None:
    z = torch.tensor([-1.0, 0.0, 0.0])
    assert spec.kept_tokens(z, 0, 1.0, 1.0).tolist() == [1, 2]


@pytest.mark.parametrize("scale", [0.0, 0.01, 1.0, 5.0, 80.0])
@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.9, 0.999, 0.9999999])
def test_top_p_in_bins_is_top_p_by_full_sort(scale: float, top_p: float) -> None:
    z = logits(1, seed=3, vocab=20_011)[0] * scale
    z[::7] = -INF
    z -= z.max()
    probabilities = z.double().softmax(-1)
    order = probabilities.sort(descending=True, stable=True).indices
    reached = probabilities[order].cumsum(-1)
    num = 1 + int((reached < top_p).sum())
    kept = set(spec.kept_tokens(z, 0, top_p, 0.0).tolist())
    # Sums in float32 and float64 may disagree about tokens within rounding of top_p.
    near = int(((reached - top_p).abs() < 1e-6).sum())
    assert abs(len(kept) - num) <= near + 1
    first = min(len(kept), num)
    assert kept >= set(order[: max(0, first - near - 1)].tolist())
    assert kept <= set(order[: max(len(kept), num)].tolist())


def test_choose_covers_the_whole_range_of_u() -> None:
    z = logits(1, vocab=5003)[0]
    z[[0, 1, 5002]] = -INF
    cdf = z.softmax(-1).double().cumsum(-1)
    u = torch.tensor([2.0**-24, 0.25, 0.5, 0.75, 1 - 2.0**-24], dtype=torch.float64)
    chosen = spec.choose(z.expand(5, -1), u)
    expected = torch.searchsorted(cdf, u * cdf[-1], right=True)
    assert (cdf[chosen] - cdf[expected]).abs().max() < 1e-6
    assert chosen.tolist()[0] >= 2
    assert chosen.tolist()[-1] < 5002


def test_choose_takes_the_only_possible_column() -> None:
    for column in (0, 255, 256, 511, 700):
        z = torch.full((1, 701), -INF)
        z[0, column] = 0.0
        for u in (2.0**-24, 0.5, 1 - 2.0**-24):
            assert spec.choose(z, torch.tensor([u], dtype=torch.float64)).tolist() == [column]


# --- masks --------------------------------------------------------------------------------------


def test_min_tokens_masks_stop_tokens_until_enough() -> None:
    x = torch.zeros(1, VOCAB)
    x[0, 7], x[0, 8], x[0, 9] = 9.0, 8.0, 7.0
    stop = {"stop_token_ids": (7, 8, VOCAB + 5), "min_tokens": 2}
    assert one(x, row(tokens=[1, 2], **stop)) == 9
    assert one(x, row(tokens=[1, 2, 3], **stop)) == 9
    assert one(x, row(tokens=[1, 2, 3, 4], **stop)) == 7


def test_bad_words_of_one_and_of_several_tokens() -> None:
    x = torch.zeros(1, VOCAB)
    x[0, 7], x[0, 8], x[0, 9] = 9.0, 8.0, 7.0
    bad = {"bad_words": ((7,), (30, 31, 8))}
    assert one(x, row(tokens=[1, 2], **bad)) == 8
    assert one(x, row(tokens=[1, 2, 30], **bad)) == 8
    assert one(x, row(tokens=[1, 2, 30, 31], **bad)) == 9
    assert one(x, row(tokens=[1, 2, 30, 31, 4], **bad)) == 8
    # The prompt's end is not output.
    assert one(x, row(tokens=[1, 30, 31], prompt=2, **bad)) == 8


def test_allowed_ids_and_bias() -> None:
    x = torch.zeros(1, VOCAB)
    x[0, 7] = 9.0
    assert one(x, row(allowed_token_ids=(30, 31), logit_bias=((31, 1.0),))) == 31
    # Bias does not bring back what is not allowed.
    assert one(x, row(allowed_token_ids=(30, 31), logit_bias=((5, 100.0),))) == 30
    assert one(x, row(logit_bias=((5, 5.0), (5, 5.0)))) == 5


def test_penalties_see_what_they_should() -> None:
    x = torch.zeros(1, VOCAB)
    x[0, 1], x[0, 2], x[0, 3] = 3.0, 2.9, 2.8
    # Token 1 is in the prompt: repetition counts it, presence and frequency do not.
    assert one(x, row(tokens=[1, 50, 60], repetition_penalty=1.2)) == 2
    assert one(x, row(tokens=[1, 50, 60], presence_penalty=2.0, frequency_penalty=2.0)) == 1
    assert one(x, row(tokens=[0, 50, 1, 2, 2], presence_penalty=0.15)) == 1
    assert one(x, row(tokens=[0, 50, 1, 1, 2], frequency_penalty=0.11)) == 3
    # A negative logit is multiplied.
    y = torch.full((1, VOCAB), -2.0)
    assert one(y, row(tokens=[0, 1], repetition_penalty=2.0)) == 2


# --- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [math.nan, INF])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_that_are_not_finite_fail_the_row(
    value: float, temperature: float, dtype: torch.dtype
) -> None:
    x = logits(1).to(dtype)
    x[0, 500] = value
    (sampled,) = Sampler(VOCAB).sample(x, [row(4, temperature=temperature, logprobs=1)])
    assert sampled.seq == 4
    assert sampled.error is not None and "not finite" in sampled.error
    assert sampled.logprob is None


def test_minus_infinity_is_a_legitimate_logit() -> None:
    x = torch.full((1, VOCAB), -INF)
    x[0, 44] = 1.0
    assert one(x, row(temperature=1.0)) == 44
    assert one(x, row(temperature=1.0, top_p=0.5, top_k=10)) == 44


def test_a_row_with_nothing_but_minus_infinity_fails() -> None:
    (sampled,) = Sampler(VOCAB).sample(torch.full((1, VOCAB), -INF), [row()])
    assert sampled.error is not None and "not finite" in sampled.error


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_masking_the_whole_vocabulary_is_an_error(temperature: float) -> None:
    bad = row(3, temperature=temperature, allowed_token_ids=(7,), bad_words=((7,),))
    sampled = Sampler(VOCAB).sample(logits(2), [bad, row(4)])
    assert sampled[0].error is not None and "no token may be sampled" in sampled[0].error
    assert sampled[0].is_excluded
    assert sampled[1].error is None


def test_a_step_without_rows() -> None:
    assert Sampler(VOCAB).sample(torch.empty(0, VOCAB), []) == []


@pytest.mark.parametrize("temperature", [1e-6, 1e-4, 100.0])
def test_extreme_temperatures(temperature: float) -> None:
    x = logits(1) * 20
    token = one(x, row(temperature=temperature))
    assert temperature == 100.0 or token == int(x.argmax())


# --- log-probabilities --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs_are_of_the_raw_distribution(dtype: torch.dtype) -> None:
    x = logits(4).to(dtype)
    rows = [row(i, temperature=1.5, top_k=3, logit_bias=((5, 9.0),), logprobs=4) for i in range(4)]
    reference = torch.log_softmax(x.double(), -1)
    for i, sampled in enumerate(Sampler(VOCAB).sample(x, rows)):
        entry = sampled.logprob
        assert entry is not None and entry.token == sampled.token
        assert entry.logprob == pytest.approx(float(reference[i, sampled.token]), abs=1e-5)
        order = reference[i].sort(descending=True, stable=True)
        assert [token for token, _ in entry.top] == order.indices[:4].tolist()
        assert [value for _, value in entry.top] == pytest.approx(order.values[:4].tolist())


def test_top_logprobs_ties_by_id_and_sizes() -> None:
    x = torch.zeros(1, 6)
    x[0, 4] = 1.0
    sampler = Sampler(6)

    def top(k: int) -> list[int]:
        (sampled,) = sampler.sample(x, [row(logprobs=k)])
        assert sampled.logprob is not None
        return [token for token, _ in sampled.logprob.top]

    assert top(0) == []
    assert top(3) == [4, 0, 1]
    assert top(20) == [4, 0, 1, 2, 3, 5]
    (sampled,) = sampler.sample(x, [row()])
    assert sampled.logprob is None


def test_prompt_logprobs_match_log_softmax() -> None:
    x = logits(37, seed=5).to(torch.bfloat16)
    next_tokens = list(range(100, 137))
    entries = Sampler(VOCAB).prompt_logprobs(x, next_tokens, 2)
    reference = torch.log_softmax(x.double(), -1)
    assert [e.token for e in entries] == next_tokens
    for i, entry in enumerate(entries):
        assert entry.logprob == pytest.approx(float(reference[i, next_tokens[i]]), abs=1e-5)
        assert entry.top[0][0] == int(x[i].argmax())
        assert entry.top[0][1] >= entry.top[1][1]
    assert Sampler(VOCAB).prompt_logprobs(x[:0], [], 2) == ()


# --- masks of grammars ----------------------------------------------------------------------------


@pytest.mark.parametrize("masked_rows", [range(40), range(0, 40, 3), [7], [0, 1, 2, 39]])
def test_bits_mask_the_tokens_that_they_should(masked_rows: Sequence[int]) -> None:
    """Whichever rows have masks, the highest allowed token is chosen and the others are free."""
    vocab = 1003  # no multiple of 8 or 32
    x = logits(40, 3, vocab)
    allowed = torch.rand(40, vocab, generator=torch.Generator().manual_seed(4)) < 0.01
    allowed[:, 5] = True
    packed = np.packbits(allowed.numpy(), axis=1, bitorder="little")
    bits = np.pad(packed, ((0, 0), (0, -packed.shape[1] % 4))).view(np.int32)
    masks = {i: bits[i] for i in masked_rows}
    sampled = Sampler(vocab).sample(x, [row(i) for i in range(40)], masks)
    for i, item in enumerate(sampled):
        expected = x[i].masked_fill(~allowed[i], -INF) if i in masks else x[i]
        assert item.token == int(expected.argmax())


def test_what_is_masked_stays_so_whatever_it_was() -> None:
    x = torch.tensor([[INF, -INF, 1.0, -2.0]])
    spec.keep_allowed(x, torch.tensor([[0, 1, 1, 0]], dtype=torch.uint8))
    assert x.tolist() == [[-INF, -INF, 1.0, -INF]]

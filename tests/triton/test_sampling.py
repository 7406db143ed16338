"""Tokens against the specification: the same ones, not similar ones."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from quantd.kernels.reference import sample as reference
from quantd.kernels.reference import sampling as spec
from quantd.kernels.sampling import ALL_MASKED, MASKED, NOT_FINITE, SamplingRows
from quantd.kernels.triton import sampling

SEEN = 2
"""In a case below: the token was seen."""

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in cast")


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that small rows have several."""
    monkeypatch.setattr(sampling, "_CHUNK", 64)


def plain(count: int, temperature: float = 1.0) -> SamplingRows:
    """Rows that nothing is done to."""

    def of(value: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.full((count,), value, dtype=dtype)

    none = torch.zeros(0)
    return SamplingRows(
        seed=torch.randint(-(2**63), 2**63 - 1, (count,)),
        position=torch.randint(0, 2**40, (count,)),
        temperature=of(temperature),
        top_k=of(0, torch.int32),
        top_p=of(1, torch.float64),
        min_p=of(0, torch.float64),
        repetition=of(1),
        frequency=of(0),
        presence=of(0),
        mask=torch.zeros(0, 1, dtype=torch.int32),
        mask_row=torch.full((count,), -1, dtype=torch.int32),
        edit_start=torch.zeros(count + 1, dtype=torch.int32),
        edit_token=none.int(),
        edit_bias=none,
        edit_count=none,
        edit_flags=none.int(),
        seen=torch.zeros(0, 1, dtype=torch.int32),
        seen_row=of(-1, torch.int32),
        seen_new=torch.zeros(count, dtype=torch.int32),
        seen_start=torch.zeros(count + 1, dtype=torch.int32),
        seen_token=none.int(),
    )


def edited(rows: SamplingRows, vocabulary: int) -> SamplingRows:
    """Some tokens of each row with a bias, counts and flags."""
    count = len(rows.seed)
    sizes = torch.randint(0, min(vocabulary, 150), (count,))
    tokens = torch.cat([torch.randperm(vocabulary)[:size] for size in sizes.tolist()]).int()
    total = len(tokens)
    put_out = torch.rand(total) < 0.3
    # Of what is edited, and else.
    known = [part[::2] for part in tokens.split(sizes.tolist())]
    known = [torch.cat((part, torch.randint(0, vocabulary, (9,)).int())) for part in known]
    return replace(
        with_seen(rows, known, vocabulary),
        repetition=torch.rand(count) + 0.7,
        frequency=torch.randn(count) * 0.5,
        presence=torch.randn(count) * 0.5,
        edit_start=torch.cat((torch.zeros(1), sizes.cumsum(0))).int(),
        edit_token=tokens,
        edit_bias=torch.where(torch.rand(total) < 0.3, torch.randn(total) * 3, 0.0),
        edit_count=torch.where(put_out, torch.randint(1, 5, (total,)), 0).float(),
        edit_flags=torch.where(torch.rand(total) < 0.2, MASKED, 0).int(),
    )


def with_seen(
    rows: SamplingRows, tokens: Sequence[torch.Tensor], vocabulary: int, is_new: int = 1
) -> SamplingRows:
    """Tokens of each row, in a table where another one's were."""
    sizes = torch.tensor([0, *map(len, tokens)])
    return replace(
        rows,
        seen=torch.full((len(tokens) + 2, -(-vocabulary // 32)), -1, dtype=torch.int32),
        seen_row=torch.randperm(len(tokens) + 2)[: len(tokens)].int(),
        seen_new=torch.full((len(tokens),), is_new, dtype=torch.int32),
        seen_start=sizes.cumsum(0).int(),
        seen_token=torch.cat([*tokens]).int(),
    )


def masked(rows: SamplingRows, vocabulary: int, share: float) -> SamplingRows:
    """A grammar's mask that allows a share of the tokens, token 0 always."""
    words = -(-vocabulary // 32)
    allowed = torch.rand(len(rows.seed), words, 32) < share
    allowed[:, 0, 0] = True
    bits = (allowed.long() << torch.arange(32)).sum(-1)
    return replace(rows, mask=bits.to(torch.int32), mask_row=torch.arange(len(bits)).int())


def assert_same(logits: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
    other = replace(rows, seen=rows.seen.clone())
    tokens, highest = sampling.sample_rows(logits, rows)
    want, best = reference.sample_rows(logits, other)
    assert torch.equal(tokens, want)
    assert torch.equal(highest, best) or best.isnan().any()
    assert torch.equal(rows.seen, other.seen)
    return tokens


def test_uniform_numbers_are_those_of_the_specification() -> None:
    edges = torch.tensor([0, 1, -1, 2**32 - 1, 2**32, 2**63 - 1, -(2**63)])
    seeds = torch.cat((edges, torch.randint(-(2**63), 2**63 - 1, (300,))))
    positions = torch.cat((edges.flip(0).abs(), torch.randint(0, 2**62, (300,))))
    got = sampling.philox_uniform(seeds, positions)
    pairs = zip(seeds.tolist(), positions.tolist(), strict=True)
    assert got.tolist() == [spec.philox_uniform(s, p) for s, p in pairs]


@pytest.mark.parametrize("vocabulary", [1, 5, 63, 64, 65, 300])
def test_greedy(dtype: torch.dtype, vocabulary: int) -> None:
    logits = (torch.randn(6, vocabulary) * 2).round().to(dtype)  # equal ones
    assert_same(logits, plain(6, 0.0))
    assert_same(logits, edited(plain(6, 0.0), vocabulary))


@pytest.mark.parametrize("vocabulary", [1, 5, 64, 300])
@pytest.mark.parametrize("rounded", [False, True])
def test_filters(vocabulary: int, rounded: bool) -> None:
    """rounded: many equal logits, so that a filter cuts through them."""
    count = 16
    logits = torch.randn(count, vocabulary) * 3
    if rounded:
        logits = logits.round()
    rows = replace(
        plain(count),
        temperature=torch.rand(count) * 2 + 0.05,
        top_k=torch.randint(0, vocabulary + 2, (count,)).int(),
        top_p=torch.rand(count).double().clamp(min=1e-3),
        min_p=torch.rand(count).double() ** 4,
    )
    off = torch.rand(3, count) < 0.4
    rows.top_k[off[0]], rows.top_p[off[1]], rows.min_p[off[2]] = 0, 1, 0
    assert_same(logits, rows)


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p", "kept"),
    [(3, 1.0, 0.0, 3), (0, 0.11, 0.0, 3), (0, 1.0, 0.93, 3), (3, 0.5, 0.0, 2), (9, 1.0, 0.97, 2)],
)
def test_a_filter_keeps_no_more_and_no_less(
    top_k: int, top_p: float, min_p: float, kept: int
) -> None:
    """Probabilities that fall slowly, by 3 percent, from the highest id on: each of those that are
    kept comes up in as many rows."""
    count = 32
    rows = replace(
        plain(count),
        top_k=torch.full((count,), top_k).int(),
        top_p=torch.full((count,), top_p, dtype=torch.float64),
        min_p=torch.full((count,), min_p, dtype=torch.float64),
    )
    logits = (torch.arange(40) * 0.03).repeat(count, 1)
    assert set(assert_same(logits, rows).tolist()) == set(range(40 - kept, 40))


@pytest.mark.parametrize(
    ("logit", "bias", "count", "flags", "want"),
    [
        (1.0, 0.0, 0, 0, 7),
        (1.0, -0.6, 0, 0, 3),
        (0.2, 0.6, 0, 0, 7),
        (1.0, 9.0, 0, MASKED, 3),
        (1.0, 0.0, 0, SEEN, 7),  # 1 / 1.5
        (0.7, 0.0, 0, SEEN, 3),
        (1.0, 0.0, 1, 0, 3),  # - 0.1 - 0.45
        (1.0, 0.04, 1, 0, 3),
        (1.0, 0.06, 1, 0, 7),
        (1.3, 0.0, 3, 0, 7),
        (1.3, 0.0, 4, 0, 3),
        (1.48, 0.0, 4, SEEN, 3),
        (2.1, 0.0, 4, SEEN, 7),  # 1.4 - 0.4 - 0.45
    ],
)
def test_what_an_edit_does(logit: float, bias: float, count: int, flags: int, want: int) -> None:
    """To token 7, beside token 3 of 0.5."""
    logits = torch.full((1, 80), -3.0)
    logits[0, 3], logits[0, 7] = 0.5, logit
    rows = replace(
        plain(1, 0.0),
        repetition=torch.tensor([1.5]),
        frequency=torch.tensor([0.1]),
        presence=torch.tensor([0.45]),
        edit_start=torch.tensor([0, 1]).int(),
        edit_token=torch.tensor([7]).int(),
        edit_bias=torch.tensor([bias]),
        edit_count=torch.tensor([float(count)]),
        edit_flags=torch.tensor([flags & MASKED]).int(),
    )
    if flags & SEEN:
        rows = with_seen(rows, [torch.tensor([7])], 80)
    assert assert_same(logits, rows).tolist() == [want]


def test_the_penalty_of_a_negative_logit_makes_it_lower() -> None:
    rows = with_seen(replace(plain(1, 0.0), repetition=torch.tensor([2.0])), [torch.tensor([1])], 2)
    assert assert_same(torch.tensor([[-1.5, -1.0]]), rows).tolist() == [0]


def test_what_was_seen_is_kept_from_step_to_step() -> None:
    """Also of a row that fails, whose tokens go on; and where a step is done twice."""
    vocabulary, count = 130, 4
    logits = torch.full((count, vocabulary), 1.0)
    logits[2, 5] = math.nan
    plainly = replace(plain(count, 0.0), repetition=torch.full((count,), 2.0))
    first = [torch.arange(0, n) for n in (130, 3, 40, 0)]
    rows = with_seen(plainly, first, vocabulary)
    rows.seen_row[3] = -1
    for _ in range(2):
        assert assert_same(logits, rows).tolist() == [0, 3, NOT_FINITE, 0]
    more = with_seen(
        plainly, [torch.tensor([5, 5]), torch.arange(3, 129), *first[2:]], vocabulary, 0
    )
    rows = replace(more, seen=rows.seen, seen_row=rows.seen_row)
    logits[2, 5] = 0
    for _ in range(2):
        assert assert_same(logits, rows).tolist() == [0, 129, 40, 0]
    bits = rows.seen[int(rows.seen_row[1])]
    assert bits.tolist() == [-1, -1, -1, -1, 1]


def test_everything_at_once(dtype: torch.dtype) -> None:
    count, vocabulary = 24, 333
    rows = replace(
        plain(count),
        temperature=torch.where(torch.rand(count) < 0.2, 0.0, torch.rand(count) + 0.1),
        top_k=torch.randint(0, 50, (count,)).int(),
        top_p=(torch.rand(count) + 0.5).double().clamp(max=1),
        min_p=torch.rand(count).double() * 0.1,
    )
    rows = masked(edited(rows, vocabulary), vocabulary, 0.3)
    padded = torch.randn(count, vocabulary + 7) * 3
    padded[:, vocabulary:] = math.nan
    tokens = assert_same(padded[:, :vocabulary].to(dtype), rows)
    assert len(tokens.unique()) > 10


def test_few_are_allowed() -> None:
    for share in (0.0, 0.02):
        rows = replace(masked(plain(20), 200, share), top_p=torch.full((20,), 0.9).double())
        tokens = assert_same(torch.randn(20, 200), rows)
        assert share or not tokens.any()


def test_top_k_of_masked_rows_and_of_more_than_there_are() -> None:
    rows = replace(masked(plain(20), 100, 0.05), top_k=torch.full((20,), 60).int())
    assert_same(torch.randn(20, 100), rows)


def test_all_equal() -> None:
    rows = plain(10)
    for top_k, top_p in ((0, 1.0), (7, 1.0), (0, 0.25), (100, 0.5)):
        chosen = replace(
            rows,
            top_k=torch.full((10,), top_k).int(),
            top_p=torch.full((10,), top_p, dtype=torch.float64),
        )
        tokens = assert_same(torch.zeros(10, 128), chosen)
        assert int(tokens.max()) < (top_k or 128) * top_p


def test_top_p_brings_nothing_back_that_top_k_and_min_p_have_left_out() -> None:
    """Also where it asks for more than sums of float32 reach, among tokens that are equal."""
    count, vocabulary = 24, 130
    logits = (torch.rand(count, vocabulary) * 3).round() * 0.3
    rows = replace(
        plain(count),
        top_k=torch.randint(1, vocabulary, (count,)).int(),
        top_p=1 - torch.tensor([1e-7, 1e-9, 2.0**-53] * 8, dtype=torch.float64),
        min_p=torch.rand(count).double() * 0.8,
    )
    tokens, _ = sampling.sample_rows(logits, rows)
    for r, token in enumerate(tokens.tolist()):
        z = logits[r] - logits[r].max()
        assert token in spec.kept_tokens(z, int(rows.top_k[r]), 1.0, float(rows.min_p[r]))


def test_probabilities_that_are_nothing() -> None:
    """exp(z) of all but one is 0 in fp32."""
    logits = torch.full((4, 100), -500.0)
    logits[:, 37] = 0
    rows = replace(plain(4), top_p=torch.full((4,), 0.999).double())
    assert assert_same(logits, rows).tolist() == [37] * 4
    assert assert_same(logits, plain(4)).tolist() == [37] * 4


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_is_not_finite_is_said_so_and_the_others_are_not_touched(bad: float) -> None:
    logits = torch.randn(4, 100)
    logits[1, 70], logits[2] = bad, -math.inf
    for temperature in (0.0, 1.0):
        rows = plain(4, temperature)
        tokens, highest = sampling.sample_rows(logits, rows)
        want, best = reference.sample_rows(logits, rows)
        assert torch.equal(tokens, want)
        assert tokens[1:3].tolist() == [NOT_FINITE] * 2
        torch.testing.assert_close(highest, best, rtol=0, atol=0, equal_nan=True)


def test_a_row_without_an_allowed_token() -> None:
    mask = torch.tensor([[0, 4], [0, 0]]).int()
    rows = replace(plain(2), mask=mask, mask_row=torch.tensor([1, 0]).int())
    for temperature in (0.0, 1.0):
        rows = replace(rows, temperature=torch.full((2,), temperature))
        assert assert_same(torch.randn(2, 40), rows).tolist() == [ALL_MASKED, 34]


def test_a_row_alone_gives_the_token_that_it_gives_in_a_batch() -> None:
    logits = torch.randn(5, 200)
    rows = replace(plain(5), top_p=torch.full((5,), 0.8).double())
    tokens, _ = sampling.sample_rows(logits, rows)
    for r in range(5):
        one = slice(r, r + 1)
        alone = replace(
            plain(1), seed=rows.seed[one], position=rows.position[one], top_p=rows.top_p[one]
        )
        assert sampling.sample_rows(logits[one], alone)[0].item() == tokens[r]


def test_no_rows() -> None:
    assert sampling.sample_rows(torch.empty(0, 10), plain(0))[0].shape == (0,)

"""Tokens of a GPU: those that a CPU chooses from the same logits, at a real vocabulary."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from gpu_harness import DEVICE, DTYPES, MARKS, sized

from quantd.kernels import ops, reference
from quantd.kernels.sampling import ALL_MASKED, MASKED, NOT_FINITE, SamplingRows

pytestmark = MARKS

VOCABULARY = sized(128256, 700)
COUNT = sized(64, 12)


def plain(count: int = COUNT, temperature: float = 0.9) -> SamplingRows:
    """On the CPU; nothing is done to the rows but drawing."""

    def of(value: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.full((count,), value, dtype=dtype)

    none = torch.zeros(0)
    return SamplingRows(
        seed=torch.randint(-(2**62), 2**62, (count,)),
        position=torch.randint(0, 2**40, (count,)),
        temperature=of(temperature),
        top_k=of(0, torch.int32),
        top_p=of(1, torch.float64),
        min_p=of(0, torch.float64),
        repetition=of(1),
        frequency=of(0),
        presence=of(0),
        mask=torch.zeros(0, -(-VOCABULARY // 32), dtype=torch.int32),
        mask_row=of(-1, torch.int32),
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


def edited(rows: SamplingRows) -> SamplingRows:
    count, each = len(rows.seed), sized(2000, 50)
    tokens = torch.cat([torch.randperm(VOCABULARY)[:each] for _ in range(count)]).int()
    total = len(tokens)
    seen = torch.rand(total) < 0.5
    # Those of the first half of a row's edits were seen, and some tokens that have no edit.
    known = tokens.view(count, each)[:, : each // 2]
    known = torch.cat((known, torch.randint(0, VOCABULARY, (count, each)).int()), 1)
    return replace(
        rows,
        seen=torch.full((count, -(-VOCABULARY // 32)), -1, dtype=torch.int32),
        seen_row=torch.randperm(count).int(),
        seen_new=torch.ones(count, dtype=torch.int32),
        seen_start=(torch.arange(count + 1) * known.shape[1]).int(),
        seen_token=known.flatten(),
        repetition=torch.rand(count) + 0.7,
        frequency=torch.randn(count) * 0.5,
        presence=torch.randn(count) * 0.5,
        edit_start=(torch.arange(count + 1) * each).int(),
        edit_token=tokens,
        edit_bias=torch.where(torch.rand(total) < 0.3, torch.randn(total) * 3, 0.0),
        edit_count=torch.where(seen, torch.randint(0, 5, (total,)), 0).float(),
        edit_flags=torch.where(torch.rand(total) < 0.2, MASKED, 0).int(),
    )


def masked(rows: SamplingRows) -> SamplingRows:
    """Every row but one has a mask of its own."""
    count = len(rows.seed)
    bits = torch.randint(-(2**31), 2**31 - 1, (count, -(-VOCABULARY // 32)))
    which = torch.arange(count)
    which[count // 2] = -1
    return replace(rows, mask=(bits | 1).int(), mask_row=which.int())


def mixed(rows: SamplingRows) -> SamplingRows:
    """Every kind of request in one step."""
    count = len(rows.seed)
    some = torch.arange(count)
    return replace(
        rows,
        temperature=torch.where(some % 5 == 0, 0.0, 0.2 + some / count),
        top_k=torch.where(some % 3 == 0, 1 + some * 7, 0).int(),
        top_p=torch.where(some % 4 == 1, 0.3 + 0.6 * some / count, 1.0).double(),
        min_p=torch.where(some % 7 == 2, 0.05, 0.0).double(),
    )


def on_device(rows: SamplingRows) -> SamplingRows:
    values = {field.name: getattr(rows, field.name) for field in fields(rows)}
    return SamplingRows(**{name: value.to(DEVICE) for name, value in values.items()})


CASES = {
    "greedy": lambda: plain(temperature=0.0),
    "greedy, edited": lambda: edited(plain(temperature=0.0)),
    "plain": lambda: plain(),
    "hot": lambda: plain(temperature=2.0),
    "top-k": lambda: replace(plain(), top_k=torch.full((COUNT,), 50).int()),
    "top-p": lambda: replace(plain(), top_p=torch.full((COUNT,), 0.9).double()),
    "min-p": lambda: replace(plain(), min_p=torch.full((COUNT,), 0.02).double()),
    "masked": lambda: masked(plain()),
    "mixed": lambda: mixed(masked(edited(plain()))),
}
_AT_A_LIMIT = 1
"""Rows of a case whose cumulated probability may end within rounding of a limit."""


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_tokens_are_those_of_a_cpu(name: str, dtype: torch.dtype) -> None:
    logits = (torch.randn(COUNT, VOCABULARY) * 3).to(dtype)
    rows = CASES[name]()
    want, best = reference.sample_rows(logits, rows)
    tokens, highest = ops.sample_rows(logits.to(DEVICE), on_device(rows))
    wrong = int((tokens.cpu() != want).sum())
    assert wrong <= (0 if "greedy" in name else _AT_A_LIMIT), f"{wrong} of {COUNT} rows"
    assert torch.equal(highest.cpu(), best)


def test_a_row_is_the_same_alone_and_in_any_batch() -> None:
    logits = (torch.randn(COUNT, VOCABULARY, device=DEVICE) * 3).bfloat16()
    rows = mixed(masked(plain()))
    together, _ = ops.sample_rows(logits, on_device(rows))
    for row in range(0, COUNT, 5):
        values = {field.name: getattr(rows, field.name) for field in fields(rows)}
        one = {
            name: value[row : row + 1] if len(value) == COUNT and name != "mask" else value
            for name, value in values.items()
        } | dict.fromkeys(("edit_start", "seen_start"), torch.zeros(2, dtype=torch.int32))
        alone, _ = ops.sample_rows(logits[row : row + 1], on_device(SamplingRows(**one)))
        assert int(alone) == int(together[row])


def test_equal_logits_give_the_lowest_id() -> None:
    logits = torch.zeros(3, VOCABULARY, device=DEVICE).half()
    logits[1, 5:] = 1
    logits[2, -1] = 2
    tokens, _ = ops.sample_rows(logits, on_device(plain(3, 0.0)))
    assert tokens.tolist() == [0, 5, VOCABULARY - 1]


def test_rows_that_have_no_token_spoil_no_other() -> None:
    logits = torch.randn(COUNT, VOCABULARY, device=DEVICE).bfloat16()
    rows = masked(plain())
    clean, _ = ops.sample_rows(logits, on_device(rows))
    logits[1, 100], logits[2, 7] = float("nan"), float("inf")
    rows.mask[3] = 0
    tokens, _ = ops.sample_rows(logits, on_device(rows))
    assert tokens[1:4].tolist() == [NOT_FINITE, NOT_FINITE, ALL_MASKED]
    assert torch.equal(tokens[4:], clean[4:]) and int(tokens[0]) == int(clean[0])


def test_a_view_of_padded_logits() -> None:
    """A vocabulary that is no multiple of anything, cut from what the output layer gave."""
    wide = torch.randn(COUNT, VOCABULARY + 64, device=DEVICE).bfloat16()
    wide[:, -64:] = 100
    rows = on_device(mixed(plain()))
    view = wide[:, :VOCABULARY]
    tokens, _ = ops.sample_rows(view, rows)
    assert torch.equal(tokens, ops.sample_rows(view.contiguous(), rows)[0])
    assert int(tokens.max()) < VOCABULARY

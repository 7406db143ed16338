"""`ops.sample_rows`, made for a device, gives the tokens that the worker's sampler gives."""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch

from quantd.daemon.types import SamplingParams
from quantd.daemon.worker.sampler import Sampler, SampleRow
from quantd.kernels import ops
from quantd.kernels.sampling import ALL_MASKED, MASKED, NOT_FINITE, SamplingRows

VOCAB = 200


def _row(index: int, random: np.random.Generator) -> SampleRow:
    filters = random.random(3) < 0.5
    params = SamplingParams(
        max_tokens=9,
        temperature=float(random.choice([0.0, 0.5, 1.3])),
        top_k=int(random.integers(1, 30)) if filters[0] else 0,
        top_p=float(random.uniform(0.3, 1)) if filters[1] else 1.0,
        min_p=float(random.uniform(0, 0.2)) if filters[2] else 0.0,
        seed=int(random.integers(-(2**62), 2**62)),
        repetition_penalty=float(random.uniform(0.8, 1.5)),
        frequency_penalty=float(random.uniform(-1, 1)),
        presence_penalty=float(random.uniform(-1, 1)),
        min_tokens=30,
        stop_token_ids=(3, 5),
        logit_bias=((7, 2.5), (3, 9.0), (11, -1.0)),
    )
    return SampleRow(index, params, random.integers(0, VOCAB, 20).tolist(), 8)


def _edits(row: SampleRow) -> dict[int, tuple[float, int, int]]:
    """Token -> bias, count, flags."""
    bias = dict(row.sampling.logit_bias)
    counts = Counter(row.tokens[row.num_prompt_tokens :])
    masked = set(row.sampling.stop_token_ids)
    return {
        token: (
            bias.get(token, 0),
            counts[token],
            MASKED * (token in masked),
        )
        for token in {*bias, *counts, *masked}
    }


def _batch(rows: list[SampleRow], mask: torch.Tensor) -> SamplingRows:
    params = [row.sampling for row in rows]
    edits = [_edits(row) for row in rows]
    flat = [(token, *edit) for row in edits for token, edit in row.items()]
    token, bias, count, flags = (torch.tensor(column) for column in zip(*flat, strict=True))
    return SamplingRows(
        seed=torch.tensor([p.seed for p in params]),
        position=torch.tensor([len(row.tokens) for row in rows]),
        temperature=torch.tensor([p.temperature for p in params]),
        top_k=torch.tensor([p.top_k for p in params]).int(),
        top_p=torch.tensor([p.top_p for p in params]).double(),
        min_p=torch.tensor([p.min_p for p in params]).double(),
        repetition=torch.tensor([p.repetition_penalty for p in params]),
        frequency=torch.tensor([p.frequency_penalty for p in params]),
        presence=torch.tensor([p.presence_penalty for p in params]),
        mask=mask,
        mask_row=torch.arange(len(rows)).int(),
        edit_start=torch.tensor([0, *(len(row) for row in edits)]).cumsum(0).int(),
        edit_token=token.int(),
        edit_bias=bias.float(),
        edit_count=count.float(),
        edit_flags=flags.int(),
        seen=torch.full((len(rows), -(-VOCAB // 32)), 0x5A5A).int(),
        seen_row=torch.arange(len(rows)).flip(0).int(),
        seen_new=torch.ones(len(rows)).int(),
        seen_start=torch.tensor([0, *(len(row.tokens) for row in rows)]).cumsum(0).int(),
        seen_token=torch.tensor([token for row in rows for token in row.tokens]).int(),
    )


def test_the_same_tokens_as_the_sampler_of_the_worker() -> None:
    random = np.random.default_rng(0)
    rows = [_row(i, random) for i in range(60)]
    words = random.integers(-(2**31), 2**31 - 1, (len(rows), -(-VOCAB // 32)), dtype=np.int32)
    words[5] = 0
    logits = torch.randn(len(rows), VOCAB) * 3
    logits[9, 4] = torch.nan
    sampled = Sampler(VOCAB).sample(logits, rows, dict(enumerate(words)))
    tokens, highest = ops.sample_rows(logits, _batch(rows, torch.from_numpy(words)))
    assert sampled[5].error and tokens[5] == ALL_MASKED
    assert sampled[9].error and tokens[9] == NOT_FINITE and highest[9].isnan()
    known = [i for i, result in enumerate(sampled) if result.error is None]
    assert len(known) == 58
    assert tokens[known].tolist() == [sampled[i].token for i in known]

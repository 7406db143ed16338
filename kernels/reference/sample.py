"""One token for each row of a step, put together of `sampling.py`: the specification."""

import math

import torch

from quantd.kernels.reference import sampling
from quantd.kernels.sampling import ALL_MASKED, MASKED, NOT_FINITE, SamplingRows


def sample_rows(logits: torch.Tensor, rows: SamplingRows) -> tuple[torch.Tensor, torch.Tensor]:
    """logits [n, V] of any floating dtype, a view or not, not changed -> (tokens int64 [n],
    highest fp32 [n]): a token's id, NOT_FINITE or ALL_MASKED, and the highest logit of the row as
    it came, NaN where there is one. What is new is added to `rows.seen`."""
    for r in range(len(logits)):
        _see(rows, r)
    highest = logits.float().amax(-1)
    tokens = [_sample(logits[r].float().clone(), rows, r) for r in range(len(logits))]
    return torch.tensor(tokens, dtype=torch.int64, device=logits.device), highest


def _sample(row: torch.Tensor, rows: SamplingRows, r: int) -> int:
    if not math.isfinite(float(row.max())):
        return NOT_FINITE
    _edit(row, rows, r)
    highest, token = row.max(-1)
    if float(highest) == -math.inf:
        return ALL_MASKED
    temperature = rows.temperature[r : r + 1]
    if float(temperature) == 0:
        return int(token)
    sampling.apply_temperature(row[None], highest[None], temperature)
    kept = sampling.kept_tokens(row, int(rows.top_k[r]), float(rows.top_p[r]), float(rows.min_p[r]))
    u = sampling.philox_uniform(int(rows.seed[r]), int(rows.position[r]))
    uniform = torch.tensor([u], dtype=torch.float64, device=row.device)
    return int(kept[sampling.choose(row[kept][None], uniform)])


def _see(rows: SamplingRows, r: int) -> None:
    """Adds what is new of a row."""
    place = int(rows.seen_row[r])
    if place < 0:
        return
    if int(rows.seen_new[r]):
        rows.seen[place] = 0
    start, stop = int(rows.seen_start[r]), int(rows.seen_start[r + 1])
    words = rows.seen.shape[1]
    bits = torch.zeros(words * 32, dtype=torch.int64, device=rows.seen.device)
    bits[rows.seen_token[start:stop].long()] = 1
    shifts = torch.arange(32, device=rows.seen.device)
    rows.seen[place] |= (bits.view(words, 32) << shifts).sum(1).to(torch.int32)


def _seen(rows: SamplingRows, r: int, vocabulary: int) -> torch.Tensor:
    """The ids of a row's tokens."""
    token = torch.arange(vocabulary, device=rows.seen.device)
    place = int(rows.seen_row[r])
    if place < 0:
        return token[:0]
    return token[(rows.seen[place][token // 32] >> (token % 32) & 1) != 0]


def _edit(row: torch.Tensor, rows: SamplingRows, r: int) -> None:
    """Masks, bias and penalties; in place."""
    mask_row = int(rows.mask_row[r])
    if mask_row >= 0:
        token = torch.arange(len(row), device=row.device)
        allowed = rows.mask[mask_row][token // 32] >> (token % 32) & 1
        sampling.keep_allowed(row[None], allowed[None].to(torch.uint8))
    start, stop = int(rows.edit_start[r]), int(rows.edit_start[r + 1])
    ids, flags = rows.edit_token[start:stop].long(), rows.edit_flags[start:stop]
    counts = rows.edit_count[start:stop]
    sampling.mask_tokens(row, ids[flags & MASKED != 0])
    sampling.add_bias(row, ids, rows.edit_bias[start:stop])
    seen = _seen(rows, r, len(row))
    sampling.apply_repetition_penalty(row, seen, float(rows.repetition[r]))
    sampling.apply_output_penalties(
        row,
        ids[counts > 0],
        counts[counts > 0],
        float(rows.frequency[r]),
        float(rows.presence[r]),
    )

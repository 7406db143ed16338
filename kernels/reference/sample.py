"""One token for each row of a step, put together of `sampling.py`: the specification."""

import math

import torch

from quantd.kernels.reference import sampling
from quantd.kernels.sampling import ALL_MASKED, MASKED, NOT_FINITE, SEEN, SamplingRows


def sample_rows(logits: torch.Tensor, rows: SamplingRows) -> tuple[torch.Tensor, torch.Tensor]:
    """logits [n, V] of any floating dtype, a view or not, not changed -> (tokens int64 [n],
    highest fp32 [n]): a token's id, NOT_FINITE or ALL_MASKED, and the highest logit of the row as
    it came, NaN where there is one."""
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
    sampling.apply_repetition_penalty(row, ids[flags & SEEN != 0], float(rows.repetition[r]))
    sampling.apply_output_penalties(
        row,
        ids[counts > 0],
        counts[counts > 0],
        float(rows.frequency[r]),
        float(rows.presence[r]),
    )

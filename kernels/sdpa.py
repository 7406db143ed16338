"""Encoder attention by torch's scaled_dot_product_attention, which keeps no matrix of scores."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F


def encoder_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: Sequence[int], scale: float
) -> torch.Tensor:
    """See `reference.encoder_attention`. One call for each sequence: nothing is padded, and a
    sequence gives the same bits whatever else is in the batch."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    for start, stop in zip(starts[:-1], starts[1:], strict=True):
        queries, keys, values = (t[start:stop].transpose(0, 1)[None] for t in (q, k, v))
        attended = F.scaled_dot_product_attention(queries, keys, values, scale=scale)
        out[start:stop] = attended[0].transpose(0, 1)
    return out

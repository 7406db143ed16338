"""A mixture of experts in plain torch: the specification."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def expert_feed_forward(
    x: Tensor, weights: Tensor, ids: Tensor, experts: Sequence[Callable[[Tensor], Tensor]]
) -> Tensor:
    """The sum over each row's experts of weight * expert(row), in order of the experts' ids: x
    [T, H], weights fp32 and ids int64 [T, top_k] as `route_experts` gives them -> [T, H].

    An expert takes all its rows [n, H] at once, in the order they have in x, and gives [n, H].
    Sums are of x's dtype; a kernel may sum in fp32 and round once. Reads back how many rows each
    expert has, so a GPU is waited for.
    """
    top_k = ids.shape[1]
    # Rows in order of expert; stable, so that within an expert they stay in order.
    chosen, order = ids.flatten().sort(stable=True)
    rows = order.div(top_k, rounding_mode="floor")
    weights = weights.to(x.dtype).flatten().index_select(0, order)[:, None]
    inputs = x.index_select(0, rows)
    counts = torch.bincount(chosen, minlength=len(experts)).tolist()
    out = torch.zeros_like(x)
    start = 0
    for expert, count in zip(experts, counts, strict=True):
        if count:
            stop = start + count
            part = expert(inputs[start:stop]).mul_(weights[start:stop])
            # A row meets its experts in order of their ids, whatever else is in the batch.
            out.index_add_(0, rows[start:stop], part)
            start = stop
    return out

"""Choice of experts in plain torch: the specification."""

import torch


def route_experts(
    logits: torch.Tensor, top_k: int, *, softmax_before: bool, renormalize: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The top_k experts of each row of logits [T, E], best first, the lower id first among equals.

    Returns (weights fp32 [T, top_k], ids int64 [T, top_k]). softmax_before: the weights are the
    softmax over all experts, and `renormalize` makes the chosen ones sum to 1; otherwise they are
    the softmax over the chosen logits (which sums to 1 already).
    """
    num_experts = logits.shape[-1]
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k is {top_k}, must be in [1, {num_experts}]")
    # A stable sort, because topk leaves the order of equal logits open.
    ranked, ids = torch.sort(logits.float(), dim=-1, descending=True, stable=True)
    ids = ids[:, :top_k]
    if not softmax_before:
        return torch.softmax(ranked[:, :top_k], dim=-1), ids
    weights = torch.softmax(logits.float(), dim=-1).gather(-1, ids)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights, ids.contiguous()

"""Log-probabilities of rows of logits, in plain torch: the specification, and what a GPU runs."""

import torch


def token_logprobs(
    logits: torch.Tensor, tokens: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """logits [m, V] of any floating dtype, a view or not, not changed; tokens int64 [m], of which
    those below 0 count as 0 -> (log-probabilities of the tokens fp32 [m], the ids of the min(k, V)
    highest logits int64 [m, min(k, V)], their log-probabilities fp32): the highest first, NaN
    above all, of equal ones the lower id first. Takes some 40 bytes for each logit. Nothing is read
    back from a GPU."""
    rows = logits.float()
    logprobs = rows.log_softmax(-1)
    chosen = logprobs.gather(1, tokens.clamp(min=0)[:, None])[:, 0]
    # topk leaves open which of equals it takes, and in what order: no two of these keys are.
    vocabulary = rows.shape[1]
    keys = _keys(rows).topk(min(k, vocabulary)).values
    ids = vocabulary - 1 - (keys & 0xFFFFFFFF)
    return chosen, ids, logprobs.gather(1, ids)


def _keys(rows: torch.Tensor) -> torch.Tensor:
    """int64 of rows fp32 [m, V]: the order of logits as one of whole numbers in the upper half, in
    the lower one the higher number for the lower id."""
    # One NaN, one zero. Not torch.where, which makes a tensor of a number first.
    plain = (rows + 0.0).masked_fill_(rows.isnan(), torch.nan)
    bits = plain.view(torch.int32)
    order = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    return (order << 32) | torch.arange(rows.shape[1] - 1, -1, -1, device=rows.device)

"""The rows of one step, as sampling on a device sees them."""

from dataclasses import dataclass

import torch

MASKED = 1
"""Flag of an edit: the token may not be chosen."""

NOT_FINITE = -1
ALL_MASKED = -2
"""In the place of a token: the row's highest logit is no finite number; no token may be chosen."""


@dataclass(frozen=True, slots=True)
class SamplingRows:
    """What is done to each of n rows of logits, in the order of `reference/sampling.py`. All
    tensors contiguous and on the device of the logits; `seen` alone is mutated by an operation."""

    seed: torch.Tensor
    """int64 [n]."""
    position: torch.Tensor
    """int64 [n]: of the token that is chosen."""
    temperature: torch.Tensor
    """fp32 [n]; 0: the highest logit, of equal ones that with the lowest id."""
    top_k: torch.Tensor
    """int32 [n]; 0: off."""
    top_p: torch.Tensor
    """fp64 [n], in (0, 1]; 1: off."""
    min_p: torch.Tensor
    """fp64 [n], in [0, 1]; 0: off."""
    repetition: torch.Tensor
    """fp32 [n]: the penalty of seen tokens; 1: off."""
    frequency: torch.Tensor
    """fp32 [n]: the penalty for each time that a token was put out; 0: off."""
    presence: torch.Tensor
    """fp32 [n]: the penalty of a token that was put out; 0: off."""
    mask: torch.Tensor
    """int32 [masks, ceil(V / 32)]: bit i % 32 of word i // 32 is set where token i may be chosen.
    There may be none."""
    mask_row: torch.Tensor
    """int32 [n]: the row of `mask` that holds for it; negative: all may be chosen."""
    edit_start: torch.Tensor
    """int32 [n + 1]: the edits of row r are [edit_start[r], edit_start[r + 1])."""
    edit_token: torch.Tensor
    """int32 [edits], below V, distinct within a row."""
    edit_bias: torch.Tensor
    """fp32 [edits]: is added."""
    edit_count: torch.Tensor
    """fp32 [edits]: how often the token was put out."""
    edit_flags: torch.Tensor
    """int32 [edits]: MASKED or 0."""
    seen: torch.Tensor
    """int32 [rows of its own, ceil(V / 32)], kept from step to step: bit i % 32 of word i // 32 is
    set where token i is in the prompt or the output. What is new is added before a row is sampled;
    to do it twice does no harm."""
    seen_row: torch.Tensor
    """int32 [n]: the row of `seen` that is its own; negative: it has none."""
    seen_new: torch.Tensor
    """int32 [n]: not 0 where its row of `seen` is somebody else's still, and is cleared first."""
    seen_start: torch.Tensor
    """int32 [n + 1]: what is new of row r is [seen_start[r], seen_start[r + 1])."""
    seen_token: torch.Tensor
    """int32 [new tokens], below V; may repeat."""

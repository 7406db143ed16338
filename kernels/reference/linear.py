"""A linear layer in plain torch: the specification."""

import torch
import torch.nn.functional as F


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [T, K] times weight [N, K] transposed, plus bias [N] -> [T, N], all of one dtype.
    Accumulated in fp32 (fp64 for fp64 input), rounded once."""
    wide = torch.promote_types(x.dtype, torch.float32)
    out = F.linear(x.to(wide), weight.to(wide), None if bias is None else bias.to(wide))
    return out.to(x.dtype)

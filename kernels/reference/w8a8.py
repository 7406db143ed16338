"""Products of eight bits by eight bits in plain torch: the specification."""

import torch

FLOAT8 = torch.float8_e4m3fn
MAX_FLOAT8 = 448.0
"""The largest number of e4m3."""


def quantize_rows_float8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, K] -> e4m3 [T, K] and fp32 scales [T, 1].

    scale = max |x| / 448, and x times 1 / scale is rounded to the nearest e4m3, ties to even. A row
    of zeros stays zeros; one that holds a NaN or an infinity has a scale that is not finite.
    """
    wide = x.float()
    scale = wide.abs().amax(dim=1, keepdim=True) / MAX_FLOAT8
    inverse = torch.where(scale > 0, 1 / scale, 0)
    codes = (wide * inverse).nan_to_num(0).clamp(-MAX_FLOAT8, MAX_FLOAT8)
    return codes.to(FLOAT8), scale


def linear_w8a8(
    codes: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """(codes [T, K] times weight [N, K] transposed) * scale [T, 1] * weight_scale [N], plus bias
    [N] -> fp64 [T, N]. Codes are int8 or e4m3; their products are summed exactly."""
    out = codes.double() @ weight.double().T * scale.double() * weight_scale.double()
    return out if bias is None else out + bias.double()

"""RMSNorm (Zhang and Sennrich, 2019) in plain torch: the specification."""

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x * rsqrt(mean(x^2) + eps) * weight over the last dimension.

    x [..., H] of any floating dtype, weight fp32 [H]. Computed in fp32 (fp64 for fp64 input) and
    rounded once, to x's dtype. Returns a new tensor.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * weight).to(x.dtype)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """Adds x into `residual` in place, and returns rms_norm of that sum.

    The norm reads the sum as stored, that is rounded to the residual's dtype, so that the result
    is what the two operations give one after the other.
    """
    residual.add_(x)
    return rms_norm(residual, weight, eps)

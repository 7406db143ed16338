"""Rotary position embedding (Su et al., 2021), the rotate-half form: the specification."""

import torch


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    half = cos.shape[-1]
    wide = torch.promote_types(x.dtype, torch.float32)
    first = x[..., :half].to(wide)
    second = x[..., half : 2 * half].to(wide)
    cos, sin = cos[:, None], sin[:, None]
    rotated = first * cos - second * sin, second * cos + first * sin
    # Only now: for fp32 the halves above are views of x.
    x[..., :half], x[..., half : 2 * half] = rotated


def rotary(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Rotates the pairs (i, i + R/2) of the first R dimensions of q and k, in place.

    q [T, Hq, D], k [T, Hkv, D], views of a fused buffer or not; cos, sin fp32 [T, R/2] with
    R <= D, the dimensions from R on stay as they are. Computed in fp32, rounded once.
    """
    _rotate(q, cos, sin)
    _rotate(k, cos, sin)

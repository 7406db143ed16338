"""What encoders need beside the decoder's operations, in plain torch: the specification."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from quantd.kernels.reference.activation import Activation


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, dtype: torch.dtype
) -> torch.Tensor:
    """LayerNorm (Ba et al., 2016) over the last dimension of x [T, H] -> a new tensor of `dtype`.

    weight and bias fp32 [H]. Computed in fp32 (fp64 for fp64 input) and rounded once.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    weight, bias = weight.to(wide.dtype), bias.to(wide.dtype)
    return F.layer_norm(wide, (x.shape[-1],), weight, bias, eps).to(dtype)


def activate(x: torch.Tensor, activation: Activation) -> torch.Tensor:
    """activation(x), not gated; computed in fp32 (fp64 for fp64 input) and rounded once."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if activation == "silu":
        return F.silu(wide).to(x.dtype)
    if activation not in ("gelu", "gelu_tanh"):
        raise ValueError(f"activation is {activation!r}, must be silu, gelu_tanh or gelu")
    return F.gelu(wide, approximate="tanh" if activation == "gelu_tanh" else "none").to(x.dtype)


def encoder_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: Sequence[int], scale: float
) -> torch.Tensor:
    """Attention in both directions of a ragged batch: q, k and v [T, heads, D], views or not, with
    a contiguous last dimension -> a new tensor [T, heads, D].

    Rows [starts[s], starts[s + 1]) are sequence s, and attend to all of these and to no others.
    Scores are q.k * scale, then softmax in fp32 (fp64 for fp64 input).
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    wide = torch.promote_types(q.dtype, torch.float32)
    for start, stop in zip(starts[:-1], starts[1:], strict=True):
        queries, keys, values = (t[start:stop].transpose(0, 1).to(wide) for t in (q, k, v))
        weights = torch.softmax(queries @ keys.transpose(1, 2) * scale, dim=-1)
        out[start:stop] = (weights @ values).transpose(0, 1).to(q.dtype)
    return out

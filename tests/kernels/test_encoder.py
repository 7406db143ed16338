"""What encoders need: against fp64, and the same bits alone as in any batch."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F

from quantd.kernels import ops, reference

Close = Callable[[torch.Tensor, torch.Tensor], None]
LENGTHS = (1, 7, 64, 33, 200, 2)


@pytest.mark.parametrize("head_dim", [8, 32, 64, 80])
def test_attention_sees_its_own_sequence_in_both_directions(
    dtype: torch.dtype, head_dim: int
) -> None:
    starts = [0, *accumulate(LENGTHS)]
    fused = torch.randn(starts[-1], 3, 4, head_dim).to(dtype)
    q, k, v = fused.unbind(1)
    got = ops.encoder_attention(q, k, v, starts, head_dim**-0.5)
    want = reference.encoder_attention(q.double(), k.double(), v.double(), starts, head_dim**-0.5)
    error = (got.double() - want).square().mean() / want.square().mean()
    # Weights are rounded to 16 bits too, before they meet the values.
    assert error <= {torch.float32: 1e-12, torch.bfloat16: 2.0**-15, torch.float16: 2.0**-21}[dtype]
    assert got.dtype == dtype and got.is_contiguous()
    for start, stop in zip(starts[:-1], starts[1:], strict=True):
        rows = (t[start:stop] for t in (q, k, v))
        alone = ops.encoder_attention(*rows, [0, stop - start], head_dim**-0.5)
        assert torch.equal(alone, got[start:stop])


def test_the_specification_of_attention() -> None:
    q, k, v = torch.randn(3, 9, 2, 16, dtype=torch.float64)
    got = reference.encoder_attention(q, k, v, [0, 4, 9], 0.3)
    for rows in (slice(0, 4), slice(4, 9)):
        parts = (t[rows].transpose(0, 1) for t in (q, k, v))
        want = F.scaled_dot_product_attention(*parts, scale=0.3).transpose(0, 1)
        torch.testing.assert_close(got[rows], want)


def test_layer_norm(dtype: torch.dtype, assert_close: Close) -> None:
    x, weight, bias = torch.randn(40, 96), torch.randn(96), torch.randn(96)
    got = ops.layer_norm(x, weight, bias, 1e-12, dtype)
    wide = x.double()
    centred = wide - wide.mean(-1, keepdim=True)
    want = centred / (centred.square().mean(-1, keepdim=True) + 1e-12).sqrt()
    assert got.dtype == dtype
    assert_close(got, want * weight + bias)
    assert torch.equal(ops.layer_norm(x[7:8], weight, bias, 1e-12, dtype), got[7:8])


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_activations(dtype: torch.dtype, activation: ops.Activation, assert_close: Close) -> None:
    x = (torch.randn(33, 77) * 3).to(dtype)
    got = ops.activate(x, activation)
    assert_close(got, reference.activate(x.double(), activation))
    assert all(torch.equal(ops.activate(x[i : i + 1], activation)[0], got[i]) for i in range(33))


def test_an_activation_that_is_not_known() -> None:
    with pytest.raises(ValueError, match="activation is 'relu', must be"):
        ops.activate(torch.zeros(1, 1), "relu")  # type: ignore[arg-type]

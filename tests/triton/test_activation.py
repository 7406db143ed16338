"""Activations and LayerNorm against the specification in fp64."""

from typing import get_args

import pytest
import torch

from quantd.kernels import reference
from quantd.kernels.reference import Activation
from quantd.kernels.triton import activation

# exp(-x) of what is far below zero is infinite, and x divided by it a right zero.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")

MAX_NMSE = {torch.float32: 1e-12, torch.float16: 2.0**-22}
SHAPES = [(1, 1), (3, 7), (2, 128), (5, 1030), (2, 1024)]


def assert_close(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.shape == want.shape
    error = (got.double() - want).square().mean() / want.square().mean()
    assert error.item() <= MAX_NMSE[got.dtype]


@pytest.mark.parametrize("kind", get_args(Activation))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_act_and_mul(dtype: torch.dtype, shape: tuple[int, int], kind: Activation) -> None:
    x = (torch.randn(shape[0], 2 * shape[1]) * 3).to(dtype)
    assert_close(activation.act_and_mul(x, kind), reference.act_and_mul(x.double(), kind))


@pytest.mark.parametrize("kind", get_args(Activation))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_activate(dtype: torch.dtype, shape: tuple[int, int], kind: Activation) -> None:
    x = (torch.randn(shape) * 3).to(dtype)
    assert_close(activation.activate(x, kind), reference.activate(x.double(), kind))


@pytest.mark.parametrize("kind", get_args(Activation))
def test_far_from_zero(kind: Activation) -> None:
    x = torch.tensor([[-3e4, -200.0, -90.0, 90.0, 200.0, 3e4]])
    torch.testing.assert_close(activation.activate(x, kind), reference.activate(x, kind))


@pytest.mark.parametrize("gated", [False, True])
def test_an_unknown_activation_is_refused(gated: bool) -> None:
    call = activation.act_and_mul if gated else activation.activate
    with pytest.raises(ValueError, match="activation is 'relu'"):
        call(torch.randn(1, 2), "relu")  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 128), (4, 1030)], ids=str)
def test_layer_norm(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x = (torch.randn(shape) + 2).to(dtype)
    weight, bias = torch.rand(shape[1]) + 0.5, torch.randn(shape[1])
    for out in (dtype, torch.float32):
        got = activation.layer_norm(x, weight, bias, 1e-5, out)
        want = reference.layer_norm(x.double(), weight, bias, 1e-5, torch.float64)
        assert got.dtype == out
        assert_close(got, want)


def test_no_rows(dtype: torch.dtype) -> None:
    assert activation.act_and_mul(torch.empty(0, 8).to(dtype), "silu").shape == (0, 4)
    one = torch.ones(8)
    assert activation.layer_norm(torch.empty(0, 8).to(dtype), one, one, 1, dtype).shape == (0, 8)


def test_views_whose_rows_are_apart(dtype: torch.dtype) -> None:
    x = torch.randn(3, 40).to(dtype)[:, 5:29]
    weight, bias = torch.rand(24), torch.randn(24)
    for call in (
        lambda x: activation.act_and_mul(x, "silu"),
        lambda x: activation.activate(x, "gelu"),
        lambda x: activation.layer_norm(x, weight, bias, 1e-5, dtype),
    ):
        assert torch.equal(call(x), call(x.clone()))

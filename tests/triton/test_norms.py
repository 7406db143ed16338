"""Norms against the specification in fp64."""

import pytest
import torch

from quantd.kernels import reference
from quantd.kernels.triton import norms


def assert_close(got: torch.Tensor, want: torch.Tensor) -> None:
    error = (got.double() - want).square().mean() / want.square().mean()
    assert error.item() <= {torch.float32: 1e-12, torch.float16: 2.0**-22}[got.dtype]


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 128), (5, 3, 64), (4, 1030)], ids=str)
def test_rms_norm(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, weight = torch.randn(shape).to(dtype), torch.rand(shape[-1]) + 0.5
    assert_close(norms.rms_norm(x, weight, 1e-5), reference.rms_norm(x.double(), weight, 1e-5))


def test_rms_norm_of_a_view(dtype: torch.dtype) -> None:
    fused, weight = torch.randn(4, 10, 32).to(dtype), torch.rand(32)
    view = fused[:, 2:7]
    assert_close(
        norms.rms_norm(view, weight, 1e-6), reference.rms_norm(view.double(), weight, 1e-6)
    )


def test_add_rms_norm(dtype: torch.dtype) -> None:
    x, residual, weight = torch.randn(5, 96).to(dtype), torch.randn(5, 96).to(dtype), torch.rand(96)
    stored = residual.clone()
    want = reference.add_rms_norm(x, stored, weight, 1e-5)
    got = norms.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(residual, stored)
    torch.testing.assert_close(got, want, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 8), (0, 3, 8), (2, 0, 8)], ids=str)
def test_no_rows(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, residual = torch.empty(shape).to(dtype), torch.empty(shape).to(dtype)
    assert norms.rms_norm(x, torch.ones(8), 1e-5).shape == shape
    assert norms.add_rms_norm(x, residual, torch.ones(8), 1e-5).shape == shape


def test_views_whose_rows_are_apart(dtype: torch.dtype) -> None:
    x, residual = torch.randn(3, 40).to(dtype)[:, 5:29], torch.randn(3, 24).to(dtype)
    weight = torch.rand(24)
    want = norms.add_rms_norm(x.contiguous(), residual.clone(), weight, 1e-5)
    assert torch.equal(norms.add_rms_norm(x, residual, weight, 1e-5), want)
    assert torch.equal(norms.rms_norm(x, weight, 1e-5), norms.rms_norm(x.clone(), weight, 1e-5))

"""Eight bits by eight bits: rounding bit for bit as specified, products against fp64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantd.kernels import reference
from quantd.kernels.reference.w8a8 import linear_w8a8, quantize_rows_float8
from quantd.kernels.triton import w8a8

# The interpreter is numpy, which warns of what is meant here: one over zero, infinity times zero.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


def bits(scale: torch.Tensor) -> torch.Tensor:
    """Equal where the numbers are, and every NaN as one."""
    return torch.where(scale.isnan(), -1, scale.view(torch.int32))


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 300),
    size=st.floats(1e-38, 1e30),
    seed=st.integers(0, 9),
)
def test_rounds_rows_as_the_specification_bit_for_bit(
    rows: int, columns: int, size: float, seed: int
) -> None:
    torch.manual_seed(seed)
    x = torch.randn(rows, columns) * size
    codes, scale = w8a8.quantize_rows(x)
    want, want_scale = reference.quantize_rows(x, None)
    assert torch.equal(codes[:, :columns], want) and not codes[:, columns:].any()
    assert torch.equal(scale, want_scale[:, 0])


def test_rounds_halves_to_even() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5]])
    codes, _ = w8a8.quantize_rows(x)
    assert codes[0, :7].tolist() == [127, 0, 2, 2, 0, -2, -126]


def test_what_is_zero_or_not_finite_keeps_its_meaning(dtype: torch.dtype) -> None:
    x = torch.randn(4, 33).to(dtype)
    x[0], x[1, 5], x[2, 32] = 0, torch.nan, -torch.inf
    codes, scale = w8a8.quantize_rows(x)
    want, want_scale = reference.quantize_rows(x, None)
    assert torch.equal(codes[:, :33], want)
    assert torch.equal(bits(scale), bits(want_scale[:, 0]))
    assert scale[0] == 0 and scale[1].isnan() and scale[2].isinf() and scale[3].isfinite()


def test_rows_of_float8() -> None:
    """Of numbers that e4m3 has: the interpreter cuts others off where a GPU rounds them, for which
    see the instructions that the variants must have."""
    every = torch.arange(256, dtype=torch.int16).to(torch.uint8).view(torch.float8_e4m3fn).float()
    every = every[every.isfinite()]
    x = torch.stack((every, every * 2.0**-9, every * 3.0, torch.zeros_like(every)))
    codes, scale = w8a8.quantize_rows(x, torch.float8_e4m3fn)
    want, want_scale = quantize_rows_float8(x)
    columns = x.shape[1]
    assert torch.equal(codes[:2, :columns].float(), every.expand(2, -1))
    assert torch.equal(codes[3, :columns].float(), want[3].float())
    assert torch.equal(scale, want_scale[:, 0]) and scale[0] == 1


@pytest.mark.parametrize("rows", [1, 2, 7, 16, 17, 130])
@pytest.mark.parametrize("shape", [(5, 16), (70, 130), (33, 300)], ids=str)
def test_int8_sums_are_exact(dtype: torch.dtype, rows: int, shape: tuple[int, int]) -> None:
    n, k = shape
    weight = torch.randint(-127, 128, shape, dtype=torch.int8)
    part = w8a8.pack_bytes(weight, torch.rand(n) + 0.5)
    bias = torch.randn(n).to(dtype)
    x = torch.randn(rows, k).to(dtype)
    codes, scale = w8a8.quantize_rows(x)
    out = torch.full((rows, n), torch.nan, dtype=dtype)
    w8a8.byte_matmul(codes, scale, part, bias, out)
    want = linear_w8a8(codes[:, :k], scale[:, None], weight, part.scale, bias)
    error = (out.double() - want).square().mean() / want.square().mean()
    assert error.item() <= {torch.float32: 1e-13, torch.float16: 2.0**-22}[dtype]
    alone = torch.empty(1, n, dtype=dtype)
    w8a8.byte_matmul(codes[-1:], scale[-1:], part, bias, alone)
    assert torch.equal(alone[0], out[-1])


def test_the_largest_sums_do_not_overflow() -> None:
    weight = torch.full((16, 4096), -128, dtype=torch.int8)
    part = w8a8.pack_bytes(weight, torch.ones(16))
    codes = torch.full((1, 4096), 127, dtype=torch.int8)
    out = torch.empty(1, 16)
    w8a8.byte_matmul(codes, torch.ones(1), part, None, out)
    assert out.tolist() == [[-128.0 * 127 * 4096] * 16]


def test_float8_products() -> None:
    weight, weight_scale = quantize_rows_float8(torch.randn(20, 150))
    part = w8a8.pack_bytes(weight, weight_scale[:, 0])
    codes, scale = w8a8.quantize_rows(torch.randn(3, 150), torch.float8_e4m3fn)
    out = torch.empty(3, 20)
    w8a8.byte_matmul(codes, scale, part, None, out)
    want = linear_w8a8(codes[:, :150], scale[:, None], weight, part.scale, None)
    assert ((out - want).square().mean() / want.square().mean()).item() <= 1e-12


def test_what_lies_in_padding_reaches_nothing() -> None:
    weight = torch.randint(-127, 128, (21, 64), dtype=torch.int8)
    wide = torch.full((40,), torch.nan)
    wide[:21] = 1
    part = w8a8.BytePart(weight, wide[:21], 21, 64)
    codes, scale = w8a8.quantize_rows(torch.randn(3, 64))
    out = torch.full((3, 32), 7.0)
    w8a8.byte_matmul(codes, scale, part, None, out[:, :21])
    assert out.isfinite().all() and (out[:, 21:] == 7).all()

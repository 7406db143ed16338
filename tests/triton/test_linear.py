"""Grouped weights through the door, as on a GPU: packed, joined, unpacked and multiplied."""

from __future__ import annotations

import pytest
import torch

from quantd.kernels import grouped_linear, ops
from quantd.kernels.reference import dequantize_grouped, quantize_rows
from quantd.kernels.triton import linear
from quantd.kernels.triton.grouped_layout import PackedPart
from quantd.kernels.triton.w8a8 import BytePart

DEVICE = torch.device("cpu")

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


@pytest.fixture(autouse=True)
def the_cpu_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped_linear, "_gpu", lambda device: linear)


def make(rows: int, columns: int, bits: int, group: int, offset: bool = False) -> ops.GroupedCodes:
    codes = torch.randint(0, 1 << bits, (rows, columns), dtype=torch.uint8)
    groups = -(-columns // group)
    scale = (torch.rand(rows, groups) + 0.1) / (1 << bits)
    if offset:
        return ops.GroupedCodes(codes, bits, group, scale, -torch.rand(rows, groups))
    return ops.GroupedCodes(codes, bits, group, scale, center=1 << (bits - 1))


def assert_close(got: torch.Tensor, want: torch.Tensor, most: float) -> None:
    assert got.shape == want.shape
    assert ((got.double() - want).square().mean() / want.square().mean()).item() <= most


def test_parts_of_several_formats_and_orders(dtype: torch.dtype) -> None:
    order = torch.cat((torch.randperm(60), torch.full((4,), -1)))
    order[5] = order[4]  # a column of the activations that meets two of the codes
    first, second = make(18, 60, 4, 32, offset=True), make(7, 64, 3, 16)
    weights = [
        ops.pack_grouped([first], (18, 60), device=DEVICE),
        ops.pack_grouped([second], (7, 60), order=order, device=DEVICE),
        ops.pack_grouped([make(5, 60, 8, 64)], (5, 60), device=DEVICE),
    ]
    joined = ops.join_grouped(weights)
    assert joined.route == "triton" and joined.shape == (30, 60)
    assert joined.nbytes == sum(w.nbytes for w in weights)
    weight = ops.unpack_grouped(joined)
    assert torch.equal(weight[:18], dequantize_grouped(first))
    plain = torch.zeros(7, 60)
    for k, column in enumerate(order.tolist()):
        if column >= 0:
            plain[:, column] += dequantize_grouped(second)[:, k]
    assert torch.equal(weight[18:25], plain)
    x, bias = torch.randn(4, 60).to(dtype), torch.randn(30).to(dtype)
    want = x.double() @ weight.double().T + bias.double()
    most = {torch.float32: 1e-12, torch.float16: 2.0**-21}[dtype]
    assert_close(ops.grouped_linear(x, joined, bias), want, most)
    transposed = torch.empty(60, 4, dtype=dtype).copy_(x.T).T
    assert_close(ops.grouped_linear(transposed, joined, bias), want, most)
    assert ops.grouped_linear(x[:0], joined, bias).shape == (0, 30)


@pytest.mark.parametrize(("bits", "group"), [(8, 80), (8, 16), (4, 32)])
def test_activations_of_eight_bits_per_row(dtype: torch.dtype, bits: int, group: int) -> None:
    g = make(20, 70, bits, group)
    w = ops.pack_grouped([g], (20, 70), per_row=True, device=DEVICE)
    part_type = BytePart if group == 80 else PackedPart
    assert isinstance(w.gpu_parts[0], part_type)
    assert torch.equal(ops.unpack_grouped(w), dequantize_grouped(g))
    x = torch.randn(5, 70).to(dtype)
    codes, scale = quantize_rows(x, None)
    want = codes.double() * scale.double() @ dequantize_grouped(g).double().T
    most = {torch.float32: 1e-12, torch.float16: 2.0**-21}[dtype]
    assert_close(ops.grouped_linear(x, w, None), want, most)
    assert ops.grouped_linear(x[:0], w, None).shape == (0, 20)
    both = ops.join_grouped([w, w])
    assert len(both.gpu_parts) == 1
    got = ops.grouped_linear(x, both, None)
    assert torch.equal(got, ops.grouped_linear(x, w, None).repeat(1, 2))


def test_chunks_are_not_kept() -> None:
    for bits, per_row in ((4, False), (8, True)):
        g = make(16, 64, bits, 64)
        w = ops.pack_grouped([g], (16, 64), per_row=per_row, device=DEVICE)
        want = dequantize_grouped(g)
        g.codes.zero_()
        g.scale.zero_()
        assert torch.equal(ops.unpack_grouped(w), want)


def test_what_disagrees_is_refused() -> None:
    for per_row in (False, True):
        g = make(16, 64, 8, 64)
        for shape, match in (((15, 64), "chunk"), ((17, 64), "rows"), ((16, 65), "chunk")):
            with pytest.raises(ValueError, match=match):
                ops.pack_grouped([g], shape, per_row=per_row, device=DEVICE)
        with pytest.raises(ValueError, match="rows"):
            ops.pack_grouped([], (16, 64), per_row=per_row, device=DEVICE)
        with pytest.raises(ValueError, match="agree"):
            ops.pack_grouped([g, make(1, 64, 4, 64)], (17, 64), per_row=per_row, device=DEVICE)
    with pytest.raises(ValueError, match="order"):
        ops.pack_grouped([g], (16, 64), order=torch.full((64,), 64), device=DEVICE)
    w = ops.pack_grouped([g], (16, 64), device=DEVICE)
    other = ops.pack_grouped([make(16, 32, 8, 64)], (16, 32), device=DEVICE)
    with pytest.raises(ValueError, match="joined"):
        ops.join_grouped([w, other])
    with pytest.raises(ValueError, match="64 columns"):
        ops.grouped_linear(torch.randn(2, 63), w, None)

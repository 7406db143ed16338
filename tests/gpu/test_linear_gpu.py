"""Products with weights on a GPU, of every format, at the shapes of real layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu_harness import DEVICE, DTYPES, E4M3, MARKS, ON_CPU, assert_close, randn, sized

from quantd.kernels import ops
from quantd.kernels.grouped import GroupedCodes
from quantd.kernels.reference import quantize_rows
from quantd.kernels.reference.w8a8 import linear_w8a8, quantize_rows_float8

pytestmark = MARKS

_E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
FORMATS: dict[str, dict[str, Any]] = {
    "2 bits, offsets": {"bits": 2, "group": 16, "offset": True},
    "3 bits": {"bits": 3, "group": 16},
    "4 bits, a row": {"bits": 4, "group": 0},
    "4 bits, 128": {"bits": 4, "group": 128},
    "4 bits, 32, offsets": {"bits": 4, "group": 32, "offset": True},
    "5 bits, offsets": {"bits": 5, "group": 32, "offset": True},
    "6 bits": {"bits": 6, "group": 16},
    "8 bits": {"bits": 8, "group": 32},
    "MXFP4": {"bits": 4, "group": 32, "table": _E2M1},
    "IQ4": {"bits": 4, "group": 32, "table": _IQ4},
}
SHAPES = sized([(6144, 4096), (4096, 14336), (333, 1104)], [(64, 256), (33, 112)])
ROWS = sized((1, 2, 7, 16, 33, 64, 65, 512, 2049), (1, 2, 17, 40))
SOME_ROWS = sized((1, 16, 64, 300), (1, 17))


def make(shape: tuple[int, int], how: dict[str, Any]) -> GroupedCodes:
    rows, columns = shape
    bits, group = how["bits"], how["group"] or -(-columns // 16) * 16
    codes = torch.randint(0, 1 << bits, shape, dtype=torch.uint8, device=DEVICE)
    scale = (torch.rand(rows, -(-columns // group), device=DEVICE) + 0.1) / (1 << bits)
    scale = scale.half().float()
    offset = -scale * (1 << (bits - 1)) if how.get("offset") else None
    table = torch.tensor(how["table"], dtype=torch.int8, device=DEVICE) if "table" in how else None
    center = 0 if offset is not None or table is not None else 1 << (bits - 1)
    return GroupedCodes(codes, bits, group, scale, offset, center, table)


def tolerance() -> float:
    """A CPU rounds activations to eight bits on its way."""
    return 4000.0 if ON_CPU else 2.0


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_grouped(name: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Unpacked exactly, multiplied closely, and a row alone gives the bits it has in a batch."""
    codes = make(shape, FORMATS[name])
    packed = ops.pack_grouped([codes], shape, device=DEVICE)
    plain = ops.dequantize_grouped(codes)
    if not ON_CPU:
        assert torch.equal(ops.unpack_grouped(packed), plain)
    bias = randn(shape[0], dtype=dtype)
    x = randn(max(ROWS), shape[1], dtype=dtype)
    want = x.double() @ plain.double().T + bias.double()
    whole = ops.grouped_linear(x, packed, bias)
    assert_close(whole, want, tolerance())
    for rows in SOME_ROWS:
        got = ops.grouped_linear(x[:rows], packed, bias)
        assert torch.equal(got, whole[:rows]), f"{rows} rows are not as among {len(x)}"
    last = ops.grouped_linear(x[-1:], packed, bias)
    assert torch.equal(last[0], whole[-1])


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", ["3 bits", "4 bits, 128", "MXFP4"])
def test_numbers_of_rows(name: str, rows: int, dtype: torch.dtype) -> None:
    shape = SHAPES[0]
    codes = make(shape, FORMATS[name])
    packed = ops.pack_grouped([codes], shape, device=DEVICE)
    x = randn(rows, shape[1], dtype=dtype)
    got = ops.grouped_linear(x, packed, None)
    assert_close(got, x.double() @ ops.dequantize_grouped(codes).double().T, tolerance())


def test_an_order_of_columns(dtype: torch.dtype) -> None:
    """As GPTQ with act-order has it."""
    shape = SHAPES[0]
    codes = make(shape, FORMATS["4 bits, 128"])
    order = torch.randperm(shape[1])
    packed = ops.pack_grouped([codes], shape, order=order, device=DEVICE)
    x = randn(9, shape[1], dtype=dtype)
    plain = ops.dequantize_grouped(codes).double()
    want = x.double()[:, order.to(DEVICE)] @ plain.T
    assert_close(ops.grouped_linear(x, packed, None), want, tolerance())


def test_joined_layers(dtype: torch.dtype) -> None:
    """Queries, keys and values, of two formats."""
    columns = SHAPES[0][1]
    made = [((256, columns), "4 bits, 32, offsets"), ((64, columns), "4 bits, 32, offsets")]
    made.append(((64, columns), "6 bits"))
    parts = [make(shape, FORMATS[name]) for shape, name in made]
    packed = [
        ops.pack_grouped([codes], shape, device=DEVICE)
        for codes, (shape, _) in zip(parts, made, strict=True)
    ]
    x = randn(33, columns, dtype=dtype)
    got = ops.grouped_linear(x, ops.join_grouped(packed), None)
    alone = [ops.grouped_linear(x, one, None) for one in packed]
    assert torch.equal(got, torch.cat(alone, 1))


@pytest.mark.parametrize("rows", ROWS)
def test_w8a8(rows: int, dtype: torch.dtype) -> None:
    """Activations bit for bit as specified, sums exact."""
    shape = SHAPES[0]
    codes = make(shape, {"bits": 8, "group": 0})
    packed = ops.pack_grouped([codes], shape, per_row=True, device=DEVICE)
    x = randn(rows, shape[1], dtype=dtype)
    read, steps = quantize_rows(x, None)
    weight = (codes.codes.short() - 128).to(torch.int8)
    want = linear_w8a8(read, steps, weight, codes.scale[:, 0], None)
    got = ops.grouped_linear(x, packed, None)
    assert_close(got, want)
    assert torch.equal(ops.grouped_linear(x[-1:], packed, None)[0], got[-1])


@pytest.mark.skipif(ON_CPU, reason="only Triton has it")
@pytest.mark.parametrize("rows", ROWS)
def test_e4m3_by_e4m3(rows: int, dtype: torch.dtype) -> None:
    if torch.cuda.get_device_capability(DEVICE) < (8, 9):
        pytest.skip("the device has no products of e4m3")
    from quantd.kernels.triton import w8a8

    n, k = SHAPES[0]
    weight, scale = quantize_rows_float8(randn(n, k))
    part = w8a8.pack_bytes(weight, scale[:, 0])
    x = randn(rows, k, dtype=dtype)
    codes, steps = w8a8.quantize_rows(x, E4M3)
    want_codes, want_steps = quantize_rows_float8(x)
    assert torch.equal(codes[:, :k].view(torch.uint8), want_codes.view(torch.uint8))
    assert torch.equal(steps, want_steps[:, 0])
    out = torch.empty(rows, n, dtype=dtype, device=DEVICE)
    w8a8.byte_matmul(codes, steps, part, None, out)
    assert_close(out, linear_w8a8(codes[:, :k], steps[:, None], weight, scale[:, 0], None), more=2)


@pytest.mark.parametrize("rows", SOME_ROWS)
@pytest.mark.parametrize("dense", [*DTYPES, torch.float32], ids=str)
def test_dense(rows: int, dense: torch.dtype) -> None:
    """By the vendor's library, whose rows may depend on their number (kernels/README.md)."""
    shape = SHAPES[0]
    weight, bias = randn(*shape, dtype=dense), randn(shape[0], dtype=dense)
    x = randn(rows, shape[1], dtype=dense)
    got = ops.linear(x, ops.pack_linear(weight), bias)
    assert_close(got, x.double() @ weight.double().T + bias.double(), more=4)


def test_a_weight_of_more_than_two_to_the_31_codes() -> None:
    """An output layer of 256k words by 8,192 columns; its last rows."""
    rows, columns = sized((1 << 18) + 64, 96), sized(8192, 128)
    codes = make((64, columns), FORMATS["4 bits, 128"])
    step = 4096
    chunk = GroupedCodes(
        codes.codes.repeat(step // 64, 1), 4, 128, codes.scale.repeat(step // 64, 1), center=8
    )

    def chunks() -> Any:
        done = 0
        while done < rows:
            count = min(step, rows - done)
            yield GroupedCodes(chunk.codes[:count], 4, 128, chunk.scale[:count], center=8)
            done += count

    packed = ops.pack_grouped(chunks(), (rows, columns), device=DEVICE)
    x = randn(3, columns, dtype=torch.bfloat16)
    got = ops.grouped_linear(x, packed, None)
    small = ops.pack_grouped([codes], (64, columns), device=DEVICE)
    want = ops.grouped_linear(x, small, None)
    assert torch.equal(got[:, :32], want[:, :32]) and torch.equal(got[:, 64:96], want[:, :32])
    start = rows // 64 * 64 - 64
    assert torch.equal(got[:, start : start + 64], want) or ON_CPU


def test_a_row_that_is_not_finite_spoils_no_other(dtype: torch.dtype) -> None:
    shape = SHAPES[0]
    packed = ops.pack_grouped([make(shape, FORMATS["4 bits, 128"])], shape, device=DEVICE)
    x = randn(6, shape[1], dtype=dtype)
    clean = ops.grouped_linear(x, packed, None)
    x[2, 40] = float("nan")
    got = ops.grouped_linear(x, packed, None)
    keep = [0, 1, 3, 4, 5]
    assert not bool(got[2].isfinite().any()) and torch.equal(got[keep], clean[keep])

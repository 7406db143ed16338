"""Grouped weights on a GPU: the layout bit for bit, products against the specification in fp64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantd.kernels.grouped import BITS, GroupedCodes
from quantd.kernels.reference import dequantize_grouped
from quantd.kernels.triton import grouped, tuned
from quantd.kernels.triton.grouped_layout import (
    PackedPart,
    gather,
    join_parts,
    pack_part,
    unpack_part,
)

CPU = torch.device("cpu")

MAX_NMSE = {
    torch.float32: dict.fromkeys(BITS, 1e-12),
    # Rounding each weight once and the result once to eleven bits: two units of 2^-24 at most. A
    # large offset beside small products is what is left of a sum that all but cancels.
    torch.float16: dict.fromkeys(BITS, 2.0**-21),
}
"""Mean squared error over mean square, against the unrounded weight in fp64, by dtype and bits."""


def make(rows: int, columns: int, bits: int, kind: str, group: int) -> GroupedCodes:
    groups = -(-columns // group)
    codes = torch.randint(0, 1 << bits, (rows, columns), dtype=torch.uint8)
    scale = (torch.rand(rows, groups) + 0.1) / (1 << bits)
    offset = -torch.rand(rows, groups) if kind == "offset" else None
    table = None
    if kind == "table":
        table = torch.randint(-128, 128, (1 << bits,)).to(torch.int8)
        table[0], table[-1] = -128, 127
    center = 1 << (bits - 1) if kind == "center" else 0
    return GroupedCodes(codes, bits, group, scale, offset, center, table)


def pack(g: GroupedCodes, order: torch.Tensor | None = None) -> PackedPart:
    return pack_part([g], *g.codes.shape, order=order, per_row=False, device=CPU)


def multiply(x: torch.Tensor, part: PackedPart, bias: torch.Tensor | None = None) -> torch.Tensor:
    out = torch.full((len(x), part.rows), torch.nan, dtype=x.dtype)
    grouped.grouped_matmul(x, part, bias, out)
    return out


def assert_close(got: torch.Tensor, want: torch.Tensor, bits: int) -> None:
    assert got.shape == want.shape
    error = (got.double() - want).square().mean() / want.square().mean()
    assert error.item() <= MAX_NMSE[got.dtype][bits]


def rows_of(g: GroupedCodes, start: int, stop: int) -> GroupedCodes:
    offset = None if g.offset is None else g.offset[start:stop]
    return dataclasses.replace(
        g, codes=g.codes[start:stop], scale=g.scale[start:stop], offset=offset
    )


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_what_is_packed_is_unpacked_bit_for_bit(data: st.DataObject) -> None:
    rows, columns = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 300))
    bits, group = data.draw(st.sampled_from(BITS)), 16 * data.draw(st.integers(1, 20))
    kinds = ("center", "offset", "table") if bits <= 4 else ("center", "offset")
    g = make(rows, columns, bits, data.draw(st.sampled_from(kinds)), group)
    if data.draw(st.booleans()):
        offset = None if g.offset is None else g.offset.half().float()
        g = dataclasses.replace(g, scale=g.scale.half().float(), offset=offset)
    step = data.draw(st.integers(1, 40))
    chunks = [rows_of(g, start, start + step) for start in range(0, rows, step)]
    part = pack_part(chunks, rows, columns, order=None, per_row=False, device=CPU)
    assert torch.equal(unpack_part(part), dequantize_grouped(g))


def test_a_scale_is_held_in_sixteen_bits_only_where_that_is_exact() -> None:
    g = make(20, 64, 4, "center", 32)
    assert pack(g).scale.dtype == torch.float32
    g = dataclasses.replace(g, scale=g.scale.half().float())
    assert pack(g).scale.dtype == torch.float16


@pytest.mark.parametrize("bits", BITS)
def test_memory_is_what_the_bits_need(bits: int) -> None:
    g = make(256, 1024, bits, "center", 32)
    g = dataclasses.replace(g, scale=g.scale.half().float())
    assert pack(g).nbytes == 256 * 1024 * bits // 8 + 256 * 32 * 2


FORMATS = [
    (2, "offset", 16), (2, "table", 32), (3, "center", 128), (3, "table", 16), (4, "center", 48),
    (4, "offset", 32), (4, "table", 32), (4, "center", 1024), (5, "offset", 32), (6, "center", 16),
    (8, "center", 256), (8, "offset", 64),
]  # fmt: skip


@pytest.mark.parametrize(("bits", "kind", "group"), FORMATS)
def test_products_match_the_specification(
    dtype: torch.dtype, bits: int, kind: str, group: int
) -> None:
    g = make(37, 200, bits, kind, group)
    x, bias = torch.randn(3, 200).to(dtype), torch.randn(37).to(dtype)
    want = x.double() @ dequantize_grouped(g).double().T
    assert_close(multiply(x, pack(g)), want, bits)
    assert_close(multiply(x, pack(g), bias), want + bias.double(), bits)


@pytest.mark.parametrize("shape", [(1, 1), (16, 16), (1, 129), (65, 128), (129, 17)], ids=str)
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_shapes(bits: int, shape: tuple[int, int]) -> None:
    g = make(*shape, bits, "offset", 16)
    x = torch.randn(2, shape[1])
    assert_close(multiply(x, pack(g)), x.double() @ dequantize_grouped(g).double().T, bits)


@pytest.mark.parametrize("rows", [1, 2, 7, 16, 17, 130])
def test_every_number_of_rows_gives_the_same_bits(rows: int) -> None:
    part = pack(make(70, 130, 4, "offset", 32))
    x = torch.randn(rows, 130).half()
    whole = multiply(x, part)
    assert_close(whole, x.double() @ unpack_part(part).double().T, 4)
    for row in {0, rows // 2, rows - 1}:
        assert torch.equal(multiply(x[row : row + 1], part)[0], whole[row])


@pytest.mark.parametrize("bits", [3, 4])
def test_spans_are_added_in_one_order_however_many_programs_do(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, bits: int
) -> None:
    """float16 would round away what most orders differ by."""
    columns = 2 * grouped.SPAN + 80
    part = pack(make(20, columns, bits, "center", 128))
    x, bias = torch.randn(2, columns).to(dtype), torch.randn(20).to(dtype)
    split = multiply(x, part, bias)
    assert_close(split, x.double() @ unpack_part(part).double().T + bias.double(), bits)
    monkeypatch.setattr(tuned, "ENOUGH_PROGRAMS", 1)
    assert torch.equal(multiply(x, part, bias), split)


@pytest.mark.parametrize("bits", BITS)
def test_what_lies_in_padding_reaches_nothing(bits: int) -> None:
    g = make(21, 150, bits, "offset", 48)
    part = pack(g)
    clean = multiply(torch.ones(2, 150).half(), part)
    for plane in (part.low, part.high):
        if plane is not None:
            plane[:, :, 21:] = -1 if plane.dtype != torch.uint8 else 255
    assert part.offset is not None
    part.scale[:, 21:] = torch.nan
    part.offset[:, 21:] = torch.nan
    wide = torch.full((4, 180), torch.nan).half()
    wide[:2, :150] = 1
    assert torch.equal(multiply(wide[:2, :150], part), clean)


def test_a_row_that_is_not_finite_spoils_no_other() -> None:
    part = pack(make(20, 64, 4, "center", 32))
    x = torch.randn(6, 64).half()
    clean = multiply(x, part)
    x[2, 40] = torch.nan
    got = multiply(x, part)
    keep = [0, 1, 3, 4, 5]
    assert not got[2].isfinite().any() and torch.equal(got[keep], clean[keep])


def test_parts_of_one_format_are_joined_and_others_are_not() -> None:
    g, h = make(17, 96, 4, "center", 32), make(30, 96, 4, "center", 32)
    g = dataclasses.replace(g, scale=g.scale.half().float())
    other = make(5, 96, 6, "center", 16)
    parts = join_parts([pack(g), pack(h), pack(other), pack(g)])
    assert [part.rows for part in parts] == [47, 5, 17]
    want = torch.cat([dequantize_grouped(one) for one in (g, h)])
    assert torch.equal(unpack_part(parts[0]), want)
    order = torch.randperm(96)
    ordered = join_parts([pack(g, order), pack(h, order.clone()), pack(h)])
    assert [part.rows for part in ordered] == [47, 30]


def test_an_order_leaves_out_what_has_none() -> None:
    order = torch.cat((torch.randperm(80), torch.full((16,), -1)))
    x = torch.randn(3, 80)
    assert torch.equal(gather(x, order), torch.cat((x[:, order[:80]], torch.zeros(3, 16)), dim=1))


def test_what_disagrees_is_refused() -> None:
    first = make(16, 64, 4, "center", 32)
    for other in (make(16, 64, 3, "center", 32), make(16, 64, 4, "offset", 32)):
        with pytest.raises(ValueError, match="agree"):
            pack_part([first, other], 32, 64, order=None, per_row=False, device=CPU)
    with pytest.raises(ValueError, match="rows"):
        pack_part([first], 17, 64, order=None, per_row=False, device=CPU)
    with pytest.raises(ValueError, match="chunk"):
        pack_part([first], 16, 65, order=None, per_row=False, device=CPU)
    with pytest.raises(ValueError, match="below 2"):
        pack(dataclasses.replace(first, codes=first.codes + 1))

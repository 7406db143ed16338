"""Grouped weights: each level and route against the specification in fp64, exact unpacking,
independence of rows, and what is refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from simde import BY_SIMDE, by_simde

from quantd.kernels import ops
from quantd.kernels.cpu import grouped
from quantd.kernels.cpu.library import Library, levels, open_library
from quantd.kernels.cpu.native_grouped import NativeCall, NativeGrouped, NativePart
from quantd.kernels.grouped import BITS, GroupedCodes
from quantd.kernels.reference.grouped import dequantize_grouped, quantize_rows

_LIBRARY = open_library()
_LEVELS = levels(_LIBRARY) if isinstance(_LIBRARY, Library) else ("not built",)

CASES = [
    (bits, kind, group)
    for bits in BITS
    for kind in ("center", "offset", "table")
    for group in (16, 32, 48, 64, 128, 1008)
    if kind != "table" or bits <= 4
]


@pytest.fixture(params=[*_LEVELS, *by_simde("avx512vnni")], scope="module")
def lib(request: pytest.FixtureRequest) -> NativeGrouped:
    if not isinstance(_LIBRARY, Library):
        pytest.skip(f"no native library: {_LIBRARY}")
    if request.param == BY_SIMDE:
        return NativeGrouped(request.getfixturevalue("emulated"), "avx512vnni")
    return NativeGrouped(_LIBRARY, request.param)


def make(rows: int, columns: int, bits: int, kind: str, group: int) -> GroupedCodes:
    groups = -(-columns // group)
    codes = torch.randint(0, 1 << bits, (rows, columns), dtype=torch.uint8)
    # Also the extremes beside each other, where sums in sixteen bits would overflow.
    codes[:, : columns // 2] = (1 << bits) - 1
    scale = (torch.rand(rows, groups) + 0.1) * torch.logspace(-9, 6, rows)[:, None]
    offset = torch.randn(rows, groups) * scale * (1 << bits) if kind == "offset" else None
    table = None
    if kind == "table":
        table = torch.randint(-128, 128, (1 << bits,)).to(torch.int8)
        table[0], table[-1] = -128, 127
    center = 1 << (bits - 1) if kind == "center" else 0
    return GroupedCodes(codes, bits, group, scale, offset, center, table)


def pack(lib: NativeGrouped, g: GroupedCodes, **options: object) -> NativePart:
    given = {"order": None, "exact": False, "per_row": False} | options
    return lib.pack([g], *g.codes.shape, **given)  # type: ignore[arg-type]


def activations(rows: int, columns: int) -> torch.Tensor:
    x = torch.randn(rows, columns)
    x[:, : columns // 2] = 3.0  # of one sign: every product of a group has its greatest size
    return x


def as_read(x: torch.Tensor, group: int | None) -> torch.Tensor:
    codes, scale = quantize_rows(x, group)
    columns = x.shape[1]
    spread = scale.double().repeat_interleave(group or columns, dim=1)[:, :columns]
    return codes.double() * spread


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """The worst output column's, so that small rows of the weight count as large ones do."""
    assert got.shape == want.shape
    difference = (got.double() - want).norm(dim=0) / want.norm(dim=0).clamp(min=1e-300)
    return difference.max().item()


@pytest.mark.parametrize(("bits", "kind", "group"), CASES)
def test_products_match_the_specification_at_every_level(
    lib: NativeGrouped, bits: int, kind: str, group: int
) -> None:
    g = make(50, 1000, bits, kind, group)
    part = pack(lib, g)
    weight, call = lib.unpack(part), NativeCall([part], 1000)
    assert error(weight.T, dequantize_grouped(g).T.double()) <= 2.0**-11 * (1 << bits)
    x = activations(16, 1000)
    x[8:] = torch.randn(8, 1000)
    whole = lib.linear(x, call, None)
    assert error(whole, as_read(x, 32) @ weight.double().T) <= 2.0**-18
    for start, stop in [(0, 1), (1, 3), (3, 6), (0, 4), (2, 9), (8, 16)]:
        assert torch.equal(lib.linear(x[start:stop], call, None), whole[start:stop])


@pytest.mark.parametrize(("bits", "kind", "group"), CASES)
def test_exact_weights_are_the_specification_bit_for_bit(
    lib: NativeGrouped, bits: int, kind: str, group: int
) -> None:
    g = make(50, 80, bits, kind, group)
    part = pack(lib, g, exact=True)
    assert torch.equal(lib.unpack(part), dequantize_grouped(g))
    x, call = torch.randn(9, 80), NativeCall([part], 80)
    whole = lib.linear(x, call, None)
    assert error(whole, x.double() @ dequantize_grouped(g).double().T) <= 2.0**-19
    assert torch.equal(lib.linear(x[4:5], call, None), whole[4:5])


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 8, 16, 33, 512])
@pytest.mark.parametrize("exact", [False, True])
def test_every_number_of_rows_and_threads_gives_the_same_bits(
    lib: NativeGrouped, rows: int, exact: bool
) -> None:
    parts = [pack(lib, make(50, 336, bits, kind, group), exact=exact)
             for bits, kind, group in [(4, "center", 32), (6, "center", 16), (4, "table", 32),
                                       (8, "offset", 112), (5, "offset", 32)]]  # fmt: skip
    call = NativeCall(parts, 336)
    x = torch.randn(rows, 336)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(lib.linear(x, call, None))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    read = x.double() if exact else as_read(x, 32)
    weight = torch.cat([lib.unpack(part) for part in parts]).double()
    assert error(results[0], read @ weight.T) <= 2.0**-17
    for row in (0, rows // 2, rows - 1):
        assert torch.equal(lib.linear(x[row : row + 1], call, None)[0], results[0][row])


@pytest.mark.parametrize("shape", [(1, 16), (17, 17), (50, 48), (16, 80), (33, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_shapes_that_no_tile_divides(
    lib: NativeGrouped, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    g = make(*shape, 4, "offset", 16)
    g = dataclasses.replace(g, scale=torch.rand(g.scale.shape), offset=torch.rand(g.scale.shape))
    bias = torch.randn(shape[0])
    for exact in (False, True):
        part = pack(lib, g, exact=exact)
        call = NativeCall([part], shape[1])
        for rows in (1, 5, 9):
            x = torch.randn(rows, shape[1]).to(dtype)
            read = x.double() if exact else as_read(x, 32)
            want = read @ lib.unpack(part).double().T
            rounding = {torch.float32: 2.0**-19, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
            got = lib.linear(x, call, None)
            assert got.dtype == dtype and error(got.T, want.T) <= rounding[dtype]
            got = lib.linear(x, call, bias)
            assert error(got.T, (want + bias.double()).T) <= rounding[dtype]


def test_an_order_gathers_columns_and_leaves_out_what_has_none(lib: NativeGrouped) -> None:
    g = make(40, 96, 4, "center", 32)
    order = torch.cat((torch.randperm(80), torch.full((16,), -1)))
    x = torch.randn(6, 80)
    gathered = torch.cat((x[:, order[:80]], torch.zeros(6, 16)), dim=1)
    for exact in (False, True):
        part = pack(lib, g, order=order, exact=exact)
        plain = pack(lib, g, exact=exact)
        got = lib.linear(x, NativeCall([part], 80), None)
        assert torch.equal(got, lib.linear(gathered, NativeCall([plain], 96), None))


def test_parts_of_different_formats_and_orders_share_one_call(lib: NativeGrouped) -> None:
    order, other = torch.randperm(64), torch.randperm(64)
    parts = [
        pack(lib, make(17, 64, 4, "center", 32), order=order),
        pack(lib, make(40, 64, 6, "center", 16), order=other),
        pack(lib, make(16, 64, 5, "offset", 32), order=order.clone()),
        pack(lib, make(3, 64, 8, "center", 64), per_row=True),
        pack(lib, make(33, 64, 4, "table", 32), exact=True),
    ]
    call = NativeCall(parts, 64)
    assert len(call.sources) == 4
    x = torch.randn(11, 64)
    alone = [lib.linear(x, NativeCall([part], 64), None) for part in parts]
    assert torch.equal(lib.linear(x, call, None), torch.cat(alone, dim=1))


def test_a_scale_per_row_of_activations(lib: NativeGrouped) -> None:
    g = make(20, 200, 8, "center", 208)
    for exact in (False, True):
        part = pack(lib, g, per_row=True, exact=exact)
        x = torch.randn(5, 200)
        want = as_read(x, None) @ lib.unpack(part).double().T
        assert error(lib.linear(x, NativeCall([part], 200), None), want) <= 2.0**-19


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("per_row", [False, True])
def test_what_is_not_finite_spoils_its_own_row_only(
    lib: NativeGrouped, bad: float, per_row: bool
) -> None:
    part = pack(lib, make(20, 64, 4, "center", 32), per_row=per_row)
    call = NativeCall([part], 64)
    x = torch.randn(6, 64)
    clean = lib.linear(x, call, None)
    x[2, 40] = bad
    got = lib.linear(x, call, None)
    assert not got[2].isfinite().any()
    keep = [0, 1, 3, 4, 5]
    assert torch.equal(got[keep], clean[keep])


def test_activations_of_zero_and_of_any_size(lib: NativeGrouped) -> None:
    g = make(20, 64, 4, "offset", 32)
    part = pack(lib, g)
    call, weight = NativeCall([part], 64), lib.unpack(part).double()
    assert torch.equal(lib.linear(torch.zeros(2, 64), call, None), torch.zeros(2, 20))
    for size in (1e-30, 1e-10, 1e10, 1e25):
        x = torch.randn(2, 64) * size
        assert error(lib.linear(x, call, None), as_read(x, 32) @ weight.T) <= 2.0**-18


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_shape_packs_in_any_chunks_and_unpacks_to_the_same(data: st.DataObject) -> None:
    if not isinstance(_LIBRARY, Library):
        pytest.skip(f"no native library: {_LIBRARY}")
    lib = NativeGrouped(_LIBRARY, data.draw(st.sampled_from(_LEVELS)))
    rows, columns = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 150))
    bits, group = data.draw(st.sampled_from(BITS)), 16 * data.draw(st.integers(1, 6))
    kinds = ("center", "offset", "table") if bits <= 4 else ("center", "offset")
    g = make(rows, columns, bits, data.draw(st.sampled_from(kinds)), group)
    step = 16 * data.draw(st.integers(1, 5))
    chunks = [rows_of(g, start, start + step) for start in range(0, rows, step)]
    part = lib.pack(chunks, rows, columns, order=None, exact=True, per_row=False)
    assert torch.equal(lib.unpack(part), dequantize_grouped(g))
    x = torch.randn(data.draw(st.integers(1, 10)), columns)
    part = lib.pack(chunks, rows, columns, order=None, exact=False, per_row=False)
    got = lib.linear(x, NativeCall([part], columns), None)
    want = as_read(x, 32) @ lib.unpack(part).double().T
    # Against what is added up, because a sum of few numbers may be near zero.
    most = (128 if g.table is not None else 1 << bits) * g.scale
    most = most if g.offset is None else most + g.offset.abs()
    added = as_read(x, 32).abs() @ most.double().repeat_interleave(group, dim=1)[:, :columns].T
    assert ((got.double() - want).abs() <= 2.0**-20 * added).all()


def rows_of(g: GroupedCodes, start: int, stop: int) -> GroupedCodes:
    offset = None if g.offset is None else g.offset[start:stop]
    return dataclasses.replace(
        g, codes=g.codes[start:stop], scale=g.scale[start:stop], offset=offset
    )


def test_no_size_of_scales_is_lost_in_half_precision(lib: NativeGrouped) -> None:
    for size in (1e-30, 1e-12, 1e-6, 1.0, 1e6, 1e30):
        g = make(16, 64, 4, "center", 32)
        g = dataclasses.replace(g, scale=torch.rand(16, 2).add(0.1) * size)
        assert error(lib.unpack(pack(lib, g)).T, dequantize_grouped(g).T.double()) <= 2.0**-11


FORMATS = [(3, "center"), (4, "table"), (4, "offset"), (8, "center")]


@pytest.fixture(params=["native", "torch"])
def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(grouped, "native_grouped", lambda: None)
    elif grouped.native_grouped() is None:
        pytest.skip(f"no native library: {_LIBRARY}")
    name: str = request.param
    return name


@pytest.mark.parametrize(
    ("bits", "kind"), [(3, "center"), (4, "table"), (4, "offset"), (8, "center")]
)
@pytest.mark.parametrize("exact", [False, True])
def test_both_routes_pack_join_unpack_and_multiply(
    route: str, bits: int, kind: str, exact: bool
) -> None:
    g, h = make(32, 65, bits, kind, 32), make(7, 65, 6, "center", 16)
    order = torch.randperm(65)
    first = ops.pack_grouped([rows_of(g, 0, 16), rows_of(g, 16, 32)], (32, 65), exact=exact)
    second = ops.pack_grouped([h], (7, 65), order=order, exact=exact)
    joined = ops.join_grouped([first, second])
    assert joined.route == route and joined.shape == (39, 65)
    assert joined.nbytes == first.nbytes + second.nbytes
    weight = ops.unpack_grouped(joined)
    want = torch.cat((dequantize_grouped(g), dequantize_grouped(h)[:, order.argsort()]))
    if exact:
        assert torch.equal(weight, want)
    assert error(weight.T, want.T.double()) <= 2.0**-8
    x, bias = torch.randn(5, 65), torch.randn(39)
    got = ops.grouped_linear(x, joined, bias)
    expected = x.double() @ weight.double().T + bias.double()
    assert error(got, expected) <= (2.0**-16 if exact or route == "torch" else 2.0**-5)
    assert ops.grouped_linear(x[:0], joined, bias).shape == (0, 39)
    assert ops.grouped_linear(x.bfloat16(), joined, bias).dtype == torch.bfloat16


def test_both_routes_read_activations_per_row_where_asked(route: str) -> None:
    g = make(20, 64, 8, "center", 64)
    w = ops.pack_grouped([g], (20, 64), per_row=True, exact=True)
    x = torch.randn(5, 64)
    want = as_read(x, None) @ dequantize_grouped(g).double().T
    assert error(ops.grouped_linear(x, w, None), want) <= 2.0**-18
    assert ops.grouped_linear(x[:0], w, None).shape == (0, 20)


def test_memory_is_what_the_bits_need() -> None:
    if grouped.native_grouped() is None:
        pytest.skip(f"no native library: {_LIBRARY}")
    for bits in BITS:
        w = ops.pack_grouped([make(256, 1024, bits, "center", 32)], (256, 1024))
        assert w.nbytes <= 256 * 1024 * (bits + 0.5) / 8 + 16 * 128


@pytest.mark.parametrize("routes", ["native", "torch"])
def test_what_disagrees_is_refused(routes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if routes == "torch":
        monkeypatch.setattr(grouped, "native_grouped", lambda: None)
    g = make(32, 64, 4, "center", 32)
    for shape in ((31, 64), (48, 64), (32, 48)):
        with pytest.raises(ValueError, match="rows|chunk"):
            ops.pack_grouped([g], shape)
    with pytest.raises(ValueError, match="order"):
        ops.pack_grouped([g], (32, 64), order=torch.full((64,), 64))
    with pytest.raises(ValueError, match="rows"):
        ops.pack_grouped([], (32, 64))


def test_chunks_that_disagree_are_refused(lib: NativeGrouped) -> None:
    def packed(*chunks: GroupedCodes) -> NativePart:
        return lib.pack(chunks, 32, 64, order=None, exact=False, per_row=False)

    first = make(16, 64, 4, "center", 32)
    for other in (make(16, 64, 3, "center", 32), make(16, 64, 4, "offset", 32)):
        with pytest.raises(ValueError, match="agree"):
            packed(first, other)
    with pytest.raises(ValueError, match="after 8 rows"):
        packed(make(8, 64, 4, "center", 32), make(24, 64, 4, "center", 32))
    high = dataclasses.replace(first, codes=first.codes + 1)
    with pytest.raises(ValueError, match="below 2"):
        packed(high, high)


def test_wrong_inputs_are_refused(lib: NativeGrouped) -> None:
    part = pack(lib, make(20, 64, 4, "center", 32))
    call = NativeCall([part], 64)
    with pytest.raises(ValueError, match="64 columns"):
        lib.linear(torch.randn(2, 63), call, None)
    with pytest.raises(ValueError, match="float64"):
        lib.linear(torch.randn(2, 64).double(), call, None)
    with pytest.raises(ValueError, match="bias"):
        lib.linear(torch.randn(2, 64), call, torch.zeros(19))
    with pytest.raises(ValueError, match="at most"):
        NativeCall([part] * 17, 64)

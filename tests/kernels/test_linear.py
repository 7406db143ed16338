"""Linear layers: each route against the specification, exact unpacking, independence of rows."""

from collections.abc import Callable

import pytest
import torch
from simde import BY_SIMDE, by_simde

from quantd.kernels import ops, reference
from quantd.kernels.cpu import linear
from quantd.kernels.cpu.library import Library
from quantd.kernels.cpu.linear import onednn_problem
from quantd.kernels.cpu.native import Native, pack_pairs, pack_panels, unpack_pairs, unpack_panels
from quantd.kernels.cpu.native import _bind as bind

Close = Callable[[torch.Tensor, torch.Tensor], None]
SHAPES = [(1, 1), (31, 7), (48, 64), (33, 257), (100, 600), (64, 1030)]
ROWS = [1, 2, 3, 7, 8, 16, 33, 130]


def _make(n: int, k: int, rows: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    x, weight, bias = torch.randn(rows, k), torch.randn(n, k) / k**0.5, torch.randn(n)
    return x.to(dtype), weight.to(dtype), bias.to(dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_native_linear(
    lib: Native, dtype: torch.dtype, shape: tuple[int, int], assert_close: Close
) -> None:
    for rows in ROWS:
        x, weight, bias = _make(*shape, rows, dtype)
        panels = pack_panels(weight)
        assert torch.equal(unpack_panels(panels, shape[0]), weight)
        for b in (None, bias):
            wide = None if b is None else b.double()
            want = reference.linear(x.double(), weight.double(), wide)
            assert_close(lib.linear(x, panels, shape[0], b), want)


class EmulatedPairs(Native):
    def __init__(self, library: Library) -> None:
        self._linear_pairs = bind(library, "avx512bf16", "linear_pairs")


@pytest.fixture(params=["best", *by_simde("avx512bf16")])
def pairs(request: pytest.FixtureRequest, best: Native) -> Native:
    if request.param == BY_SIMDE:
        return EmulatedPairs(request.getfixturevalue("emulated"))
    if not best.has_pairs:
        pytest.skip("this processor does not multiply pairs of bfloat16")
    return best


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pairs(pairs: Native, shape: tuple[int, int], assert_close: Close) -> None:
    for rows in ROWS:
        x, weight, bias = _make(*shape, rows, torch.bfloat16)
        packed = pack_pairs(weight)
        assert torch.equal(unpack_pairs(packed, *shape), weight)
        for b in (None, bias):
            wide = None if b is None else b.double()
            want = reference.linear(x.double(), weight.double(), wide)
            assert_close(pairs.linear_pairs(x, packed, shape[0], b), want)


def test_rows_of_pairs_do_not_depend_on_their_company_nor_on_threads(pairs: Native) -> None:
    x, weight, bias = _make(200, 701, 257, torch.bfloat16)
    packed = pack_pairs(weight)
    whole = pairs.linear_pairs(x, packed, 200, bias)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for start, stop in [(0, 257), (0, 1), (9, 11), (100, 107), (121, 154), (130, 257)]:
            part = pairs.linear_pairs(x[start:stop], packed, 200, bias)
            assert torch.equal(part, whole[start:stop])


def test_pairs_of_a_wrong_shape_are_refused(pairs: Native) -> None:
    packed = pack_pairs(torch.randn(32, 16).bfloat16())
    with pytest.raises(ValueError, match="x is"):
        pairs.linear_pairs(torch.randn(2, 18).bfloat16(), packed, 32, None)
    with pytest.raises(ValueError, match="x is"):
        pairs.linear_pairs(torch.randn(2, 16), packed, 32, None)


def test_native_rows_do_not_depend_on_their_company_nor_on_threads(
    lib: Native, dtype: torch.dtype
) -> None:
    x, weight, bias = _make(200, 700, 257, dtype)
    panels = pack_panels(weight)
    whole = lib.linear(x, panels, 200, bias)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for start, stop in [(0, 257), (0, 1), (9, 11), (100, 107), (121, 154), (130, 257)]:
            assert torch.equal(lib.linear(x[start:stop], panels, 200, bias), whole[start:stop])


@pytest.mark.parametrize("shape", [(48, 64), (100, 600), (2048, 2048)], ids=str)
def test_chosen_route(dtype: torch.dtype, shape: tuple[int, int], assert_close: Close) -> None:
    x, weight, bias = _make(*shape, 33, dtype)
    w = ops.pack_linear(weight)
    assert w.shape == shape and w.dtype == dtype and w.nbytes >= weight.nbytes
    assert torch.equal(ops.unpack_linear(w), weight)
    want = reference.linear(x.double(), weight.double(), bias.double())
    whole = ops.linear(x, w, bias)
    assert_close(whole, want)
    for start, stop in [(0, 1), (4, 6), (1, 8), (16, 32)]:
        assert torch.equal(ops.linear(x[start:stop], w, bias), whole[start:stop])
    assert ops.linear(x[:0], w, bias).shape == (0, shape[0])


@pytest.mark.parametrize("held", [torch.bfloat16, torch.float16], ids=str)
def test_a_narrower_weight_gives_the_same_bits(lib: Native, held: torch.dtype) -> None:
    for shape in SHAPES:
        for rows in ROWS:
            x, weight, bias = _make(*shape, rows, torch.float32)
            narrow = weight.to(held)
            want = lib.linear(x, pack_panels(narrow.float()), shape[0], bias)
            assert torch.equal(lib.linear(x, pack_panels(narrow), shape[0], bias), want)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16], ids=str)
def test_float32_activations_leave_a_narrower_weight_narrow(
    best: Native, stored: torch.dtype
) -> None:
    x, weight, bias = _make(100, 600, 5, torch.float32)
    weight = weight.to(stored)
    w = ops.pack_linear(weight, torch.float32)
    assert (w.dtype, w.route) == (torch.float32, "native")
    assert ops.unpack_linear(w).dtype == stored == ops.held_dtype(stored, w.dtype, x.device)
    assert w.nbytes < 100 * 600 * 3
    whole = ops.pack_linear(weight.float())
    assert torch.equal(ops.linear(x, w, bias), ops.linear(x, whole, bias))


def test_a_wider_weight_is_rounded() -> None:
    weight = torch.randn(32, 32)
    w = ops.pack_linear(weight, torch.bfloat16)
    assert w.dtype == torch.bfloat16 == ops.held_dtype(weight.dtype, w.dtype, weight.device)
    assert torch.equal(ops.unpack_linear(w), weight.bfloat16())


def test_the_route_of_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(32, 32).bfloat16()
    without = "onednn" if onednn_problem(torch.bfloat16) is None else "native"
    lib = linear.native()
    has_pairs = lib is not None and lib.has_pairs
    for has_amx in (False, True):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda has=has_amx: has)
        expected = "pairs" if has_pairs and not has_amx else without
        assert ops.pack_linear(weight).route == expected


def test_other_dtypes_stay_as_they_are() -> None:
    weight = torch.randn(5, 4, dtype=torch.float64)
    w = ops.pack_linear(weight)
    assert w.route == "torch" and ops.unpack_linear(w) is weight
    x = torch.randn(3, 4, dtype=torch.float64)
    assert torch.equal(ops.linear(x, w, None), torch.nn.functional.linear(x, weight))


def test_a_wrong_shape_is_refused(best: Native) -> None:
    panels = pack_panels(torch.randn(32, 16))
    with pytest.raises(ValueError, match="x is"):
        best.linear(torch.randn(2, 17), panels, 32, None)
    with pytest.raises(ValueError, match="bias"):
        best.linear(torch.randn(2, 16), panels, 32, torch.randn(31))

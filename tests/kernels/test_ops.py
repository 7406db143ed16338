"""The door: which implementation is taken, and what it says of a machine that lacks one."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from quantd.kernels import ops, reference
from quantd.kernels.batch import BLOCK_SIZE, AttentionBatch
from quantd.kernels.cpu import library as library_module
from quantd.kernels.cpu import linear
from quantd.kernels.cpu.library import Library, open_library
from quantd.kernels.cpu.native import Native

Close = Callable[[torch.Tensor, torch.Tensor], None]


@pytest.fixture(params=["native", "plain"])
def door(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "plain":
        monkeypatch.setattr(ops, "native", lambda: None)
        monkeypatch.setattr(linear, "native", lambda: None)
    elif ops.native() is None:
        pytest.skip(f"no native library: {open_library()}")
    name: str = request.param
    return name


def _step(dtype: torch.dtype, head_dim: int) -> tuple[torch.Tensor, ...]:
    """A layer's operations on one sequence of 20 rows, through the door."""
    torch.manual_seed(1)
    x, residual = torch.randn(2, 20, 48).to(dtype)
    weight = torch.randn(48)
    normed = ops.add_rms_norm(x, residual, weight, 1e-5)
    w = ops.pack_linear((torch.randn(6 * head_dim, 48) / 7).to(dtype))
    fused = ops.linear(normed, w, None).unflatten(1, (6, head_dim))
    q, k, v = fused.split((4, 1, 1), dim=1)
    angle = torch.rand(20, head_dim // 2)
    k_pool, v_pool = torch.zeros(2, 3, 1, BLOCK_SIZE, head_dim, dtype=dtype)
    slots = torch.arange(16, 36)
    ops.rotary_write_kv(q, k, v, angle.cos(), angle.sin(), k_pool, v_pool, slots)
    batch = AttentionBatch(
        torch.tensor([0, 20]).int(),
        torch.tensor([20]).int(),
        torch.tensor([[1, 2]]).int(),
        slots,
        torch.arange(20),
    )
    out = ops.paged_attention(q, k_pool, v_pool, batch, 0.2, None, None, None)
    gated = ops.act_and_mul(out.flatten(1), "silu")
    ops.rotary(q, k, angle.cos(), angle.sin())
    ops.write_kv(k, v, k_pool, v_pool, slots)
    return residual, ops.rms_norm(gated, weight.new_ones(gated.shape[1]), 1e-5), k_pool, v_pool


@pytest.mark.parametrize("head_dim", [16, 40])
def test_both_sides_of_the_door_agree(door: str, dtype: torch.dtype, head_dim: int) -> None:
    got = _step(dtype, head_dim)
    want = _step(torch.float64, head_dim)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.08, torch.float16: 0.01}[dtype]
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.double(), w, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("missing", ["onednn", "both"])
def test_linear_layers_without_their_fast_route(
    missing: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, assert_close: Close
) -> None:
    monkeypatch.setattr(linear, "onednn_problem", lambda _: "missing")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)  # no pairs
    if missing == "both":
        monkeypatch.setattr(linear, "native", lambda: None)
    elif linear.native() is None:
        pytest.skip("no native library")
    x, weight = torch.randn(9, 70).to(dtype), torch.randn(50, 70).to(dtype)
    w = ops.pack_linear(weight)
    assert w.route == ("torch" if missing == "both" else "native")
    assert torch.equal(ops.unpack_linear(w), weight)
    assert_close(ops.linear(x, w, None), reference.linear(x.double(), weight.double(), None))


def test_notes_name_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    library = open_library()
    monkeypatch.setattr(ops, "onednn_problem", lambda _: None)
    if isinstance(library, Library):
        assert ops.notes() == ()
    monkeypatch.setattr(ops, "open_library", lambda: "no such file")
    monkeypatch.setattr(ops, "onednn_problem", lambda _: "no such operation")
    monkeypatch.setattr(ops, "linear_route", lambda *_: "torch")
    first, second = ops.notes()
    assert "no such file" in first and "no such operation" in second
    assert ops.notes(torch.bfloat16) == (first, second)
    assert ops.notes(torch.float32) == (first,), "what it has no use for is not said"
    monkeypatch.setattr(ops, "linear_route", lambda *_: "pairs")
    assert ops.notes(torch.bfloat16) == (first,), "nor what nothing goes through"


def test_the_identity_tells_who_multiplies_bfloat16() -> None:
    assert ops.identity()[-1] == ops.pack_linear(torch.randn(32, 32).bfloat16()).route


def test_a_library_older_than_its_sources_is_not_opened(
    best: Native, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library_module, "_source_digest", lambda _: "of newer sources")
    reason = library_module.open_library.__wrapped__()
    assert isinstance(reason, str) and "older than its sources" in reason


def test_a_library_that_is_no_library_is_a_reason_and_not_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library_module, "__file__", str(tmp_path / "library.py"))
    assert "not built" in str(library_module.open_library.__wrapped__())
    (tmp_path / "_native.so").write_bytes(b"not a library")
    assert "cannot be opened" in str(library_module.open_library.__wrapped__())


def test_num_threads() -> None:
    ops.set_num_threads(2)
    assert ops.num_threads() == torch.get_num_threads() == 2
    with pytest.raises(ValueError, match="num_threads is 0"):
        ops.set_num_threads(0)

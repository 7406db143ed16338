"""A layer's operations through the door, with Triton's on its other side."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from quantd.kernels import checked, ops, reference
from quantd.kernels.batch import BLOCK_SIZE, AttentionBatch
from quantd.kernels.triton import copies, norms
from quantd.kernels.triton.check import CASES


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Tensors here count as on a GPU, but for those of float64; the names of what ran."""
    names: set[str] = set()

    def other(specification: Any, x: torch.Tensor) -> Any:
        if x.dtype == torch.float64:
            return specification
        names.add(specification.__name__)
        return CASES[specification.__name__].kernel

    monkeypatch.setattr(ops, "_native", lambda _: None)
    monkeypatch.setattr(ops, "_other", other)
    return names


def _step(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(1)
    x, residual = torch.randn(2, 20, 48).to(dtype)
    weight, bias = torch.rand(2, 48)
    normed = ops.layer_norm(ops.add_rms_norm(x, residual, weight, 1e-5), weight, bias, 1e-5, dtype)
    fused = ops.activate(normed.repeat(1, 2), "gelu").unflatten(1, (6, 16))
    q, k, v = fused.split((4, 1, 1), dim=1)
    angle = torch.rand(20, 8)
    pools = torch.zeros(2, 3, 1, BLOCK_SIZE, 16, dtype=dtype)
    slots = torch.arange(16, 36)
    ops.rotary_write_kv(q, k, v, angle.cos(), angle.sin(), pools[0], pools[1], slots)
    batch = AttentionBatch(
        torch.tensor([0, 20]).int(),
        torch.tensor([20]).int(),
        torch.tensor([[1, 2]]).int(),
        slots,
        torch.arange(20),
    )
    out = ops.paged_attention(q, pools[0], pools[1], batch, 0.2, None, None, None)
    gated = ops.act_and_mul(out.flatten(1), "silu")
    ops.rotary(q, k, angle.cos(), angle.sin())
    ops.write_kv(k, v, pools[0], pools[1], slots)
    ops.copy_blocks(list(pools), [(1, 0)])
    rows = pools.new_zeros(2, 2 * BLOCK_SIZE * 16)
    ops.gather_blocks(list(pools), [2, 1], rows)
    ops.scatter_blocks(rows, list(pools), [1, 2])
    return residual, ops.rms_norm(gated, weight.new_ones(gated.shape[1]), 1e-5), pools


def test_both_sides_of_the_door_agree(used: set[str], dtype: torch.dtype) -> None:
    got = _step(dtype)
    others = {"sample_rows", "route_experts", "grouped_linear", "expert_feed_forward"}
    assert used == set(CASES) - others
    want = _step(torch.float64)
    tolerance = {torch.float32: 1e-5, torch.float16: 0.01}[dtype]
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.double(), w, rtol=tolerance, atol=tolerance)


def test_a_head_that_no_kernel_is_made_for(used: set[str]) -> None:
    batch = AttentionBatch(
        torch.tensor([0, 1]).int(),
        torch.tensor([1]).int(),
        torch.tensor([[0]]).int(),
        torch.zeros(1).long(),
        torch.zeros(1).long(),
    )
    q, pool = torch.randn(1, 1, 272), torch.randn(1, 1, BLOCK_SIZE, 272)
    out = ops.paged_attention(q, pool, pool, batch, 1.0, None, None, None)
    assert torch.equal(out, reference.paged_attention(q, pool, pool, batch, 1.0, None, None, None))


def test_what_passed_the_check_is_taken_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    passed = SimpleNamespace(operations={"rms_norm": norms.rms_norm})
    monkeypatch.setattr(ops, "checked", lambda device, dtype: passed)

    def on(device: str, dtype: torch.dtype) -> Any:
        return SimpleNamespace(is_cuda=device == "cuda", dtype=dtype, device=torch.device(device))

    half = torch.float16
    assert ops._other(reference.rms_norm, on("cuda", half)) is norms.rms_norm
    assert ops._other(reference.rotary, on("cuda", half)) is reference.rotary
    assert ops._other(reference.rms_norm, on("cuda", torch.float64)) is reference.rms_norm
    assert ops._other(reference.rms_norm, on("cpu", half)) is reference.rms_norm


def test_blocks_of_e4m3_are_moved_by_what_passed_for_any_activations(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = torch.device("cuda:7")
    monkeypatch.setattr(ops, "checked", lambda *_: pytest.fail("nothing is compiled for that"))
    pool = SimpleNamespace(is_cuda=True, dtype=torch.float8_e4m3fn, device=device)
    assert ops._mover(reference.copy_blocks, pool) is reference.copy_blocks
    passed = checked.Checked({"copy_blocks": copies.copy_blocks}, ())
    monkeypatch.setitem(checked._of_device, device, passed)
    assert ops._mover(reference.copy_blocks, pool) is copies.copy_blocks
    assert ops._mover(reference.gather_blocks, pool) is reference.gather_blocks


def test_notes_say_what_was_left_out_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = "rotary runs in plain torch"
    monkeypatch.setattr(ops, "checked", lambda *_: SimpleNamespace(problems=(problem,)))
    gpu = torch.device("cuda:0")
    assert ops.notes(torch.float16, gpu) == (problem,)
    assert ops.notes(None, gpu) == ops.notes(torch.float64, gpu) == ()
    assert problem not in ops.notes(torch.float16, torch.device("cpu"))

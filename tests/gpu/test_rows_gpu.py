"""What is done to each row of a step, and blocks: against the specification at real sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu_harness import DEVICE, E4M3, MARKS, assert_close, need_memory, randn, same_bits, sized

from quantd.kernels import ops, reference
from quantd.kernels.batch import BLOCK_SIZE

pytestmark = MARKS

WIDTHS = sized([4096, 8192, 5120, 100], [256, 100])
ROWS = sized([1, 7, 64, 4097], [1, 7, 33])
EPS = 1e-5


def rows_alone_are_the_same(operation: Any, got: torch.Tensor, *inputs: torch.Tensor) -> None:
    """Each of some rows, computed as a batch of one."""
    for row in {0, len(got) // 2, len(got) - 1}:
        alone = operation(*(x[row : row + 1].clone() for x in inputs))
        assert torch.equal(alone[0], got[row]), f"row {row} of {len(got)}"


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("width", WIDTHS)
def test_rms_norm(rows: int, width: int, dtype: torch.dtype) -> None:
    x, weight = randn(rows, width, dtype=dtype), randn(width)
    got = ops.rms_norm(x, weight, EPS)
    assert_close(got, reference.rms_norm(x.double(), weight.double(), EPS))
    rows_alone_are_the_same(lambda x: ops.rms_norm(x, weight, EPS), got, x)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("width", WIDTHS)
def test_add_rms_norm(rows: int, width: int, dtype: torch.dtype) -> None:
    x, residual, weight = randn(rows, width, dtype=dtype), randn(rows, width), randn(width)
    before = residual.to(dtype)
    after = before.clone()
    got = ops.add_rms_norm(x, after, weight, EPS)
    assert_close(after, x.double() + before.double())
    wide = before.double()
    assert_close(got, reference.add_rms_norm(x.double(), wide, weight.double(), EPS), more=2)
    rows_alone_are_the_same(
        lambda x, residual: ops.add_rms_norm(x, residual, weight, EPS), got, x, before
    )


def test_norms_of_heads(dtype: torch.dtype) -> None:
    """Views into a fused buffer."""
    fused = randn(sized(4097, 9), 48 * 128, dtype=dtype)
    view, weight = fused[:, : 32 * 128].view(-1, 32, 128), randn(128)
    got = ops.rms_norm(view, weight, EPS)
    assert_close(got, reference.rms_norm(view.double(), weight.double(), EPS))


def test_layer_norm(dtype: torch.dtype) -> None:
    x, (weight, bias) = randn(sized(2000, 20), 1024, dtype=dtype), randn(2, 1024)
    got = ops.layer_norm(x, weight, bias, 1e-12, dtype)
    wide = (x.double(), weight.double(), bias.double())
    assert_close(got, reference.layer_norm(*wide, 1e-12, torch.float64))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh"])
def test_activation(rows: int, kind: Any, dtype: torch.dtype) -> None:
    x = randn(rows, sized(2 * 14336, 2 * 96), dtype=dtype)
    got = ops.act_and_mul(x, kind)
    assert_close(got, reference.act_and_mul(x.double(), kind), more=2)
    rows_alone_are_the_same(lambda x: ops.act_and_mul(x, kind), got, x)
    assert_close(ops.activate(x, kind), reference.activate(x.double(), kind), more=2)


def angles(rows: int, half: int) -> tuple[torch.Tensor, torch.Tensor]:
    at = torch.rand(rows, half, device=DEVICE) * 131072
    return at.cos(), at.sin()


@pytest.mark.parametrize("heads", [(32, 8, 128), (64, 8, 128), (32, 32, 96)], ids=str)
@pytest.mark.parametrize("partial", [False, True])
def test_rotary(heads: tuple[int, int, int], partial: bool, dtype: torch.dtype) -> None:
    rows = sized(4097, 17)
    count, kv_count, size = heads
    fused = randn(rows, count + 2 * kv_count, size, dtype=dtype)
    q, k, _ = fused.split((count, kv_count, kv_count), 1)
    cos, sin = angles(rows, size // 4 if partial else size // 2)
    want = [q.double(), k.double()]
    reference.rotary(*want, cos.double(), sin.double())
    one = [t[-1:].clone() for t in (q, k)]
    ops.rotary(q, k, cos, sin)
    ops.rotary(*one, cos[-1:], sin[-1:])
    for got, wide, alone in zip((q, k), want, one, strict=True):
        assert_close(got, wide)
        assert torch.equal(got[-1:], alone)


@pytest.mark.parametrize("pool_dtype", [None, E4M3], ids=["as activations", "e4m3"])
def test_rotary_and_kv_write(pool_dtype: torch.dtype | None, dtype: torch.dtype) -> None:
    rows, blocks = sized(4097, 40), sized(600, 6)
    fused = randn(rows, 48, 128, dtype=dtype) * 100  # beyond 448 in parts
    q, k, v = fused.split((32, 8, 8), 1)
    cos, sin = angles(rows, 64)
    slots = torch.randperm(blocks * BLOCK_SIZE)[:rows].to(DEVICE)
    shape = (blocks, 8, BLOCK_SIZE, 128)
    got, want = (
        [torch.zeros(shape, device=DEVICE).to(pool_dtype or dtype) for _ in "kv"] for _ in range(2)
    )
    scale = (1.0, 1.0) if pool_dtype is None else (0.5, 0.25)
    turned = [q.double(), k.double()]
    reference.rotary(*turned, cos.double(), sin.double())
    ops.rotary_write_kv(q, k, v, cos, sin, *got, slots, scale)
    assert_close(q, turned[0])
    assert_close(k, turned[1])
    reference.write_kv(k, v, *want, slots, scale)
    for one, other in zip(got, want, strict=True):
        assert same_bits(one, other)
    alone = [torch.zeros_like(pool) for pool in got]
    ops.write_kv(k, v, *alone, slots, scale)
    assert all(same_bits(one, other) for one, other in zip(alone, want, strict=True))


@pytest.mark.parametrize("pool_dtype", [torch.bfloat16, torch.float32, E4M3], ids=str)
def test_copies_of_blocks_are_in_order(pool_dtype: torch.dtype) -> None:
    shape = (sized(400, 20), 8, BLOCK_SIZE, sized(128, 16))
    got = [randn(*shape).to(pool_dtype) for _ in range(sized(160, 4))]
    want = [pool.clone() for pool in got]
    last = shape[0] - 1
    pairs = [(0, 1), (1, 2), (3, 5), (4, 3), (5, 4), (0, 2), (1, 1), (2, last), (last, 7)]
    pairs += [(8 + i, 9 + i) for i in range(10)]
    ops.copy_blocks(got, pairs)
    reference.copy_blocks(want, pairs)
    assert all(same_bits(one, other) for one, other in zip(got, want, strict=True))


@pytest.mark.parametrize("pool_dtype", [torch.bfloat16, torch.float32, E4M3], ids=str)
def test_blocks_of_all_pools_in_rows_and_back(pool_dtype: torch.dtype) -> None:
    shape = (sized(400, 20), 8, BLOCK_SIZE, sized(128, 16))
    got = [randn(*shape).to(pool_dtype) for _ in range(sized(160, 4))]
    want = [pool.clone() for pool in got]
    rows = randn(6, len(got) * got[0][0].numel()).to(pool_dtype)
    others = rows.clone()
    ops.gather_blocks(got, [3, shape[0] - 1, 0, 3], rows)
    reference.gather_blocks(want, [3, shape[0] - 1, 0, 3], others)
    assert same_bits(rows, others)
    ops.scatter_blocks(rows, got, [7, 5, 7, 9, shape[0] - 1])
    reference.scatter_blocks(others, want, [7, 5, 7, 9, shape[0] - 1])
    assert all(same_bits(one, other) for one, other in zip(got, want, strict=True))


def test_copies_beyond_two_to_the_31_elements() -> None:
    shape = (8, BLOCK_SIZE, 128)
    count = sized((1 << 31) // (8 * BLOCK_SIZE * 128), 40) + 100
    need_memory(5 << 30)
    pool = torch.zeros(count, *shape, dtype=torch.bfloat16, device=DEVICE)
    pool[3] = randn(*shape)
    ops.copy_blocks([pool], [(3, count - 1), (count - 1, count - 3)])
    for block in (count - 1, count - 3):
        assert torch.equal(pool[block], pool[3])
    assert int(torch.count_nonzero(pool)) == 3 * int(torch.count_nonzero(pool[3]))


@pytest.mark.parametrize("experts", [(8, 2), (128, 8), (60, 4)], ids=str)
def test_routing(experts: tuple[int, int], dtype: torch.dtype) -> None:
    count, top_k = experts
    logits = (randn(sized(4097, 40), count) * 4).round().to(dtype) / 4  # equal ones
    for before, again in ((True, True), (True, False), (False, True)):
        how = {"softmax_before": before, "renormalize": again}
        weights, ids = ops.route_experts(logits, top_k, **how)
        wide, want = reference.route_experts(logits.double(), top_k, **how)
        assert torch.equal(ids, want)
        torch.testing.assert_close(weights.double(), wide.double(), rtol=1e-5, atol=1e-6)


def test_not_a_number_stays_in_its_row(dtype: torch.dtype) -> None:
    x, weight = randn(5, 4096, dtype=dtype), randn(4096)
    clean = ops.rms_norm(x, weight, EPS)
    x[2, 77] = float("nan")
    got = ops.rms_norm(x, weight, EPS)
    assert bool(got[2].isnan().all()) and torch.equal(got[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])

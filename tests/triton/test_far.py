"""Rows that lie more than 2 ** 31 elements apart give what they give side by side.

The memory between them is never touched. Addresses that no stride decides are held to 64 bits by
what the kernels are compiled to: `tests/kernels/test_triton_ahead_of_time.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from quantd.kernels import ops
from quantd.kernels.batch import BLOCK_SIZE, AttentionBatch
from quantd.kernels.grouped import GroupedCodes
from quantd.kernels.grouped_linear import gpu_weight
from quantd.kernels.sampling import SamplingRows
from quantd.kernels.triton import (
    attention,
    experts,
    grouped,
    norms,
    rotary,
    routing,
    sampling,
    w8a8,
)
from quantd.kernels.triton.grouped_layout import PackedPart, pack_part

ROWS = 3
APART = 1 << 30
"""Elements between two rows: a number of 32 bits, which ROWS - 1 times is none any more."""

Far = Callable[[torch.Tensor], torch.Tensor]


@pytest.fixture(scope="module")
def memory() -> torch.Tensor:
    return torch.empty((ROWS - 1) * APART + 4096, dtype=torch.float16)


@pytest.fixture
def far(memory: torch.Tensor) -> Iterator[Far]:
    """Puts [ROWS, ...] into the memory, one tensor beside the other."""
    used = 0

    def put(x: torch.Tensor) -> torch.Tensor:
        nonlocal used
        assert len(x) == ROWS and x[0].numel() + used <= 4096 and x.dtype == torch.float16
        strides = (APART, *x[0].contiguous().stride())
        view = memory.as_strided(x.shape, strides, used)
        used += x[0].numel()
        view.copy_(x)
        return view

    yield put


def _part() -> PackedPart:
    codes = torch.randint(0, 16, (20, 48), dtype=torch.uint8)
    chunk = GroupedCodes(codes, 4, 16, torch.rand(20, 3) / 16, center=8)
    return pack_part([chunk], 20, 48, order=None, per_row=False, device=torch.device("cpu"))


def test_norms(far: Far) -> None:
    x, weight = torch.randn(ROWS, 2, 16).half(), torch.rand(16)
    assert torch.equal(norms.rms_norm(far(x), weight, 1e-5), norms.rms_norm(x, weight, 1e-5))


def test_grouped_weights(far: Far) -> None:
    x, part = torch.randn(ROWS, 48).half(), _part()
    want, got = torch.empty(ROWS, 20).half(), far(torch.zeros(ROWS, 20).half())
    grouped.grouped_matmul(x, part, None, want)
    grouped.grouped_matmul(far(x), part, None, got)
    assert torch.equal(got, want)


def test_weights_of_eight_bits(far: Far) -> None:
    x = torch.randn(ROWS, 48).half()
    codes, scale = w8a8.quantize_rows(x)
    assert torch.equal(w8a8.quantize_rows(far(x))[0], codes)
    part = w8a8.pack_bytes(torch.randint(-127, 128, (20, 48), dtype=torch.int8), torch.rand(20))
    want, got = torch.empty(ROWS, 20).half(), far(torch.zeros(ROWS, 20).half())
    w8a8.byte_matmul(codes, scale, part, None, want)
    w8a8.byte_matmul(codes, scale, part, None, got)
    assert torch.equal(got, want)


@pytest.mark.parametrize("form", ["dense", "packed"])
def test_experts(far: Far, form: str) -> None:
    x, plan = torch.randn(ROWS, 48).half(), routing.plan_rows(torch.tensor([[1], [0], [1]]), 2)
    stack = ops.ExpertStack(2)
    for i in range(2):
        if form == "dense":
            plain = torch.randn(20, 48).half()
            stack.put(i, ops.LinearWeight(plain, (20, 48), plain.dtype, "torch", plain.nbytes))
        else:
            stack.put(i, gpu_weight((_part(),), (20, 48), False, False))
    whole = stack.together()
    assert whole is not None
    want = experts.expert_matmul(x, whole, plan, gather=True)
    assert torch.equal(experts.expert_matmul(far(x), whole, plan, gather=True), want)


def test_routing(far: Far) -> None:
    logits = torch.randn(ROWS, 6).half()
    want = routing.route_experts(logits, 2, softmax_before=True, renormalize=True)
    got = routing.route_experts(far(logits), 2, softmax_before=True, renormalize=True)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def test_sampling(far: Far) -> None:
    logits = torch.randn(ROWS, 40).half()
    one, none = torch.ones(ROWS), torch.zeros(0)
    number = torch.arange(ROWS)
    rows = SamplingRows(
        seed=number,
        position=number,
        temperature=one,
        top_k=number.int(),
        top_p=one.double() * 0.9,
        min_p=one.double() * 0,
        repetition=one,
        frequency=one * 0,
        presence=one * 0,
        mask=torch.zeros(1, 2).int(),
        mask_row=number.int() * 0 - 1,
        edit_start=torch.zeros(ROWS + 1).int(),
        edit_token=none.int(),
        edit_bias=none,
        edit_count=none,
        edit_flags=none.int(),
        seen=torch.zeros(ROWS, 2).int(),
        seen_row=number.int(),
        seen_new=number.int() * 0,
        seen_start=torch.zeros(ROWS + 1).int(),
        seen_token=none.int(),
    )
    want = sampling.sample_rows(logits, rows)
    got = sampling.sample_rows(far(logits), rows)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def test_attention(far: Far) -> None:
    q, pool = torch.randn(ROWS, 4, 16).half(), torch.randn(2, 2, BLOCK_SIZE, 16).half()
    starts, table = torch.tensor([0, ROWS]).int(), torch.tensor([[1]]).int()
    unused = torch.zeros(ROWS).long()
    batch = AttentionBatch(starts, torch.tensor([9]).int(), table, unused, unused)

    def run(q: torch.Tensor) -> torch.Tensor:
        return attention.paged_attention(q, pool, pool, batch, 0.3, None, None, None)

    assert torch.equal(run(far(q)), run(q))


def test_rotary_and_the_write(far: Far) -> None:
    fused, angle = torch.randn(ROWS, 4, 16).half(), torch.rand(ROWS, 8)
    apart, slots = far(fused), torch.tensor([5, 17, 30])
    pools = torch.zeros(2, 2, 2, 1, BLOCK_SIZE, 16).half()
    for pair, x in zip(pools, (fused, apart), strict=True):
        q, k, v = x.split((2, 1, 1), dim=1)
        rotary.rotary_write_kv(q, k, v, angle.cos(), angle.sin(), pair[0], pair[1], slots)
    assert torch.equal(apart, fused) and torch.equal(pools[0], pools[1])
    assert pools.any()

"""Experts: routing as specified, a plan that has every pair once, products and sums in fp64."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantd.kernels import ops, reference
from quantd.kernels.experts import StackedWeight
from quantd.kernels.grouped import GroupedCodes
from quantd.kernels.grouped_linear import gpu_weight
from quantd.kernels.triton import experts, grouped, routing
from quantd.kernels.triton.grouped_layout import PackedPart, pack_part, unpack_part

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
CPU = torch.device("cpu")
MAX_NMSE = {torch.float32: 1e-12, torch.float16: 2.0**-21}


@pytest.mark.parametrize("softmax_before", [False, True])
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (8, 2), (60, 4), (5, 5)])
def test_routes_as_the_specification(
    dtype: torch.dtype, softmax_before: bool, renormalize: bool, num_experts: int, top_k: int
) -> None:
    # Few values, so that many are equal; the first row is all the same.
    logits = torch.randint(-3, 3, (6, num_experts)).to(dtype) / 2
    logits[0] = 0
    logits[1, ::2] = -0.0
    logits[2, 0] = -torch.inf
    how = {"softmax_before": softmax_before, "renormalize": renormalize}
    got, ids = routing.route_experts(logits, top_k, **how)
    want, want_ids = reference.route_experts(logits, top_k, **how)
    assert torch.equal(ids, want_ids)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7, equal_nan=True)


def test_a_nan_spoils_its_own_row_only() -> None:
    logits = torch.randn(3, 6)
    logits[1, 4] = torch.nan
    got, ids = routing.route_experts(logits, 2, softmax_before=True, renormalize=True)
    want, want_ids = reference.route_experts(logits, 2, softmax_before=True, renormalize=True)
    assert torch.equal(ids, want_ids)
    torch.testing.assert_close(got, want, equal_nan=True)


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_routes_rows_that_are_apart_and_none(dtype: torch.dtype, rows: int) -> None:
    logits = torch.randn(rows, 20).to(dtype)[:, 3:10]
    got, ids = routing.route_experts(logits, 2, softmax_before=False, renormalize=True)
    want, want_ids = reference.route_experts(logits, 2, softmax_before=False, renormalize=True)
    assert torch.equal(ids, want_ids)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_plan_has_every_pair_once_with_its_own_expert(data: st.DataObject) -> None:
    num_experts = data.draw(st.integers(1, 9))
    top_k = data.draw(st.integers(1, num_experts))
    some = st.permutations(range(num_experts)).map(lambda order: order[:top_k])
    ids = torch.tensor(data.draw(st.lists(some, min_size=1, max_size=60)))
    plan = routing.plan_rows(ids, num_experts)
    flat, seen = ids.flatten(), []
    for expert, start, stop in zip(
        plan.expert.tolist(), plan.start.tolist(), plan.stop.tolist(), strict=True
    ):
        if expert < num_experts:
            places = range(start, min(start + plan.tile, stop))
            assert places and (flat[plan.order[list(places)]] == expert).all()
            seen += places
    assert sorted(seen) == list(range(flat.numel()))
    for row, places in enumerate(plan.places.tolist()):
        pairs = plan.order[places]
        assert (pairs // top_k == row).all()
        assert flat[pairs].tolist() == sorted(ids[row].tolist())


@pytest.mark.parametrize(
    ("rows", "top_k", "num_experts"),
    [(1, 1, 1), (1, 8, 128), (3, 2, 200), (130, 8, 128), (512, 2, 8), (700, 3, 60), (1030, 1, 2)],
)
def test_a_plan_is_a_stable_sort(rows: int, top_k: int, num_experts: int) -> None:
    """Also of more pairs than are looked at at once, and where some expert has none."""
    ids = torch.rand(rows, num_experts).argsort(1)[:, :top_k]
    ids[ids == num_experts // 2] = 0
    plan = routing.plan_rows(ids, num_experts)
    flat = ids.flatten()
    order = flat.sort(stable=True).indices
    assert torch.equal(plan.order, order)
    assert torch.equal(plan.places, order.argsort().view(rows, top_k).sort(1).values)
    counts = flat.bincount(minlength=num_experts).tolist()
    want, place = [], 0
    for expert, count in enumerate(counts):
        want += [(expert, place + i, place + count) for i in range(0, count, plan.tile)]
        place += count
    got = list(zip(*(t.tolist() for t in (plan.expert, plan.start, plan.stop)), strict=True))
    assert got[: len(want)] == want
    assert {expert for expert, *_ in got[len(want) :]} <= {num_experts}, "tiles too many"


def packed(bits: int, group: int, kind: str, rows: int, columns: int) -> PackedPart:
    groups = -(-columns // group)
    codes = torch.randint(0, 1 << bits, (rows, columns), dtype=torch.uint8)
    scale = (torch.rand(rows, groups) + 0.1) / (1 << bits)
    offset = -torch.rand(rows, groups) if kind == "offset" else None
    center = 1 << (bits - 1) if kind == "center" else 0
    g = GroupedCodes(codes, bits, group, scale, offset, center)
    return pack_part([g], rows, columns, order=None, per_row=False, device=CPU)


def dense(weight: torch.Tensor) -> ops.LinearWeight:
    shape = weight.shape[0], weight.shape[1]
    return ops.LinearWeight(weight, shape, weight.dtype, "torch", weight.nbytes)


def alone(part: PackedPart) -> ops.GroupedWeight:
    return gpu_weight((part,), (part.rows, part.columns), False, part.per_row)


def stacked(weights: Sequence[ops.Weight]) -> StackedWeight:
    stack = ops.ExpertStack(len(weights))
    for i, weight in enumerate(weights):
        stack.put(i, weight)
    whole = stack.together()
    assert whole is not None
    return whole


@pytest.mark.parametrize("count", [1, 2, 17, 80])
@pytest.mark.parametrize("form", ["dense", (4, 32, "offset"), (3, 16, "center")], ids=str)
def test_a_mixture_is_the_sum_of_its_experts(
    dtype: torch.dtype, count: int, form: str | tuple[int, int, str]
) -> None:
    num_experts, top_k, hidden, inner = 4, 2, 70, 37
    stacks, plain = [], []
    for n, k in ((inner, hidden), (hidden, inner)):
        if isinstance(form, str):
            weight = (torch.randn(num_experts, n, k) / 8).to(dtype)
            stacks.append(stacked([dense(w) for w in weight]))
            plain.append(weight.double())
        else:
            parts = [packed(*form, n, k) for _ in range(num_experts)]
            stacks.append(stacked([alone(part) for part in parts]))
            plain.append(torch.stack([unpack_part(part) for part in parts]).double())
    x = torch.randn(count, hidden).to(dtype)
    # No row goes to the second expert.
    logits = torch.randn(count, num_experts)
    logits[:, 1] = -torch.inf
    weights, ids = routing.route_experts(logits, top_k, softmax_before=True, renormalize=True)
    plan = routing.plan_rows(ids, num_experts)
    first = experts.expert_matmul(x, stacks[0], plan, gather=True)
    source = plan.order // top_k
    expert = ids.flatten()[plan.order]
    want = torch.einsum("pk,pnk->pn", x.double()[source], plain[0][expert])
    assert error(first, want) <= MAX_NMSE[dtype]
    second = experts.expert_matmul(first, stacks[1], plan, gather=False)
    want = torch.einsum("pk,pnk->pn", first.double(), plain[1][expert])
    assert error(second, want) <= MAX_NMSE[dtype]
    pair_weights = weights.double().flatten()[plan.order, None]
    total = torch.zeros(count, hidden, dtype=torch.float64)
    total.index_add_(0, source, second.double() * pair_weights)
    assert error(experts.combine(second, weights, plan), total) <= MAX_NMSE[dtype]


def test_a_row_has_the_bits_that_its_expert_alone_gives() -> None:
    parts = [packed(4, 32, "center", 40, 1200) for _ in range(3)]
    x = torch.randn(5, 1200).half()
    plan = routing.plan_rows(torch.tensor([[2], [0], [2], [1], [0]]), 3)
    got = experts.expert_matmul(x, stacked([alone(part) for part in parts]), plan, gather=True)
    for place, row in enumerate(plan.order.tolist()):
        out = torch.empty(1, 40).half()
        grouped.grouped_matmul(x[row : row + 1], parts[[2, 0, 2, 1, 0][row]], None, out)
        assert torch.equal(got[place], out[0])


def test_more_experts_of_a_row_than_there_are_is_an_error() -> None:
    with pytest.raises(ValueError, match="top_k is 7"):
        routing.route_experts(torch.zeros(1, 6), 7, softmax_before=True, renormalize=True)


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    assert got.shape == want.shape
    return ((got.double() - want).square().mean() / want.square().mean()).item()

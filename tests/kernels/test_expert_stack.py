"""Stacks of experts' weights: what is put in comes out, together or apart."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantd.kernels import ops
from quantd.kernels.experts import StackedExperts
from quantd.kernels.grouped import GroupedCodes
from quantd.kernels.grouped_linear import gpu_weight
from quantd.kernels.triton.grouped_layout import PackedPart, pack_part

CPU = torch.device("cpu")


def dense(rows: int = 8, dtype: torch.dtype = torch.float32) -> ops.LinearWeight:
    weight = torch.randn(rows, 48).to(dtype)
    return ops.LinearWeight(weight, (rows, 48), dtype, "torch", weight.nbytes)


def packed(
    bits: int = 5, group: int = 16, *, rows: int = 24, wide: bool = False, order: bool = False
) -> ops.GroupedWeight:
    codes = torch.randint(0, 1 << bits, (rows, 48), dtype=torch.uint8)
    scale = torch.rand(rows, -(-48 // group))
    scale = scale if wide else scale.half().float()
    g = GroupedCodes(codes, bits, group, scale, -scale)
    columns = torch.randperm(48) if order else None
    part = pack_part([g], rows, 48, order=columns, per_row=False, device=CPU)
    return gpu_weight((part,), (rows, 48), False, False)


KINDS = {
    "dense": dense,
    "dense of another dtype": lambda: dense(dtype=torch.float16),
    "dense of another shape": lambda: dense(9),
    "5 bits": packed,
    "5 bits, fp32 scales": lambda: packed(wide=True),
    "4 bits": lambda: packed(4),
    "5 bits of other groups": lambda: packed(5, 48),
    "5 bits, act-order": lambda: packed(order=True),
    "on a CPU": lambda: ops.pack_linear(torch.randn(8, 48)),
}
ALIKE = {"5 bits": "5 bits, fp32 scales"}


def plain(weight: ops.Weight) -> torch.Tensor:
    if isinstance(weight, ops.GroupedWeight):
        return ops.unpack_grouped(weight)
    return ops.unpack_linear(weight).clone()


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_what_is_put_in_comes_out(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 5))
    few = data.draw(st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=2))
    kinds = [data.draw(st.sampled_from(few)) for _ in range(count)]
    weights = [KINDS[kind]() for kind in kinds]
    stack = ops.ExpertStack(count)
    for i in data.draw(st.permutations(range(count))):
        stack.put(i, weights[i])
    x = torch.randn(3, 48)
    for i, weight in enumerate(weights):
        assert torch.equal(stack.unpack(i), plain(weight))
        if kinds[i] in ("dense", "on a CPU"):
            assert torch.equal(stack.linear(i, x), ops.linear(x, weight, None))  # type: ignore[arg-type]
    alike = len({ALIKE.get(kind, kind) for kind in kinds}) == 1
    together = stack.together()
    assert (together is not None) == (alike and kinds[0] != "on a CPU")
    if together is not None:
        held = together.part
        tensor = held.low if isinstance(held, PackedPart) else held.data
        assert tensor.shape[0] == together.count == count
        assert together.rows == weights[0].shape[0]


def test_memory_of_its_own() -> None:
    """Neither the weight that was put in nor, when all stand apart, the stack is kept."""
    stack, first = ops.ExpertStack(2), dense()
    stack.put(0, first)
    kept = first.data.clone()
    first.data.zero_()
    assert torch.equal(stack.unpack(0), kept)
    stack.leave_out()
    alone = stack.weight(0)
    assert isinstance(alone, ops.LinearWeight)
    assert alone.data.untyped_storage().nbytes() == alone.nbytes
    assert torch.equal(stack.unpack(0), kept)
    stack.unpack(0).zero_()
    assert torch.equal(stack.unpack(0), kept)


def test_bytes_of_one_are_its_own() -> None:
    stack = ops.ExpertStack(3)
    weights = [packed(), packed(wide=True), packed()]
    for i, weight in enumerate(weights):
        stack.put(i, weight)
    # Scales of all are fp32, since those of one must be.
    assert {stack.weight(i).nbytes for i in range(3)} == {weights[1].nbytes}


def test_from_many_threads() -> None:
    weights = [packed(wide=i % 3 == 0) for i in range(64)]
    stack = ops.ExpertStack(len(weights))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(stack.put, range(len(weights)), weights))
    assert stack.together() is not None
    for i, weight in enumerate(weights):
        assert torch.equal(stack.unpack(i), plain(weight))


@pytest.mark.parametrize("first", [True, False])
def test_one_that_has_no_weight(first: bool) -> None:
    stack, weight = ops.ExpertStack(2), packed()
    if first:
        stack.leave_out()
    stack.put(1, weight)
    if not first:
        stack.leave_out()
    assert stack.together() is None
    assert torch.equal(stack.unpack(1), plain(weight))


def test_weights_of_several_parts_stand_apart() -> None:
    one, other = packed(), packed(4)
    both = gpu_weight((*one.gpu_parts, *other.gpu_parts), (48, 48), False, False)
    stack = ops.ExpertStack(2)
    stack.put(0, both)
    stack.put(1, dataclasses.replace(both))
    assert stack.together() is None
    assert torch.equal(stack.unpack(1), plain(both))


def test_a_feed_forward_is_of_two_stacks_that_hold_together() -> None:
    stacks = [ops.ExpertStack(2) for _ in range(2)]
    for stack in stacks:
        for i in range(2):
            stack.put(i, packed())
    assert isinstance(ops.stacked_experts(stacks[0], stacks[1], "silu"), StackedExperts)
    stacks[1].leave_out()
    assert ops.stacked_experts(stacks[0], stacks[1], "silu") is None


def test_there_are_none_on_a_cpu() -> None:
    assert ops.new_expert_stack(4, CPU, torch.float32) is None


def test_there_are_none_where_the_check_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    from quantd.kernels import checked, experts

    operations: dict[str, checked.Operation] = {"expert_feed_forward": lambda: None}
    monkeypatch.setattr(experts, "checked", lambda *_: checked.Checked(operations, ()))
    gpu = torch.device("cuda:0")
    assert ops.new_expert_stack(4, gpu, torch.float16) is not None
    assert ops.new_expert_stack(4, gpu, torch.float64) is None
    operations.clear()
    assert ops.new_expert_stack(4, gpu, torch.float16) is None

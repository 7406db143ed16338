"""The check at start: every operation once, on small tensors, beside its specification.

For a kernel that a driver, a compiler or a GPU that nobody has tried gets wrong: it is left out by
name, and everything else goes on. What a kernel promises beyond this is in `tests/triton`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch

from quantd.kernels import compare, reference
from quantd.kernels.batch import BLOCK_SIZE
from quantd.kernels.checked import Checked
from quantd.kernels.compare import Case, problem_of
from quantd.kernels.cpu.linear import LinearWeight
from quantd.kernels.experts import OPERATION, ExpertStack, StackedWeight
from quantd.kernels.grouped import GroupedCodes
from quantd.kernels.grouped_linear import gpu_weight
from quantd.kernels.sampling import SamplingRows
from quantd.kernels.triton import (
    activation,
    attention,
    copies,
    experts,
    linear,
    norms,
    rotary,
    routing,
    sampling,
)


def check(
    device: torch.device, dtype: torch.dtype, cases: Mapping[str, Case] | None = None
) -> Checked:
    """Runs what `cases` has (None: all operations) for activations of `dtype`."""
    operations, problems = {}, []
    for name, case in (cases or CASES).items():
        problem = problem_of(case, device, dtype)
        if problem is None:
            operations[name] = case.kernel
        else:
            problems.append(f"{name} runs in plain torch, its Triton kernel {problem}")
    return Checked(operations, tuple(problems))


def _layer_norm(g: torch.Generator, dtype: torch.dtype) -> Iterable[tuple[Any, ...]]:
    weight, bias = compare.random(g, torch.float32, 2, 80)
    yield compare.random(g, dtype, 5, 80), weight, bias, 1e-5, dtype


def _rotary(g: torch.Generator, dtype: torch.dtype) -> Iterable[tuple[Any, ...]]:
    q, k = compare.random(g, dtype, 3, 4, 64), compare.random(g, dtype, 3, 2, 64)
    yield q, k, *compare.angles(g, 3)


def _copies(g: torch.Generator, dtype: torch.dtype) -> Iterable[tuple[Any, ...]]:
    yield list(compare.random(g, dtype, 2, 4, 2, BLOCK_SIZE, 16)), [(0, 1), (1, 2), (3, 0)]


def _gathered(g: torch.Generator, dtype: torch.dtype) -> Iterable[tuple[Any, ...]]:
    pools, rows = list(compare.random(g, dtype, 2, 4, 2, BLOCK_SIZE, 16)), 2 * 2 * BLOCK_SIZE * 16
    yield pools, [3, 0], compare.random(g, dtype, 3, rows)


def _scattered(g: torch.Generator, dtype: torch.dtype) -> Iterable[tuple[Any, ...]]:
    for pools, blocks, rows in _gathered(g, dtype):
        yield rows, pools, blocks


def _sampling(g: torch.Generator, dtype: torch.dtype) -> Iterable[tuple[Any, ...]]:
    """Rows with one filter each and one with all; of few tokens, whose probabilities are apart."""
    count, vocabulary = 6, 112  # a multiple of 16, as most are: Triton compiles for others apart
    off = torch.zeros(count)
    edits = torch.arange(count + 1) * 2
    mask = torch.randint(-(2**31), 2**31 - 1, (4, 4), generator=g).int() | 1
    rows = SamplingRows(
        seed=torch.arange(count) * 1_000_003 - 5,
        position=torch.arange(count) + 2**33,
        temperature=torch.tensor([0.0, 1.0, 0.7, 1.5, 0.9, 1.0]),
        top_k=torch.tensor([0, 0, 9, 0, 0, 20]).int(),
        top_p=torch.tensor([1, 1, 1, 0.6, 1, 0.9]).double(),
        min_p=torch.tensor([0, 0, 0, 0, 0.2, 0.01]).double(),
        repetition=off + 1.2,
        frequency=off + 0.3,
        presence=off + 0.1,
        mask=mask,
        mask_row=torch.tensor([1, 0, 2, 3, -1, 1]).int(),
        edit_start=edits.int(),
        edit_token=torch.arange(2 * count).int(),
        edit_bias=torch.ones(2 * count),
        edit_count=torch.arange(2 * count).remainder(3).float(),
        edit_flags=torch.arange(2 * count).remainder(2).int(),
        seen=torch.full((count, 4), -1).int(),
        seen_row=torch.tensor([3, 0, 5, -1, 1, 4]).int(),
        seen_new=torch.tensor([1, 1, 0, 0, 1, 1]).int(),
        seen_start=edits.int(),
        seen_token=(torch.arange(2 * count) * 7).int(),
    )
    yield compare.random(g, dtype, count, vocabulary) * 4, rows


def _routing(g: torch.Generator, dtype: torch.dtype) -> Iterable[tuple[Any, ...]]:
    yield torch.randint(-9, 9, (5, 12), generator=g).to(dtype), 3


def _grouped(g: torch.Generator, dtype: torch.dtype) -> Iterable[tuple[Any, ...]]:
    """One plane and two, one row and more, a span and a part of one; int8 by int8. Not every number
    of bits: each is compiled when a machine first starts."""
    columns = 1100
    for bits, group, rows, per_row in ((4, 48, 1, False), (5, 32, 17, False), (8, 1104, 3, True)):
        codes = torch.randint(0, 1 << bits, (40, columns), generator=g, dtype=torch.uint8)
        scale = torch.rand(40, -(-columns // group), generator=g) / (1 << bits)
        yield compare.random(g, dtype, rows, columns), codes, bits, group, scale, per_row


def _grouped_linear(
    x: torch.Tensor, codes: torch.Tensor, bits: int, group: int, scale: torch.Tensor, per_row: bool
) -> torch.Tensor:
    chunks = [GroupedCodes(codes, bits, group, scale, center=1 << (bits - 1))]
    part = linear.pack(chunks, *codes.shape, order=None, per_row=per_row, device=x.device)
    return linear.multiply(x, [part], None)


def _grouped_reference(
    x: torch.Tensor, codes: torch.Tensor, bits: int, group: int, scale: torch.Tensor, per_row: bool
) -> torch.Tensor:
    chunk = GroupedCodes(codes, bits, group, scale, center=1 << (bits - 1))
    read = x.float()
    if per_row:
        rounded, steps = reference.quantize_rows(x, None)
        read = rounded.float() * steps
    return (read @ reference.dequantize_grouped(chunk).T).to(x.dtype)


def _experts(g: torch.Generator, dtype: torch.dtype) -> Iterable[tuple[Any, ...]]:
    """Few rows and more, so that tiles of both sizes are met; an expert that no row goes to."""
    for rows, bits in ((5, 0), (50, 0), (5, 4)):
        shapes = ((4, 2 * 48, 80), (4, 80, 48))
        codes = [torch.randint(0, 16, s, generator=g, dtype=torch.uint8) for s in shapes]
        ids = torch.tensor([[2, 0], [3, 2]]).repeat(rows, 1)[:rows]
        yield (
            compare.random(g, dtype, rows, 80),
            torch.rand(rows, 2, generator=g),
            ids,
            *codes,
            bits,
        )


_EXPERT_SCALE = 2.0**-6


def _expert_feed_forward(
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    bits: int,
) -> torch.Tensor:
    """bits: 0 for dense weights."""

    def stacked(codes: torch.Tensor) -> StackedWeight:
        stack, (count, rows, columns) = ExpertStack(len(codes)), codes.shape
        scale = torch.full((rows, -(-columns // 32)), _EXPERT_SCALE, device=x.device)
        for i in range(count):
            chunk = GroupedCodes(codes[i], 4, 32, scale, center=8)
            if bits:
                part = linear.pack(
                    [chunk], rows, columns, order=None, per_row=False, device=x.device
                )
                stack.put(i, gpu_weight((part,), (rows, columns), False, False))
            else:
                plain = reference.dequantize_grouped(chunk).to(x.dtype)
                shape = rows, columns
                stack.put(i, LinearWeight(plain, shape, x.dtype, "torch", plain.nbytes))
        whole = stack.together()
        assert whole is not None
        return whole

    return experts.feed_forward(
        x, weights, ids, stacked(gate_up), stacked(down), lambda y: reference.act_and_mul(y, "silu")
    )


def _expert_reference(
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    bits: int,
) -> torch.Tensor:
    first, second = ((codes.float() - 8) * _EXPERT_SCALE for codes in (gate_up, down))

    def expert(i: int, rows: torch.Tensor) -> torch.Tensor:
        return reference.act_and_mul(rows @ first[i].T, "silu") @ second[i].T

    each = [partial(expert, i) for i in range(len(first))]
    return reference.expert_feed_forward(x.float(), weights, ids, each).to(x.dtype)


CASES: Mapping[str, Case] = {
    "rms_norm": Case(norms.rms_norm, reference.rms_norm, compare.norm),
    "add_rms_norm": Case(norms.add_rms_norm, reference.add_rms_norm, compare.added_norm),
    "layer_norm": Case(activation.layer_norm, reference.layer_norm, _layer_norm),
    "act_and_mul": Case(activation.act_and_mul, reference.act_and_mul, compare.activation),
    "activate": Case(activation.activate, reference.activate, compare.activation),
    "rotary": Case(rotary.rotary, reference.rotary, _rotary),
    "write_kv": Case(rotary.write_kv, reference.write_kv, compare.written),
    "rotary_write_kv": Case(
        rotary.rotary_write_kv, reference.rotary_write_kv, compare.rotated_and_written
    ),
    "paged_attention": Case(
        attention.paged_attention, reference.paged_attention, compare.attention
    ),
    "copy_blocks": Case(copies.copy_blocks, reference.copy_blocks, _copies),
    "gather_blocks": Case(copies.gather_blocks, reference.gather_blocks, _gathered),
    "scatter_blocks": Case(copies.scatter_blocks, reference.scatter_blocks, _scattered),
    "route_experts": Case(
        routing.route_experts,
        reference.route_experts,
        _routing,
        {"softmax_before": True, "renormalize": True},
    ),
    "grouped_linear": Case(_grouped_linear, _grouped_reference, _grouped),
    OPERATION: Case(_expert_feed_forward, _expert_reference, _experts),
    "sample_rows": Case(sampling.sample_rows, reference.sample_rows, _sampling),
}

"""The check at start: every operation once, on small tensors, beside its specification.

For a kernel that a driver, a compiler or a GPU that nobody has tried gets wrong: it is left out by
name, and everything else goes on. What a kernel promises beyond this is in `tests/triton`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from quantd.kernels import reference
from quantd.kernels.batch import BLOCK_SIZE, AttentionBatch
from quantd.kernels.checked import Checked, Operation
from quantd.kernels.grouped import GroupedCodes
from quantd.kernels.sampling import SamplingRows
from quantd.kernels.triton import (
    activation,
    attention,
    copies,
    linear,
    norms,
    rotary,
    routing,
    sampling,
)

_MAX_NMSE = {torch.float32: 1e-9, torch.float16: 2.0**-19, torch.bfloat16: 2.0**-13}
"""Mean squared error over mean square. More than tests allow: both sides are rounded here, and what
this is to find is wrong by far."""

Make = Callable[[torch.Generator, torch.dtype], Iterable[tuple[Any, ...]]]


class _Case(NamedTuple):
    kernel: Operation
    specification: Operation
    arguments: Make
    """Makes the arguments of one call or more, on the CPU."""
    keywords: Mapping[str, Any] = MappingProxyType({})


def check(
    device: torch.device, dtype: torch.dtype, cases: Mapping[str, _Case] | None = None
) -> Checked:
    """Runs what `cases` has (None: all operations) for activations of `dtype`."""
    operations, problems = {}, []
    for name, case in (cases or CASES).items():
        problem = _problem(case, device, dtype)
        if problem is None:
            operations[name] = case.kernel
        else:
            problems.append(f"{name} runs in plain torch, its Triton kernel {problem}")
    return Checked(operations, tuple(problems))


def _problem(case: _Case, device: torch.device, dtype: torch.dtype) -> str | None:
    generator = torch.Generator().manual_seed(0)
    for arguments in case.arguments(generator, dtype):
        got, want = ([_moved(a, device) for a in arguments] for _ in range(2))
        expected = (case.specification(*want, **case.keywords), *want)
        try:
            outcome = (case.kernel(*got, **case.keywords), *got)
            error = max(map(_error, _tensors(outcome), _tensors(expected)), default=0.0)
        except Exception as problem:  # whatever a compiler and a driver can raise
            first = str(problem).strip().partition("\n")[0]
            return f"fails: {type(problem).__name__}: {first}"
        if not error <= _MAX_NMSE[dtype]:
            return f"is wrong: the squared error is {error:.1e} of the square"
    return None


def _moved(value: Any, device: torch.device) -> Any:
    """A copy of an argument, on the device."""
    if isinstance(value, torch.Tensor):
        return value.to(device, copy=True)
    if isinstance(value, AttentionBatch | SamplingRows):
        fields = {name: _moved(getattr(value, name), device) for name in value.__slots__}
        return type(value)(**fields)
    if isinstance(value, list):
        return [_moved(item, device) for item in value]
    return value


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)


def _error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Infinite where whole numbers differ, or one side has a NaN and the other has none."""
    if got.shape != want.shape or got.dtype != want.dtype:
        return float("inf")
    if not got.is_floating_point():
        return 0.0 if torch.equal(got, want) else float("inf")
    wide, right = got.double(), want.double()
    absent = right.isnan()
    if not torch.equal(wide.isnan(), absent):
        return float("inf")
    wide, right = wide[~absent], right[~absent]
    if torch.equal(wide, right):
        return 0.0
    return float((wide - right).square().mean() / right.square().mean())


def _random(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator).to(dtype)


def _norm(g: torch.Generator, dtype: torch.dtype) -> Iterable[tuple[Any, ...]]:
    weight = _random(g, torch.float32, 80)
    yield _random(g, dtype, 5, 80), weight, 1e-5


def _added_norm(g: torch.Generator, dtype: torch.dtype) -> Iterable[tuple[Any, ...]]:
    weight = _random(g, torch.float32, 80)
    yield _random(g, dtype, 5, 80), _random(g, dtype, 5, 80), weight, 1e-5


def _layer_norm(g: torch.Generator, dtype: torch.dtype) -> Iterable[tuple[Any, ...]]:
    weight, bias = _random(g, torch.float32, 2, 80)
    yield _random(g, dtype, 5, 80), weight, bias, 1e-5, dtype


def _activation(g: torch.Generator, dtype: torch.dtype) -> Iterable[tuple[Any, ...]]:
    for kind in ("silu", "gelu", "gelu_tanh"):
        yield _random(g, dtype, 5, 80), kind


def _rotary(g: torch.Generator, dtype: torch.dtype) -> Iterable[tuple[Any, ...]]:
    q, k = _random(g, dtype, 3, 4, 64), _random(g, dtype, 3, 2, 64)
    yield q, k, *_angles(g, 3)


def _angles(g: torch.Generator, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    angle = torch.rand(rows, 24, generator=g) * 6
    return angle.cos(), angle.sin()


def _written(g: torch.Generator, dtype: torch.dtype) -> Iterable[tuple[Any, ...]]:
    """k, v, pools, slots, and a scale for pools in e4m3."""
    for pool_dtype, scale in ((dtype, (1.0, 1.0)), (torch.float8_e4m3fn, (0.5, 2.0))):
        pools = torch.zeros(2, 4, 2, BLOCK_SIZE, 64).to(pool_dtype)
        slots = torch.randperm(4 * BLOCK_SIZE, generator=g)[:3]
        k, v = _random(g, dtype, 2, 3, 2, 64)
        yield k, v, pools[0], pools[1], slots, scale


def _rotated_and_written(g: torch.Generator, dtype: torch.dtype) -> Iterable[tuple[Any, ...]]:
    for k, v, *rest in _written(g, dtype):
        yield _random(g, dtype, 3, 4, 64), k, v, *_angles(g, 3), *rest


def _attention(g: torch.Generator, dtype: torch.dtype) -> Iterable[tuple[Any, ...]]:
    """A prompt, a decode over several spans, the end of a prompt; then with all extras."""
    lengths = [(20, 20), (1, 2 * attention.SPAN + 5), (3, 40)]
    starts = torch.tensor([0, *(rows for rows, _ in lengths)]).cumsum(0).int()
    widest = -(-max(keys for _, keys in lengths) // BLOCK_SIZE)
    table = torch.randperm(3 * widest, generator=g).int().view(3, widest)
    rows = torch.zeros(int(starts[-1]), dtype=torch.int64)
    batch = AttentionBatch(starts, torch.tensor([n for _, n in lengths]).int(), table, rows, rows)
    q = _random(g, dtype, len(rows), 4, 64)
    pools = _random(g, torch.float32, 2, 3 * widest, 2, BLOCK_SIZE, 64)
    k, v = pools.to(dtype)
    yield q, k, v, batch, 0.125, None, None, None
    sinks = _random(g, torch.float32, 4)
    yield q, k, v, batch, 0.125, attention.SPAN + 9, 20.0, sinks
    k, v = pools.to(torch.float8_e4m3fn)
    yield q, k, v, batch, 0.125, None, None, None, (0.5, 2.0)


def _copies(g: torch.Generator, dtype: torch.dtype) -> Iterable[tuple[Any, ...]]:
    yield list(_random(g, dtype, 2, 4, 2, BLOCK_SIZE, 16)), [(0, 1), (1, 2), (3, 0)]


def _sampling(g: torch.Generator, dtype: torch.dtype) -> Iterable[tuple[Any, ...]]:
    """Rows with one filter each and one with all; of few tokens, whose probabilities are apart."""
    count, vocabulary = 6, 100
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
        edit_flags=torch.arange(2 * count).remainder(4).int(),
    )
    yield _random(g, dtype, count, vocabulary) * 4, rows


def _routing(g: torch.Generator, dtype: torch.dtype) -> Iterable[tuple[Any, ...]]:
    yield torch.randint(-9, 9, (5, 12), generator=g).to(dtype), 3


def _grouped(g: torch.Generator, dtype: torch.dtype) -> Iterable[tuple[Any, ...]]:
    """One plane and two, one row and more, a span and a part of one; int8 by int8. Not every number
    of bits: each is compiled when a machine first starts."""
    columns = 1100
    for bits, group, rows, per_row in ((4, 48, 1, False), (5, 32, 17, False), (8, 1104, 3, True)):
        codes = torch.randint(0, 1 << bits, (40, columns), generator=g, dtype=torch.uint8)
        scale = torch.rand(40, -(-columns // group), generator=g) / (1 << bits)
        yield _random(g, dtype, rows, columns), codes, bits, group, scale, per_row


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


CASES: Mapping[str, _Case] = {
    "rms_norm": _Case(norms.rms_norm, reference.rms_norm, _norm),
    "add_rms_norm": _Case(norms.add_rms_norm, reference.add_rms_norm, _added_norm),
    "layer_norm": _Case(activation.layer_norm, reference.layer_norm, _layer_norm),
    "act_and_mul": _Case(activation.act_and_mul, reference.act_and_mul, _activation),
    "activate": _Case(activation.activate, reference.activate, _activation),
    "rotary": _Case(rotary.rotary, reference.rotary, _rotary),
    "write_kv": _Case(rotary.write_kv, reference.write_kv, _written),
    "rotary_write_kv": _Case(
        rotary.rotary_write_kv, reference.rotary_write_kv, _rotated_and_written
    ),
    "paged_attention": _Case(attention.paged_attention, reference.paged_attention, _attention),
    "copy_blocks": _Case(copies.copy_blocks, reference.copy_blocks, _copies),
    "route_experts": _Case(
        routing.route_experts,
        reference.route_experts,
        _routing,
        {"softmax_before": True, "renormalize": True},
    ),
    "grouped_linear": _Case(_grouped_linear, _grouped_reference, _grouped),
    "sample_rows": _Case(sampling.sample_rows, reference.sample_rows, _sampling),
}

"""A kernel beside its specification, on small tensors: whether a machine gets it right.

For what a driver, a compiler or a processor that nobody has tried gets wrong; what a kernel
promises beyond that is in the tests. The makers of arguments serve every kind of kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from quantd.kernels.batch import BLOCK_SIZE, AttentionBatch
from quantd.kernels.checked import Operation
from quantd.kernels.sampling import SamplingRows

SPAN = 512
"""Keys that attention takes in one go, at most; more of them than that are tried."""

MAX_NMSE = {torch.float32: 1e-9, torch.float16: 2.0**-19, torch.bfloat16: 2.0**-13}
"""Mean squared error over mean square. More than tests allow: both sides are rounded here, and what
this is to find is wrong by far."""

_CPU = torch.device("cpu")

Make = Callable[[torch.Generator, torch.dtype], Iterable[tuple[Any, ...]]]


class Case(NamedTuple):
    kernel: Operation
    specification: Operation
    arguments: Make
    """Makes the arguments of one call or more, on the CPU."""
    keywords: Mapping[str, Any] = MappingProxyType({})
    ceiling: float | None = None
    """None: of MAX_NMSE."""


def problem_of(case: Case, device: torch.device, dtype: torch.dtype) -> str | None:
    """What is wrong with the kernel of `case` on a device, or None. The specification runs on the
    CPU, where tests have tried it: a device may lack an operation of torch's for some dtype."""
    generator = torch.Generator().manual_seed(0)
    for arguments in case.arguments(generator, dtype):
        want, got = ([_moved(a, place) for a in arguments] for place in (_CPU, device))
        expected = (case.specification(*want, **case.keywords), *want)
        try:
            outcome = (case.kernel(*got, **case.keywords), *got)
            error = max(map(_error, _tensors(outcome), _tensors(expected)), default=0.0)
        except Exception as problem:  # whatever a compiler and a driver can raise
            first = str(problem).strip().partition("\n")[0]
            return f"fails: {type(problem).__name__}: {first}"
        if not error <= (case.ceiling or MAX_NMSE[dtype]):
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
    got = got.to(want.device)
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


def random(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator).to(dtype)


def norm(g: torch.Generator, dtype: torch.dtype) -> Iterable[tuple[Any, ...]]:
    weight = random(g, torch.float32, 80)
    yield random(g, dtype, 5, 80), weight, 1e-5


def added_norm(g: torch.Generator, dtype: torch.dtype) -> Iterable[tuple[Any, ...]]:
    weight = random(g, torch.float32, 80)
    yield random(g, dtype, 5, 80), random(g, dtype, 5, 80), weight, 1e-5


def activation(g: torch.Generator, dtype: torch.dtype) -> Iterable[tuple[Any, ...]]:
    for kind in ("silu", "gelu", "gelu_tanh"):
        yield random(g, dtype, 5, 80), kind


def angles(g: torch.Generator, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    angle = torch.rand(rows, 24, generator=g) * 6
    return angle.cos(), angle.sin()


def written(g: torch.Generator, dtype: torch.dtype) -> Iterable[tuple[Any, ...]]:
    """k, v, pools, slots, and a scale for pools in e4m3."""
    for pool_dtype, scale in ((dtype, (1.0, 1.0)), (torch.float8_e4m3fn, (0.5, 2.0))):
        pools = torch.zeros(2, 4, 2, BLOCK_SIZE, 64).to(pool_dtype)
        slots = torch.randperm(4 * BLOCK_SIZE, generator=g)[:3]
        k, v = random(g, dtype, 2, 3, 2, 64)
        yield k, v, pools[0], pools[1], slots, scale


def rotated_and_written(g: torch.Generator, dtype: torch.dtype) -> Iterable[tuple[Any, ...]]:
    for k, v, *rest in written(g, dtype):
        yield random(g, dtype, 3, 4, 64), k, v, *angles(g, 3), *rest


def attention(g: torch.Generator, dtype: torch.dtype) -> Iterable[tuple[Any, ...]]:
    """A prompt, a decode over several spans, the end of a prompt; then with all extras."""
    lengths = [(20, 20), (1, 2 * SPAN + 5), (3, 40)]
    starts = torch.tensor([0, *(rows for rows, _ in lengths)]).cumsum(0).int()
    widest = -(-max(keys for _, keys in lengths) // BLOCK_SIZE)
    table = torch.randperm(3 * widest, generator=g).int().view(3, widest)
    rows = torch.zeros(int(starts[-1]), dtype=torch.int64)
    batch = AttentionBatch(starts, torch.tensor([n for _, n in lengths]).int(), table, rows, rows)
    q = random(g, dtype, len(rows), 4, 64)
    pools = random(g, torch.float32, 2, 3 * widest, 2, BLOCK_SIZE, 64)
    k, v = pools.to(dtype)
    yield q, k, v, batch, 0.125, None, None, None
    sinks = random(g, torch.float32, 4)
    yield q, k, v, batch, 0.125, SPAN + 9, 20.0, sinks
    k, v = pools.to(torch.float8_e4m3fn)
    yield q, k, v, batch, 0.125, None, None, None, (0.5, 2.0)

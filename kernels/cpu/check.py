"""The operations on a CPU, each once beside its specification: for `quantd check`.

Nothing is left out because of it, unlike on a GPU: the library is tested at each level of the
instruction set. It tells a user that the processor or the build is at fault.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch

from quantd.kernels import compare, ops, reference
from quantd.kernels.compare import Case, problem_of
from quantd.kernels.cpu.linear import linear_route
from quantd.kernels.cpu.native import DTYPES
from quantd.kernels.cpu.threads import OnCallerThread

_ROUNDED = 2.0**-12
"""For products that round activations to eight bits: ten times what that costs."""


class Outcome(NamedTuple):
    operation: str
    dtype: str
    """Of the activations."""
    route: str
    problem: str | None
    """None: it is right."""


def check(cases: Mapping[str, Case] | None = None) -> Iterator[Outcome]:
    """Every operation in every dtype, by the route that a model takes in this process."""
    for dtype in DTYPES:
        for name, case in (cases or CASES).items():
            # Small tensors: with more threads, they mostly wait for each other.
            with OnCallerThread():
                problem = problem_of(case, torch.device("cpu"), dtype)
            yield Outcome(name, str(dtype).removeprefix("torch."), _route(name, dtype), problem)


def _route(name: str, dtype: torch.dtype) -> str:
    if name == "linear":
        return linear_route(torch.device("cpu"), dtype)
    # The library has all other operations or none.
    return ops.grouped_route()


def _linear(g: torch.Generator, dtype: torch.dtype) -> Iterable[tuple[Any, ...]]:
    """A row and several; columns that fill no panel and no span."""
    for rows in (1, 19):
        yield compare.random(g, dtype, rows, 301), compare.random(g, dtype, 77, 301)


def _multiply(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return ops.linear(x, ops.pack_linear(weight), None)


def _product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return (x.double() @ weight.double().T).to(x.dtype)


def _grouped(g: torch.Generator, dtype: torch.dtype) -> Iterable[tuple[Any, ...]]:
    """Each way in which codes lie: 2, 4, 5, 6 and 8 bits."""
    for bits, group in ((2, 16), (4, 32), (5, 32), (6, 16), (8, 32)):
        codes = torch.randint(0, 1 << bits, (40, 320), generator=g, dtype=torch.uint8)
        scale = torch.rand(40, 320 // group, generator=g) / (1 << bits)
        chunk = ops.GroupedCodes(codes, bits, group, scale, center=1 << (bits - 1))
        for rows in (1, 17):
            yield compare.random(g, dtype, rows, 320), chunk


def _multiply_grouped(x: torch.Tensor, chunk: ops.GroupedCodes, *, exact: bool) -> torch.Tensor:
    shape = (chunk.codes.shape[0], chunk.codes.shape[1])
    return ops.grouped_linear(x, ops.pack_grouped([chunk], shape, exact=exact), None)


def _grouped_product(x: torch.Tensor, chunk: ops.GroupedCodes) -> torch.Tensor:
    return _product(x, reference.dequantize_grouped(chunk))


CASES: Mapping[str, Case] = {
    "rms_norm": Case(ops.rms_norm, reference.rms_norm, compare.norm),
    "add_rms_norm": Case(ops.add_rms_norm, reference.add_rms_norm, compare.added_norm),
    "act_and_mul": Case(ops.act_and_mul, reference.act_and_mul, compare.activation),
    "rotary_write_kv": Case(
        ops.rotary_write_kv, reference.rotary_write_kv, compare.rotated_and_written
    ),
    "paged_attention": Case(ops.paged_attention, reference.paged_attention, compare.attention),
    "linear": Case(_multiply, _product, _linear),
    "grouped_linear": Case(
        partial(_multiply_grouped, exact=False), _grouped_product, _grouped, ceiling=_ROUNDED
    ),
    "grouped_linear exact": Case(
        partial(_multiply_grouped, exact=True), _grouped_product, _grouped
    ),
}

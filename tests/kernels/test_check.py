"""The check of the processor's operations: what is right passes, what is wrong is named."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from quantd.kernels import ops
from quantd.kernels.cpu import check
from quantd.kernels.cpu.library import LEVELS, NEEDS


def test_every_operation_is_right_by_its_route() -> None:
    found = list(check.check())
    assert [one for one in found if one.problem is not None] == []
    assert len(found) == 3 * len(check.CASES)
    routes = {(one.operation, one.dtype): one.route for one in found}
    assert routes["linear", "bfloat16"] == ops.identity()[2]
    assert routes["grouped_linear", "float32"] == ops.grouped_route()


def _scaled(*arguments: Any, **keywords: Any) -> torch.Tensor:
    return ops.paged_attention(*arguments, **keywords) * 1.01


def _not_written(*_: Any) -> None:
    """Rotates and writes nothing."""


def _other_scale(x: torch.Tensor, chunk: ops.GroupedCodes) -> torch.Tensor:
    return check.CASES["grouped_linear"].kernel(x, chunk) * 1.05


@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        ("paged_attention", _scaled),
        ("rotary_write_kv", _not_written),
        ("grouped_linear", _other_scale),
        ("linear", lambda x, weight: ops.linear(x, ops.pack_linear(weight), None) * float("nan")),
    ],
)
def test_a_wrong_operation_is_named(name: str, kernel: Any) -> None:
    cases = {name: check.CASES[name]._replace(kernel=kernel), "rms_norm": check.CASES["rms_norm"]}
    found = list(check.check(cases))
    wrong = {one.operation for one in found if one.problem is not None}
    assert wrong == {name}
    assert all("is wrong" in one.problem for one in found if one.problem is not None)


def test_an_operation_that_raises_is_named() -> None:
    def broken(*_: Any) -> torch.Tensor:
        raise RuntimeError("no such instruction\nat line 3")

    found = check.check({"rms_norm": check.CASES["rms_norm"]._replace(kernel=broken)})
    assert {one.problem for one in found} == {"fails: RuntimeError: no such instruction"}


def test_the_number_of_threads_stays() -> None:
    before = ops.num_threads()
    list(check.check({"rms_norm": check.CASES["rms_norm"]}))
    assert ops.num_threads() == before


def test_each_level_beyond_the_first_says_what_it_needs() -> None:
    assert tuple(NEEDS) == LEVELS[1:]

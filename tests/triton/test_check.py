"""The check at start: what is right is used, what is wrong is named, the rest goes on."""

import logging
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from quantd.kernels import checked as checked_module
from quantd.kernels import ops, reference
from quantd.kernels.batch import BLOCK_SIZE
from quantd.kernels.triton import attention, check, norms, rotary, sampling

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def unchecked() -> Iterator[None]:
    checked_module.checked.cache_clear()
    yield
    checked_module.checked.cache_clear()


def test_every_operation_passes(dtype: torch.dtype) -> None:
    found = check.check(CPU, dtype)
    assert found.problems == ()
    assert set(found.operations) == set(check.CASES)


def test_every_kernel_that_has_a_door_is_checked() -> None:
    for name, case in check.CASES.items():
        # A packed weight is no tensor, and an expert is a function: the cases make them.
        if name not in ("grouped_linear", "expert_feed_forward"):
            assert getattr(reference, name) is case.specification
        assert callable(getattr(ops, name))


def _only(name: str, kernel: Any) -> dict[str, Any]:
    return {
        name: check.CASES[name]._replace(kernel=kernel),
        "rms_norm": check.CASES["rms_norm"],
    }


def _too_much(*arguments: Any) -> torch.Tensor:
    return attention.paged_attention(*arguments) * 1.01


def _next_slot(k: Any, v: Any, k_pool: Any, v_pool: Any, slots: Any, *scale: Any) -> None:
    rotary.write_kv(k, v, k_pool, v_pool, (slots + 1) % (4 * BLOCK_SIZE), *scale)


def _no_residual(x: Any, residual: Any, *rest: Any) -> torch.Tensor:
    return norms.add_rms_norm(x, residual.clone(), *rest)


def _next_token(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, highest = sampling.sample_rows(*arguments)
    return tokens + 1, highest


def _nan(*arguments: Any) -> torch.Tensor:
    return attention.paged_attention(*arguments) * float("nan")


def _other_shape(*arguments: Any) -> torch.Tensor:
    return attention.paged_attention(*arguments)[:1]


@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        ("paged_attention", _too_much),
        ("paged_attention", _nan),
        ("paged_attention", _other_shape),
        ("write_kv", _next_slot),
        ("add_rms_norm", _no_residual),
        ("sample_rows", _next_token),
        ("copy_blocks", lambda *_: None),
        ("gather_blocks", lambda *_: None),
        ("scatter_blocks", lambda *_: None),
    ],
)
def test_a_wrong_kernel_is_left_out_by_name(name: str, kernel: Any) -> None:
    found = check.check(CPU, torch.float32, _only(name, kernel))
    assert set(found.operations) == {"rms_norm"}
    (problem,) = found.problems
    assert problem.startswith(f"{name} runs in plain torch, its Triton kernel is wrong")


def test_a_kernel_that_does_not_compile_is_left_out_by_name() -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("no such instruction\nat line 3")

    found = check.check(CPU, torch.float16, _only("rotary", broken))
    assert set(found.operations) == {"rms_norm"}
    assert found.problems == (
        "rotary runs in plain torch, its Triton kernel fails: RuntimeError: no such instruction",
    )


def test_it_is_done_once_and_warns_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(check, "CASES", _only("copy_blocks", lambda *_: None))
    with caplog.at_level(logging.WARNING):
        first = checked_module.checked(CPU, torch.float16)
        assert checked_module.checked(CPU, torch.float16) is first
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "copy_blocks runs in plain torch" in caplog.text


def test_without_triton_all_is_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "quantd.kernels.triton.check", None)
    found = checked_module.checked(CPU, torch.float16)
    assert found.operations == {}
    assert "no Triton kernels" in found.problems[0]

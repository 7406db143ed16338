"""Which devices take grouped weights, and what they are told otherwise. No GPU is touched."""

from __future__ import annotations

import pytest
import torch

from quantd.kernels import checked, grouped_linear, ops
from quantd.kernels.cpu import grouped as cpu

CUDA = torch.device("cuda", 0)


def test_a_gpu_has_a_route_of_its_own() -> None:
    pytest.importorskip("triton")
    assert ops.grouped_route(CUDA) == "triton"
    assert ops.grouped_route(torch.device("cpu")) == ops.grouped_route() == cpu.grouped_route()


def test_what_the_check_at_start_left_out_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def say(*problems: str, **operations: object) -> str | None:
        found = checked.Checked(operations, problems)  # type: ignore[arg-type]
        monkeypatch.setattr(grouped_linear, "checked", lambda device, dtype: found)
        return ops.grouped_problem(CUDA, torch.float16)

    assert ops.grouped_problem(torch.device("cpu"), torch.float32) is None
    assert say(grouped_linear=print) is None
    assert say("rotary is wrong", "grouped_linear is wrong", rms_norm=print) == (
        "grouped weights on a GPU: grouped_linear is wrong"
    )
    assert say("no Triton kernels") == "grouped weights on a GPU: no Triton kernels"
    said = ops.grouped_problem(torch.device("xpu"), torch.float32)
    assert said == "grouped weights have no kernel for xpu yet"

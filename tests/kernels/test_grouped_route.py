"""Which devices take grouped weights, and what they are told otherwise. No GPU is touched."""

from __future__ import annotations

import pytest
import torch

from quantd.kernels import gpu, grouped_linear, ops
from quantd.kernels.cpu import grouped as cpu

CUDA = torch.device("cuda", 0)


def test_a_gpu_has_a_route_of_its_own() -> None:
    pytest.importorskip("triton")
    assert ops.grouped_route(CUDA) == "triton"
    assert ops.grouped_route(torch.device("cpu")) == ops.grouped_route() == cpu.grouped_route()


def test_a_gpu_without_triton_and_other_devices_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert ops.grouped_problem(torch.device("cpu")) is None
    monkeypatch.setattr(grouped_linear, "triton_problem", lambda: None)
    assert ops.grouped_problem(CUDA) is None
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(grouped_linear, "triton_problem", gpu.triton_problem.__wrapped__)
    said = ops.grouped_problem(CUDA)
    assert said == "grouped weights on a GPU: the package triton is not installed"
    assert ops.grouped_problem(torch.device("xpu")) == "grouped weights have no kernel for xpu yet"

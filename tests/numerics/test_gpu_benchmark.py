"""`benchmarks/gpu.py` on a CPU: that no line of it fails for a silly reason where a GPU is lent."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import gpu as benchmark
import gpu_clock
import gpu_kernels
import gpu_linear
import gpu_model
import pytest
import torch

CPU = torch.device("cpu")
RATES = {"copy": 1e9, "bf16": 1e12, "fp16": 1e12, "int8": 1e12}


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(tmp_path: Path, *arguments: str) -> Any:
    path = tmp_path / "results.json"
    assert (
        benchmark.main(["--device", "cpu", "--repeats", "3", "--json", str(path), *arguments]) == 0
    )
    return json.loads(path.read_text())


def test_kernels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = run(tmp_path, "--only", "kernels")
    assert data["left_out"] == [] and data["models"] == []
    assert set(data["rates"]) == {"copy", "bf16", "fp16", "int8"}
    assert {"command", "date", "torch", "triton", "device", "nvidia_smi"} <= set(data["versions"])
    for row in data["kernels"]:
        assert "error" not in row and "skipped" not in row, row
        assert row["us"] > 0 and row["fraction"] > 0 and row["bytes"] > 0, row
        assert all(isinstance(took, float) for took in row["peers"].values()), row
    groups = {row["group"] for row in data["kernels"]}
    want = "decode attention,prefill attention,rows,blocks,linear,experts,sampling"
    assert groups == set(want.split(","))
    names = {
        row["name"].partition(", 64")[0] for row in data["kernels"] if row["group"] == "linear"
    }
    assert names == set(gpu_linear.FORMATS)
    printed = capsys.readouterr().out
    assert "(aim 60%)" in printed and "(aim 75%)" in printed and "torch int4 mm" in printed


def test_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = run(tmp_path, "--only", "models", "--layers", "1")
    assert [row["name"] for row in data["models"]] == list(gpu_model.formats(1))
    for row in data["models"]:
        assert "error" not in row, row
        assert [step["streams"] for step in row["decode"]] == [1, 3]
        assert all(step["tokens_per_second"] > 0 for step in (*row["decode"], *row["prefill"])), row
        assert all(step["device_ms"] > 0 for step in row["decode"]), row
    quantizers = [row["quantizers"] for row in data["models"]]
    assert quantizers == [
        {"dense": 5},
        {"gptq": 4, "dense": 1},
        {"gguf": 5},
        {"int8": 5},
        {"w8a8": 5},
    ]
    assert "of the memory's limit" in capsys.readouterr().out


def test_what_the_time_does_not_suffice_for_is_left_out(tmp_path: Path) -> None:
    data = run(tmp_path, "--quick", "--seconds", "0")
    assert not data["kernels"] and not data["models"]
    assert "model bf16" in data["left_out"] and len(data["left_out"]) > 20


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert benchmark.main([]) == 1
    assert "no CUDA device" in capsys.readouterr().err


def every_case(quick: bool) -> list[gpu_clock.Case]:
    modules = (gpu_kernels, gpu_linear)
    return [case for module in modules for case in module.cases(CPU, quick, False)]


def test_what_runs_on_a_gpu() -> None:
    """The list alone: sizes that a CPU would take hours for."""
    full, quick = every_case(False), every_case(True)
    names = [f"{case.group}: {case.name}" for case in full]
    assert len(set(names)) == len(names) and len(quick) < len(full) / 2
    for count in (1, 8, 64, 256):
        for context in (512, 4096, 32768):
            for pool in ("bf16", "e4m3"):
                assert f"decode attention: {count} x {context}, {pool} pools" in names
    assert max(case.needs for case in full) < 40 << 30


def test_a_row_that_fails_is_a_row() -> None:
    clock = gpu_clock.Clock(CPU, 3)

    def fail() -> Any:
        raise RuntimeError("out of luck\nand more")

    row = gpu_clock.measure(gpu_clock.Case("g", "n", fail), clock, RATES)
    assert row == {"group": "g", "name": "n", "error": "RuntimeError: out of luck"}
    assert "out of luck" in benchmark.kernel_line(row)
    made = gpu_clock.Made(lambda: None, 10, peers={"p": fail})
    row = gpu_clock.measure(gpu_clock.Case("g", "n", lambda: made), clock, RATES)
    assert row["peers"] == {"p": "RuntimeError: out of luck"}
    assert "p: RuntimeError" in benchmark.kernel_line(row)
    row = gpu_clock.measure(gpu_clock.Case("g", "n", fail, needs=1 << 63), clock, RATES)
    assert "needs" in row["skipped"] and "needs" in benchmark.kernel_line(row)
    bad = gpu_model.Format({"quant_method": "gptq", "bits": 7})
    row = gpu_model.measure_model("m", bad, gpu_model.tiny_plan(), CPU, RATES)
    assert "bits of" in row["error"] and "bits of" in benchmark.model_lines(row)[0]


def test_a_plan_that_fails_ends_its_model_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("not now")

    monkeypatch.setattr(gpu_model, "decode", fail)
    row = gpu_model.measure_model("m", gpu_model.Format(), gpu_model.tiny_plan(), CPU, RATES)
    assert row["decode"] == [{"name": "1", "error": "RuntimeError: not now"}]
    assert any("not now" in line for line in benchmark.model_lines(row))


class _Event:
    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, other: _Event) -> float:
        return (other.at - self.at) * 1e3


def test_timing_by_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is said to a GPU, to one that is none."""
    said: list[str] = []
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: said.append("sleep"), raising=False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: said.append("synchronize"))
    monkeypatch.setattr(gpu_clock, "_BUDGET", 1e9)  # else a run that was held up is repeated less
    clock = gpu_clock.Clock(CPU, 5)
    clock._is_gpu, clock._flushed = True, torch.ones(4, dtype=torch.int8)
    took = clock.time(lambda: said.append("run"))
    assert 0 <= took.seconds < 600 and 0 <= took.launch <= took.seconds
    assert said == [
        "run",
        "synchronize",
        "run",
        "synchronize",
        *["sleep", "run"] * 5,
        "synchronize",
    ]
    assert not clock._flushed.any()
    clock.release()
    assert not clock._flushed.numel()


def test_memory_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (3 << 30, 8 << 30))
    cuda = SimpleNamespace(type="cuda")
    assert gpu_clock._free(cuda) == 3 << 30  # type: ignore[arg-type]
    assert gpu_model._used(cuda) == 5 << 30  # type: ignore[arg-type]


def test_versions_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(name="a GPU", total_memory=8 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    said = SimpleNamespace(stdout="570.1, 1980 MHz\n")
    monkeypatch.setattr(benchmark.subprocess, "run", lambda *a, **k: said)
    found = benchmark.versions(SimpleNamespace(type="cuda"))
    assert found["device"] == "a GPU" and found["capability"] == [9, 0]
    assert found["nvidia_smi"] == "570.1, 1980 MHz"


def test_peers_that_are_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls as these packages document them, to stand-ins."""
    calls: list[Any] = []

    class Wrapper:
        def __init__(self, workspace: torch.Tensor, layout: str) -> None:
            assert layout == "HND"

        def plan(self, *arguments: Any, **more: Any) -> None:
            indptr, indices, last = arguments[:3]
            assert indptr.tolist() == [0, 3, 6] and len(indices) == 6 and last.tolist() == [8, 8]

        def run(self, q: torch.Tensor, pools: tuple[torch.Tensor, torch.Tensor]) -> None:
            calls.append(pools)

    modules = {
        "flashinfer": {"BatchDecodeWithPagedKVCacheWrapper": Wrapper},
        "flash_attn": {"flash_attn_func": lambda q, k, v, causal: calls.append(k.shape)},
    }
    for name, content in modules.items():
        module = ModuleType(name)
        vars(module).update(content, __spec__=SimpleNamespace(name=name))
        monkeypatch.setitem(sys.modules, name, module)
    decode = gpu_kernels._decode(2, 40, torch.bfloat16, CPU).make()
    decode.peers["flashinfer"]()
    prefill = gpu_kernels._prefill("p", [(20, 20)], CPU).make()
    prefill.peers["flash-attn, not paged"]()
    assert len(calls) == 2 and calls[1] == (1, 20, 8, 128)


def test_parts_of_a_line() -> None:
    assert gpu_model.union([]) == 0
    assert gpu_model.union([(0, 2), (1, 3), (5, 6), (5.5, 5.7)]) == 4
    mix = gpu_model.q4_k_m(32)
    assert list(mix.values()).count("Q6_K") == 33  # of 32 layers 16, twice, and the output layer
    assert isinstance(benchmark.parse(["--quick"]), argparse.Namespace)

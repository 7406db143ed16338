"""The torch half of `quantd check`, with GPUs that are not here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from quantd.daemon.worker.check_gpu import check_gpus
from quantd.kernels.bench.device import DeviceRates, measure_device
from quantd.kernels.bench.roofline import read_rates
from quantd.kernels.checked import Checked

GIB = 1 << 30


class FakeCuda:
    """Two cards, as torch tells of them; `error`: what its start raises."""

    def __init__(self, error: Exception | None = None, **details: Any) -> None:
        self.current = -1
        self._error, self._details = error, details

    def init(self) -> None:
        if self._error is not None:
            raise self._error

    def device_count(self) -> int:
        return 2

    def set_device(self, device: Any) -> None:
        self.current = device

    def get_device_properties(self, device: Any) -> Any:
        basics = {"name": f"card {device}", "major": 9, "minor": 0, "multi_processor_count": 132}
        return SimpleNamespace(**basics, **self._details)

    def mem_get_info(self, device: Any) -> tuple[int, int]:
        return (70 - device) * GIB, 80 * GIB

    def synchronize(self) -> None: ...


def run(device: str, cuda: FakeCuda, quick: bool = False) -> dict[str, Any]:
    """Triton gets `rotary` wrong on card 1; every operation is done on the current card."""

    def check(here: torch.device, dtype: torch.dtype) -> Checked:
        assert here == torch.device("cuda", cuda.current)
        wrong = ("rotary is wrong",) if here.index == 1 else ()
        return Checked({"rms_norm": len}, wrong)

    def measure(here: torch.device, synchronize: Any) -> DeviceRates:
        assert here.index == cuda.current
        return DeviceRates(3e12, 5e10, 4e10, 6e14)

    return check_gpus(device, quick, cuda, lambda progress: None, check, measure)


def test_all_gpus_are_told_of() -> None:
    report = run("auto", FakeCuda(memory_clock_rate=2619000, memory_bus_width=5120))
    assert report["gpu_problem"] is None
    first, second = report["gpus"]
    assert (first["name"], first["capability"], first["multiprocessors"]) == ("card 0", "9.0", 132)
    assert (second["memory_total"], second["memory_free"]) == (80 * GIB, 69 * GIB)
    assert first["memory_peak_gb_s"] == pytest.approx(3352.3, abs=0.1)
    assert first["rates"]["copy_gb_s"] == 3000 and first["rates"]["to_host_gb_s"] == 40
    assert [one["dtype"] for one in first["kernels"]] == ["bfloat16", "float16"]
    assert first["kernels"][0]["problems"] == []
    assert second["kernels"][1] == {
        "dtype": "float16",
        "right": ["rms_norm"],
        "problems": ["rotary is wrong"],
    }
    json.dumps(report, allow_nan=False)


def test_one_gpu_in_haste() -> None:
    cuda = FakeCuda(pci_domain_id=0, pci_bus_id=0x41, pci_device_id=0)
    (gpu,) = run("cuda:1", cuda, quick=True)["gpus"]
    assert (gpu["index"], gpu["address"], gpu["rates"]) == (1, "0000:41:00.0", None)
    assert gpu["memory_peak_gb_s"] is None
    assert [one["dtype"] for one in gpu["kernels"]] == ["bfloat16"]


def test_cuda_without_a_number_is_the_first() -> None:
    assert [gpu["index"] for gpu in run("cuda", FakeCuda())["gpus"]] == [0]


@pytest.mark.parametrize(
    ("device", "error", "problem"),
    [
        ("cpu", None, None),
        ("cuda:2", None, "device = 'cuda:2', but torch sees 2 GPUs"),
        ("auto", RuntimeError("the driver is too old\nmore"), "the driver is too old"),
        ("auto", AssertionError("Torch not compiled with CUDA enabled"), None),
        ("cuda:0", AssertionError("Torch not compiled with CUDA enabled"), "Torch not compiled"),
    ],
)
def test_why_there_is_none(device: str, error: Exception | None, problem: str | None) -> None:
    report = run(device, FakeCuda(error))
    assert report["gpus"] == []
    if problem is None:
        assert report["gpu_problem"] is None
    else:
        assert report["gpu_problem"].startswith(problem)


def test_a_devices_clock_waits_for_what_was_queued() -> None:
    waits = 0

    def synchronize() -> None:
        nonlocal waits
        waits += 1

    rates = measure_device(torch.device("cpu"), synchronize, megabytes=1, side=64)
    assert min(rates.copy, rates.from_host, rates.to_host, rates.multiply) > 0
    # Four rates, each of at least five calls and one to warm up.
    assert waits >= 4 * 6


def test_reading_with_one_thread_and_with_two_leaves_torchs_threads() -> None:
    before = torch.get_num_threads()
    assert all(rate > 0 for rate in read_rates((1, 2)))
    assert torch.get_num_threads() == before


def ask(folder: Path) -> subprocess.CompletedProcess[str]:
    """The tool with the modules of `folder` before all others."""
    return subprocess.run(
        [sys.executable, "-P", "-m", "quantd.daemon.worker.check"],
        input='{"device": "auto", "threads": 1, "quick": true}',
        env=os.environ | {"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=540,
    )


def test_a_torch_that_cannot_be_imported_is_said(tmp_path: Path) -> None:
    text = "raise OSError('libcudart.so.13: cannot open\\n shared object file')"
    (tmp_path / "torch.py").write_text(text)
    done = ask(tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    *_, last = map(json.loads, done.stdout.splitlines())
    problem = "OSError: libcudart.so.13: cannot open shared object file"
    assert last == {"result": {"torch": {"problem": problem}}}

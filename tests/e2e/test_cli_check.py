"""`quantd check` as a user types it: it agrees with this machine."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from quantd.kernels.cpu.library import Library, open_library

COMMAND = [sys.executable, "-m", "quantd.daemon", "check", "--device", "cpu"]


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *flags], capture_output=True, text=True, timeout=540)


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    done = run("--json")
    assert done.stderr == ""
    found: dict[str, Any] = json.loads(done.stdout)
    broken = [one for one in found["findings"] if one["severity"] == "broken"]
    assert (done.returncode, broken) == (0, [])
    return found


def test_versions(report: dict[str, Any]) -> None:
    assert report["versions"]["python"] == platform.python_version()
    assert report["kernel"].endswith(platform.release())
    assert report["torch"]["problem"] is None
    assert report["torch"]["version"].startswith(report["versions"]["torch"].partition("+")[0])


def test_processor_and_memory(report: dict[str, Any]) -> None:
    cpu, memory = report["processor"], report["memory"]
    assert cpu["architecture"] == platform.machine()
    assert cpu["allowed"] == len(os.sched_getaffinity(0))
    assert 1 <= report["threads"] <= cpu["cores"] <= cpu["allowed"] <= cpu["logical"]
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert memory["total"] == pages
    assert 0 < memory["available"] <= memory["total"]
    state = Path(report["disk"]["path"])
    assert state.name == "quantd" and report["disk"]["free"] > 0


def test_the_library_and_its_kernels(report: dict[str, Any]) -> None:
    library = open_library()
    if isinstance(library, Library):
        assert report["library"]["level"] == library.best_level
        assert report["library"]["problem"] is None
    else:
        assert report["library"]["problem"] == library
        assert "library" in {one["code"] for one in report["findings"]}
    assert {one["dtype"] for one in report["kernels"]} == {"float32", "bfloat16", "float16"}
    assert all(one["problem"] is None for one in report["kernels"])


def test_what_was_measured(report: dict[str, Any]) -> None:
    rates = report["rates"]
    # Two terabytes a second would be a cache or a clock that has not run.
    assert all(0.1 < rates[name] < 2000 for name in ("read_one_gb_s", "read_gb_s"))
    assert rates["float_gop_s"] > 0 and rates["bfloat16_gop_s"] > 0


def test_in_haste_for_people() -> None:
    done = run("--quick")
    assert (done.returncode, done.stderr) == (0, "")
    names = [line.split("  ")[0] for line in done.stdout.splitlines() if line[:1].strip()]
    assert names[:6] == ["quantd", "torch", "system", "processor", "instructions", "memory"]
    assert "memory read" not in names
    assert len(done.stdout.splitlines()) <= 40

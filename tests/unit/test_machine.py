"""What is read of machines that are not here."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import machines
import pytest
from machines import GIB, write

from quantd.daemon.machine import cgroup, graphics, nvidia
from quantd.daemon.machine.memory import read_disk, read_memory
from quantd.daemon.machine.processor import flags, physical_cores, read_processor


def test_a_workstation(tmp_path: Path) -> None:
    machines.workstation(tmp_path)
    found = read_processor(tmp_path, set(range(16)), "x86_64")
    assert found.model == "AMD Ryzen 7 7700X 8-Core Processor"
    assert (found.logical, found.allowed, found.cores, found.quota) == (16, 16, 8, None)
    assert (found.governors, found.frequency_driver) == (("performance",), "acpi-cpufreq")
    assert (found.virtual, found.throttled, found.load) == (False, 0, 0.05)
    memory = read_memory(tmp_path)
    assert (memory.total, memory.available, memory.limit) == (64 * GIB, 48 * GIB, None)
    assert (memory.swap_total, memory.huge_pages, memory.nodes) == (0, "madvise", 1)
    (card,) = graphics.read_cards(tmp_path)
    assert (card.vendor, card.name, card.driver) == ("NVIDIA", "NVIDIA GeForce RTX 4090", "nvidia")
    assert card.link == graphics.Link(16, 16, 2.5, 16.0)
    assert graphics.nvidia_driver(tmp_path) == "570.133.07"
    assert graphics.amd_driver(tmp_path) is None


@pytest.mark.parametrize(
    ("allowed", "cores"), [({0, 8}, 1), ({0, 1}, 2), ({3, 11, 4}, 2), (set(range(16)), 8)]
)
def test_threads_of_a_core_are_one(tmp_path: Path, allowed: set[int], cores: int) -> None:
    machines.workstation(tmp_path)
    assert physical_cores(tmp_path, allowed) == cores
    assert read_processor(tmp_path, allowed).cores == cores


def test_a_container_has_what_its_cgroup_allows(tmp_path: Path) -> None:
    machines.container(tmp_path)
    found = read_processor(tmp_path, {0, 1})
    assert (found.cores, found.quota, found.virtual, found.governors) == (2, 0.5, True, ())
    memory = read_memory(tmp_path)
    # One of two GiB is used, and half of that would be given up.
    assert (memory.total, memory.limit, memory.available) == (32 * GIB, 2 * GIB, 3 * GIB // 2)
    assert "avx2" in flags(tmp_path) and "avx512f" not in flags(tmp_path)


def test_the_tightest_cgroup_counts(tmp_path: Path) -> None:
    write(tmp_path, {"proc/self/cgroup": "1:name=systemd:/x\n0::/a.slice/b.service"})
    top = "sys/fs/cgroup"
    write(tmp_path, {f"{top}/cpu.max": "max 100000", f"{top}/a.slice/cpu.max": "150000 100000"})
    write(tmp_path, {f"{top}/a.slice/b.service/cpu.max": "400000 100000"})
    write(tmp_path, {f"{top}/a.slice/memory.max": "4096"})
    write(tmp_path, {f"{top}/a.slice/b.service/memory.max": "max"})
    folders = cgroup.folders(tmp_path)
    assert [folder.name for folder in folders] == ["b.service", "a.slice", "cgroup"]
    assert cgroup.cpu_quota(folders) == 1.5
    assert cgroup.memory_limit(folders) == 4096


def test_a_laptop(tmp_path: Path) -> None:
    machines.laptop(tmp_path)
    memory = read_memory(tmp_path)
    assert (memory.swap_total, memory.swap_used, memory.huge_pages) == (4 * GIB, GIB, "never")
    (card,) = graphics.read_cards(tmp_path)
    assert (card.vendor, card.driver, card.link) == ("AMD", "amdgpu", None)
    assert (card.memory_total, card.memory_used) == (GIB // 2, GIB // 4)
    assert graphics.amd_driver(tmp_path) == "in the kernel"
    nodes = graphics.read_nodes({"AMD"}, tmp_path, lambda path: path.name != "kfd")
    found = {Path(node.path).name: node.usable for node in nodes}
    assert found == {"renderD128": True, "kfd": False}


def test_who_owns_a_device_file(tmp_path: Path) -> None:
    machines.workstation(tmp_path)
    (tmp_path / "dev/nvidia0").chmod(0o660)
    nodes = {Path(node.path).name: node for node in graphics.read_nodes({"NVIDIA"}, tmp_path)}
    assert set(nodes) == {"nvidia0", "nvidiactl", "nvidia-uvm"}
    owner = nodes["nvidia0"].owner
    assert owner.endswith(" 0660") and owner.count(":") == 1
    assert nodes["nvidia0"].usable is os.access(tmp_path / "dev/nvidia0", os.R_OK | os.W_OK)


def test_the_proprietary_module_says_its_version_otherwise(tmp_path: Path) -> None:
    line = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.14  Thu Feb 22 01:44:30 UTC 2024"
    write(tmp_path, {"proc/driver/nvidia/version": line})
    assert graphics.nvidia_driver(tmp_path) == "550.54.14"


def test_a_folder_that_shows_nothing_is_no_error(tmp_path: Path) -> None:
    found = read_processor(tmp_path, {0, 1}, "riscv64")
    assert (found.model, found.cores, found.logical, found.load) == ("unknown", 2, 2, None)
    assert graphics.read_cards(tmp_path) == [] and graphics.read_nodes({"AMD"}, tmp_path) == []
    with pytest.raises(OSError, match="meminfo has no MemTotal"):
        read_memory(tmp_path)


def test_a_disk_is_that_of_the_nearest_folder(tmp_path: Path) -> None:
    disk = read_disk(tmp_path / "not" / "yet")
    assert disk is not None and disk.path == str(tmp_path / "not" / "yet")
    assert 0 <= disk.free <= disk.total


# --- nvidia-smi ------------------------------------------------------------------------------


def test_what_nvidia_smi_says() -> None:
    found = nvidia.query(lambda: machines.NVIDIA_SMI)
    assert (found.driver, found.cuda, found.problem) == ("570.133.07", "12.8", None)
    (gpu,) = found.gpus
    assert (gpu.address, gpu.memory_total) == ("0000:01:00.0", 24564 << 20)
    assert gpu.slowed == ("hw slowdown", "hw thermal slowdown")
    assert (gpu.temperature, gpu.clock, gpu.max_clock) == (91, 915, 3105)
    assert (gpu.power, gpu.power_limit, gpu.default_power_limit) == (298.11, 300.0, 450.0)
    users = [(process.pid, process.bytes) for process in gpu.processes]
    assert users == [(4711, 8400 << 20), (900, None)]


def test_older_names_of_the_same() -> None:
    old = machines.NVIDIA_SMI.replace("clocks_event_reason", "clocks_throttle_reason")
    old = old.replace("gpu_power_readings", "power_readings")
    old = old.replace("current_power_limit", "power_limit")
    assert nvidia.query(lambda: old) == nvidia.query(lambda: machines.NVIDIA_SMI)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (FileNotFoundError(), "not installed"),
        (subprocess.TimeoutExpired("nvidia-smi", 20), "not answered for 20 s"),
        (subprocess.CalledProcessError(9, "x", "NVML: mismatch\n"), "status 9.*NVML: mismatch"),
        (PermissionError("denied"), "denied"),
    ],
)
def test_a_tool_that_fails_says_why(error: Exception, words: str) -> None:
    def run() -> str:
        raise error

    found = nvidia.query(run)
    assert found.gpus == () and found.problem is not None
    assert re.search(words, found.problem)


def test_what_is_no_xml_is_a_problem() -> None:
    assert "nvidia-smi" in (nvidia.query(lambda: "Failed to initialize NVML").problem or "")

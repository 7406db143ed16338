"""What `quantd check` makes of machines that are not here."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import machines
import pytest
from machines import GIB, write

from quantd.daemon.cli import check, child, main
from quantd.daemon.cli.check.facts import Facts, as_json, gather, service_sees_gpus
from quantd.daemon.cli.check.findings import Finding, find
from quantd.daemon.cli.check.view import show
from quantd.daemon.machine import nvidia


def tool(**changes: Any) -> dict[str, Any]:
    """What the tool says where all is well."""
    kernel = {"operation": "linear", "dtype": "float32", "route": "native", "problem": None}
    library = {"file": "/x/_native.so", "problem": None, "level": "avx512bf16", "better": []}
    rates = {
        "read_one_gb_s": 21.0,
        "read_gb_s": 60.0,
        "float_gop_s": 900.0,
        "int8_gop_s": 3500.0,
        "bfloat16_gop_s": 1200.0,
    }
    said = {
        "torch": {"problem": None, "version": "2.13.0+cu130", "cuda": "13.0", "hip": None},
        "threads": 8,
        "library": library,
        "notes": [],
        "kernels": [kernel],
        "rates": rates,
        "gpus": [],
        "gpu_problem": None,
    }
    return said | changes


def gpu(**changes: Any) -> dict[str, Any]:
    said = {
        "index": 0,
        "name": "NVIDIA GeForce RTX 4090",
        "capability": "8.9",
        "address": "0000:01:00.0",
        "multiprocessors": 128,
        "memory_total": 24 * GIB,
        "memory_free": 15 * GIB,
        "memory_peak_gb_s": 1008.0,
        "kernels": [{"dtype": "bfloat16", "right": ["rms_norm", "rotary"], "problems": []}],
        "rates": {
            "copy_gb_s": 900.0,
            "from_host_gb_s": 25.0,
            "to_host_gb_s": 26.0,
            "bfloat16_gop_s": 160e3,
        },
    }
    return said | changes


CPU_BUILD = {"problem": None, "version": "2.13.0+cpu", "cuda": None, "hip": None}


def facts(
    root: Path,
    make: Callable[[Path], None],
    said: dict[str, Any],
    device: str = "auto",
    smi: str | None = None,
) -> Facts:
    make(root)
    quiet = machines.NVIDIA_SMI.replace(">Active<", ">Not Active<").replace("450.00", "300.00")
    quiet = quiet[: quiet.index("<processes>")] + "</gpu></nvidia_smi_log>"
    found = gather(device, root, lambda: said, root, lambda: nvidia.parse(smi or quiet))
    # The affinity is this process's, whatever the folder says.
    about = replace(found.processor, allowed=found.processor.logical, architecture="x86_64")
    return replace(found, processor=about)


def codes(found: list[Finding]) -> list[tuple[str, str]]:
    return [(finding.severity, finding.code) for finding in found]


def about(found: list[Finding], code: str) -> Finding:
    (finding,) = [finding for finding in found if finding.code == code]
    return finding


def test_a_machine_on_which_all_is_well(tmp_path: Path) -> None:
    found = facts(tmp_path, machines.workstation, tool(gpus=[gpu()]))
    assert codes(find(found)) == []
    text = "\n".join(show(found, find(found)))
    assert "AMD Ryzen 7 7700X 8-Core Processor (x86_64)" in text
    assert "570.133.07" in text and "for CUDA 13.0" in text
    assert (
        "GPU 0         NVIDIA GeForce RTX 4090, capability 8.9, 24.0 GiB (9.0 GiB in use)" in text
    )
    assert "PCIe x16 of x16, 16 GT/s" in text
    assert "900 GB/s; of 1008 that the memory carries" in text
    assert "25.0 GB/s from pinned memory, 26.0 back; of 32.0 on the link" in text
    assert "160.0 TOP/s in a bf16 product; seen" in text
    assert "2 of 2 right on GPU 0 in bfloat16 (Triton)" in text
    assert "21.0 GB/s with one thread, 60.0 with 8; seen" in text
    assert "Nothing is broken" in text
    assert len(text.splitlines()) <= 24


def test_a_container(tmp_path: Path) -> None:
    lacks = {"level": "avx512", "lacks": ["avx512f", "avx512bw"]}
    library = {"file": "/x/_native.so", "problem": None, "level": "avx2", "better": [lacks]}
    rates = tool()["rates"] | {"read_one_gb_s": 6.0, "read_gb_s": 6.1}
    found = find(facts(tmp_path, machines.container, tool(threads=1, library=library, rates=rates)))
    assert codes(found) == [
        ("slow", "instructions"),
        ("slow", "cpu_quota"),
        ("slow", "memory_rate"),
    ]
    assert "allows 0.5 processors, less than one core" in about(found, "cpu_quota").text
    level = about(found, "instructions")
    assert "avx2: the processor does not show avx512f, avx512bw" in level.text
    assert "host's processor model" in level.todo
    assert "6.1 GB/s" in about(found, "memory_rate").text


def test_a_laptop(tmp_path: Path) -> None:
    found = find(facts(tmp_path, machines.laptop, tool(torch=CPU_BUILD)))
    assert codes(found) == [
        ("slow", "governor"),
        ("slow", "memory"),
        ("slow", "swap"),
        ("note", "torch_build"),
        ("note", "huge_pages"),
    ]
    assert "1.0 GiB are swapped out" in about(found, "swap").text
    assert "512.0 MiB of memory" in about(found, "memory").text
    assert "2.13.0+cpu is made for processors only" in about(found, "torch_build").text


@pytest.mark.parametrize("driver", ["intel_pstate", "amd-pstate-epp"])
def test_powersave_is_no_finding_where_the_driver_follows_the_load(
    tmp_path: Path, driver: str
) -> None:
    found = facts(tmp_path, machines.workstation, tool(gpus=[gpu()]))
    slow = replace(found.processor, governors=("powersave",))
    assert ("slow", "governor") in codes(find(replace(found, processor=slow)))
    fine = replace(slow, frequency_driver=driver)
    assert ("slow", "governor") not in codes(find(replace(found, processor=fine)))
    saving = replace(fine, energy_preference="power")
    assert ("slow", "governor") in codes(find(replace(found, processor=saving)))


def test_what_is_measured_on_a_busy_machine_is_not_judged(tmp_path: Path) -> None:
    rates = tool()["rates"] | {"read_one_gb_s": 5.0, "read_gb_s": 5.0}
    found = facts(tmp_path, machines.workstation, tool(gpus=[gpu()], rates=rates))
    assert about(find(found), "memory_rate").severity == "slow"
    busy = find(replace(found, processor=replace(found.processor, load=17.5)))
    assert "a load of 17.5 on 16 processors" in about(busy, "busy").text
    assert "memory_rate" not in {finding.code for finding in busy}


def test_threads_that_read_no_faster_than_one(tmp_path: Path) -> None:
    rates = tool()["rates"] | {"read_one_gb_s": 30.0, "read_gb_s": 31.0}
    found = facts(tmp_path, machines.workstation, tool(gpus=[gpu()], rates=rates))
    assert "8 threads read memory no faster than one" in about(find(found), "memory_rate").text
    few = replace(found, tool=found.tool | {"threads": 2})
    assert "memory_rate" not in {finding.code for finding in find(few)}


def test_heat_of_the_processor_nodes_of_memory_and_a_full_disk(tmp_path: Path) -> None:
    def make(root: Path) -> None:
        machines.workstation(root)
        count = "sys/devices/system/cpu/cpu3/thermal_throttle/core_throttle_count"
        write(root, {count: "12", "sys/devices/system/node/node1/cpulist": "8-15"})

    found = facts(tmp_path, make, tool(gpus=[gpu()]))
    assert found.disk is not None
    found = replace(found, disk=replace(found.disk, free=GIB))
    assert "by heat 12 times" in about(find(found), "cpu_heat").text
    assert "memory has 2 nodes" in about(find(found), "numa").text
    assert "1.0 GiB are free at" in about(find(found), "disk").text


# --- torch, the library, the kernels ---------------------------------------------------------


def test_a_torch_that_cannot_be_imported_is_broken(tmp_path: Path) -> None:
    problem = "ImportError: libcudart.so.13: cannot open shared object file"
    found = facts(tmp_path, machines.workstation, {"torch": {"problem": problem}})
    (first, *_) = find(found)
    assert (first.severity, first.code) == ("broken", "torch") and problem in first.text
    assert "cannot be imported" in "\n".join(show(found, find(found)))


def test_a_tool_that_dies_leaves_the_rest_of_the_report(tmp_path: Path) -> None:
    machines.workstation(tmp_path)

    def die() -> dict[str, Any]:
        raise child.ToolError("check was ended by SIGILL (while checking torch)")

    found = gather("auto", None, die, tmp_path, lambda: nvidia.parse(machines.NVIDIA_SMI))
    first = find(found)[0]
    assert (first.severity, first.code) == ("broken", "tool")
    assert "SIGILL (while checking torch)" in first.text
    assert "Ryzen" in "\n".join(show(found, find(found)))
    assert as_json(found)["tool_problem"] is not None


@pytest.mark.parametrize(
    ("file", "problem", "severity"),
    [
        (None, "it was not built (a C compiler was missing at installation)", "slow"),
        ("/x/_native.so", "_native.so cannot be opened: no such symbol", "broken"),
    ],
)
def test_a_library_that_is_missing_is_slow_and_one_that_does_not_open_is_broken(
    tmp_path: Path, file: str | None, problem: str, severity: str
) -> None:
    library = {"file": file, "problem": problem, "level": None, "better": []}
    notes = [f"native CPU library not used ({problem}): …", "something else"]
    said = tool(gpus=[gpu()], library=library, notes=notes)
    found = find(facts(tmp_path, machines.workstation, said))
    finding = about(found, "library")
    assert finding.severity == severity and problem in finding.text
    # Said once.
    assert about(found, "kernels").text == "something else"


def test_a_level_that_the_library_lacks_is_its_builds_fault(tmp_path: Path) -> None:
    better = [{"level": "avx512bf16", "lacks": []}]
    library = {"file": "/x/_native.so", "problem": None, "level": "avx512vnni", "better": better}
    found = find(facts(tmp_path, machines.workstation, tool(gpus=[gpu()], library=library)))
    assert "was built so" in about(found, "instructions").text
    arm = facts(tmp_path / "arm", machines.workstation, tool(gpus=[gpu()], library=library))
    arm = replace(arm, processor=replace(arm.processor, architecture="aarch64"))
    assert "no instructions of aarch64" in about(find(arm), "instructions").text


def test_a_wrong_kernel_is_broken(tmp_path: Path) -> None:
    wrong = {"operation": "linear", "dtype": "float16", "route": "native", "problem": "is wrong"}
    on_gpu = {"dtype": "bfloat16", "right": [], "problems": ["rotary runs in plain torch, …"]}
    said = tool(kernels=[wrong], gpus=[gpu(kernels=[on_gpu])])
    found = find(facts(tmp_path, machines.workstation, said))
    assert codes(found)[:2] == [("broken", "kernel")] * 2
    assert "linear in float16 (native, on the processor) is wrong" in found[0].text
    assert "move /x/_native.so away" in found[0].todo
    assert "GPU 0, bfloat16: rotary" in found[1].text


def test_a_gpu_without_triton_is_slow(tmp_path: Path) -> None:
    none = {"dtype": "bfloat16", "right": [], "problems": ["no Triton kernels (No module …): …"]}
    found = find(facts(tmp_path, machines.workstation, tool(gpus=[gpu(kernels=[none])])))
    assert about(found, "triton").severity == "slow"


# --- cards that are not used -----------------------------------------------------------------


def unused(root: Path, said: dict[str, Any], make: Callable[[Path], None]) -> Finding:
    """The first finding that is about a card."""
    names = {"nvidia_driver", "torch_build", "device_files", "gpu", "amd_driver", "intel_gpu"}
    return next(one for one in find(facts(root, make, said)) if one.code in names)


def test_a_cpu_build_beside_an_nvidia_card(tmp_path: Path) -> None:
    finding = unused(tmp_path, tool(torch=CPU_BUILD), machines.workstation)
    assert (finding.severity, finding.code) == ("slow", "torch_build")
    assert "RTX 4090 (0000:01:00.0) is not used: torch 2.13.0+cpu is made for" in finding.text
    assert "CUDA build" in finding.todo


def test_a_card_without_its_driver(tmp_path: Path) -> None:
    def make(root: Path) -> None:
        machines.workstation(root)
        (root / "proc/driver/nvidia/version").unlink()
        (root / "sys/bus/pci/devices/0000:01:00.0/driver").unlink()
        (root / "sys/bus/pci/devices/0000:01:00.0/driver").symlink_to("/x/drivers/nouveau")

    finding = unused(tmp_path, tool(torch=CPU_BUILD), make)
    assert (finding.severity, finding.code) == ("slow", "nvidia_driver")
    assert "nouveau has the card" in finding.text


def test_no_device_files(tmp_path: Path) -> None:
    def make(root: Path) -> None:
        machines.workstation(root)
        for path in (root / "dev").iterdir():
            path.unlink()

    finding = unused(tmp_path, tool(gpu_problem="No CUDA GPUs are available"), make)
    assert (finding.severity, finding.code) == ("slow", "device_files")
    assert "--gpus all" in finding.todo


def test_device_files_of_another_group(tmp_path: Path) -> None:
    found = facts(tmp_path, machines.workstation, tool(gpu_problem="No CUDA GPUs"))
    closed = [replace(node, usable=False, owner="root:video 0660") for node in found.device_files]
    finding = about(find(replace(found, device_files=closed)), "device_files")
    assert "may not open" in finding.text and "(root:video 0660)" in finding.text
    assert finding.todo == "add this user to the group video, then log in again"


def test_a_driver_that_is_too_old_is_broken(tmp_path: Path) -> None:
    problem = "The NVIDIA driver on your system is too old (found version 11040)."
    finding = unused(tmp_path, tool(gpu_problem=problem), machines.workstation)
    assert (finding.severity, finding.code) == ("broken", "gpu")
    assert problem in finding.text and "update NVIDIA's driver" in finding.todo


def test_an_intel_gpu(tmp_path: Path) -> None:
    def make(root: Path) -> None:
        machines.container(root)
        machines.card(root, "0000:00:02.0", ("0x8086", "0xa780"), "i915", None)

    finding = unused(tmp_path, tool(), make)
    assert (finding.severity, finding.code) == ("note", "intel_gpu")


def test_a_cuda_build_without_a_card_is_nothing_to_speak_of(tmp_path: Path) -> None:
    said = tool(gpu_problem="Found no NVIDIA driver on your system.", threads=2)
    found = facts(tmp_path, machines.container, said)
    assert "gpu" not in {finding.code for finding in find(found)}
    asked = find(replace(found, device="cuda:0"))
    assert about(asked, "gpu").severity == "broken"
    assert "cuda:0 cannot be used: Found no NVIDIA driver" in about(asked, "gpu").text


def test_who_asks_for_a_gpu_that_cannot_be_used_is_told_that_and_why(tmp_path: Path) -> None:
    said = tool(torch=CPU_BUILD, gpu_problem="Torch not compiled with CUDA enabled")
    found = find(facts(tmp_path, machines.workstation, said, device="cuda:0"))
    assert codes(found)[:2] == [("broken", "gpu"), ("slow", "torch_build")]


def test_who_asks_for_the_processor_is_not_told_of_cards(tmp_path: Path) -> None:
    found = facts(tmp_path, machines.workstation, tool(torch=CPU_BUILD), device="cpu")
    assert codes(find(found)) == []


# --- cards that are used ---------------------------------------------------------------------


def test_heat_limits_and_other_users(tmp_path: Path) -> None:
    said = tool(gpus=[gpu()])
    found = find(facts(tmp_path, machines.workstation, said, smi=machines.NVIDIA_SMI))
    heat = about(found, "gpu_heat")
    assert heat.severity == "slow"
    assert "to 915 of 3105 MHz: hw slowdown, hw thermal slowdown, at 91 °C" in heat.text
    assert "300 W, its default is 450 W" in about(found, "gpu_power").text
    users = about(found, "gpu_users")
    assert users.severity == "note" and "python3 (4711, 8.2 GiB)" in users.text


def test_a_card_in_a_slot_of_one_lane(tmp_path: Path) -> None:
    def make(root: Path) -> None:
        machines.workstation(root)
        folder = root / "sys/bus/pci/devices/0000:01:00.0"
        (folder / "current_link_width").write_text("1\n")

    rates = gpu()["rates"] | {"from_host_gb_s": 0.8, "copy_gb_s": 300.0}
    found = find(facts(tmp_path, make, tool(gpus=[gpu(rates=rates)])))
    assert about(found, "pcie").severity == "slow"
    assert "has 1 of its 16 PCIe lanes" in about(found, "pcie").text
    assert "0.8 GB/s with the host, of the 2 that" in about(found, "pcie_rate").text
    assert "copies 300 GB/s of its memory's 1008" in about(found, "gpu_memory_rate").text


@pytest.mark.parametrize(
    ("files", "sees"),
    [
        ({}, None),
        ({"etc/systemd/system/quantd.service": "[Service]\nPrivateDevices=yes"}, False),
        ({"usr/lib/systemd/system/quantd.service": "[Service]\nType=notify"}, True),
        (
            {
                "etc/systemd/system/quantd.service": "[Service]\nPrivateDevices=yes",
                "etc/systemd/system/quantd.service.d/gpu.conf": "[Service]\nPrivateDevices=no",
            },
            True,
        ),
    ],
)
def test_whether_the_service_sees_gpus(
    tmp_path: Path, files: dict[str, str], sees: bool | None
) -> None:
    write(tmp_path, files)
    assert service_sees_gpus(tmp_path) is sees
    found = find(facts(tmp_path, machines.workstation, tool(gpus=[gpu()])))
    assert (("slow", "service") in codes(found)) is (sees is False)


# --- the command -----------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """What the tool was asked; it says that all is well."""
    requests: list[dict[str, Any]] = []

    def run(module: str, request: dict[str, Any], follow: child.OnProgress) -> dict[str, Any]:
        assert module == "check"
        requests.append(request)
        return tool(rates=None)

    monkeypatch.setattr(child, "run", run)
    for name in ("QUANTD_CONFIG", "STATE_DIRECTORY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    return requests


def test_flags_reach_the_tool(asked: list[dict[str, Any]]) -> None:
    assert main(["check", "--quick", "--device", "cuda:1", "--threads", "3"]) == 0
    assert asked == [{"device": "cuda:1", "threads": 3, "quick": True}]


def test_a_wrong_device_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--device", "gpu"]) == 2
    assert "--device" in capsys.readouterr().err


def test_json_has_status_and_findings(
    asked: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["status"] in ("ok", "slow")
    assert {"versions", "processor", "memory", "cards", "torch", "kernels"} <= report.keys()
    assert report["versions"]["quantd"] and report["rates"] is None
    documented = (Path(__file__).parents[2] / "docs/cli.md").read_text()
    keys = {*report, *report["processor"], *report["torch"], *Finding.__slots__}
    assert {key for key in keys if f"`{key}`" not in documented} == set()


def test_a_wrong_configuration_is_one_of_the_findings(
    asked: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "bad.toml"
    file.write_text("[server]\nport = 70000\n")
    monkeypatch.setenv("QUANTD_CONFIG", str(file))
    assert main(["check", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["status"] == "broken" and report["disk"] is None
    assert report["findings"][0]["code"] == "configuration"
    assert "server.port = 70000" in report["findings"][0]["text"]


def test_the_stage_is_said_of_a_tool_that_dies(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(module: str, request: object, follow: child.OnProgress) -> dict[str, Any]:
        follow({"stage": "kernels on GPU 0"})
        raise child.ToolError("check was ended by SIGSEGV")

    monkeypatch.setattr(child, "run", run)
    with pytest.raises(child.ToolError, match=r"SIGSEGV \(while checking kernels on GPU 0\)"):
        check._ask({})

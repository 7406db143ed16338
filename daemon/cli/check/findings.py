"""What is broken or slow on a machine, and what can be done: sentences from facts.

Broken: something that should work gives errors or wrong numbers. Slow: everything works, some of it
slower than this machine could. A note changes nothing, but explains.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from quantd.daemon.cli.check.facts import Facts
from quantd.daemon.cli.screen import size
from quantd.daemon.machine.graphics import Card
from quantd.daemon.machine.nvidia import Gpu

GIB = 1 << 30
_LOW_MEMORY, _LOW_DISK, _SWAPPED = GIB, 2 * GIB, GIB // 4
_LOW_READ = 9.6
"""GB/s: half of what one channel of DDR4-2400 carries (8 bytes, 2.4e9 times a second)."""
_NO_GAIN = 1.1
"""All threads together read less than so many times what one does: the others add nothing."""
_LOW_LINK = 0.5
"""Of what a PCIe link of that width and speed carries: less was seen."""
_PER_LANE = 1 / 8
"""GB/s of a lane for each GT/s, before encoding."""
_LOW_COPY = 0.5
_SELF_GOVERNED = ("intel_pstate", "amd-pstate-epp", "amd_pstate_epp")
"""Drivers whose "powersave" is not the lowest frequency: it follows the load."""
_MANAGED = ("nouveau", "vfio-pci")

Severity = Literal["broken", "slow", "note"]
_ORDER = ("broken", "slow", "note")


@dataclass(frozen=True, slots=True)
class Finding:
    severity: Severity
    code: str
    """Stable, for programs."""
    text: str
    todo: str
    """What to do; "" where nothing can be done."""


def find(facts: Facts) -> list[Finding]:
    """What is broken first."""
    found = [finding for rule in _RULES for finding in rule(facts)]
    return sorted(found, key=lambda finding: _ORDER.index(finding.severity))


def _torch(facts: Facts) -> Iterator[Finding]:
    reinstall = "install torch again, and quantd after it"
    if facts.tool_problem is not None:
        yield Finding("broken", "tool", f"torch and the kernels: {facts.tool_problem}", reinstall)
    elif facts.tool["torch"]["problem"] is not None:
        problem = facts.tool["torch"]["problem"]
        yield Finding("broken", "torch", f"torch cannot be imported: {problem}", reinstall)


def _library(facts: Facts) -> Iterator[Finding]:
    library = facts.tool.get("library")
    if library is None:
        return
    if library["problem"] is not None:
        severity: Severity = "slow" if library["file"] is None else "broken"
        text = (
            f"the native CPU library is not used: {library['problem']}. Operations run in plain "
            "torch, and quantized weights are unpacked for every call"
        )
        todo = "install a C compiler (gcc or clang), then quantd again"
        yield Finding(severity, "library", text, todo)
        return
    for better in library["better"][:1]:
        yield _level(facts, library["level"], better["level"], better["lacks"])


def _level(facts: Facts, level: str, better: str, lacks: list[str]) -> Finding:
    """Why the library does not run at the next level."""
    if facts.processor.architecture not in ("x86_64", "AMD64"):
        text = f"the native library has no instructions of {facts.processor.architecture}: {level}"
        return Finding("slow", "instructions", text, "")
    if not lacks:
        text = f"the library runs at {level} although the processor has {better}: it was built so"
        return Finding("slow", "instructions", text, "install quantd again with a newer C compiler")
    text = f"the library runs at {level}: the processor does not show {', '.join(lacks)}"
    hidden = "a virtual machine may hide them: give it the host's processor model"
    severity: Severity = "slow" if level in ("portable", "avx2") else "note"
    return Finding(severity, "instructions", text, hidden if facts.processor.virtual else "")


def _notes(facts: Facts) -> Iterator[Finding]:
    for note in facts.tool.get("notes", ()):
        # The library's is said above, with what to do.
        if not note.startswith("native CPU library"):
            yield Finding("slow", "kernels", note, "")


def _kernels(facts: Facts) -> Iterator[Finding]:
    for outcome in facts.tool.get("kernels", ()):
        if outcome["problem"] is not None:
            text = (
                f"{outcome['operation']} in {outcome['dtype']} ({outcome['route']}, on the "
                f"processor) {outcome['problem']}"
            )
            file = facts.tool["library"]["file"]
            ours = outcome["route"] in ("native", "pairs")
            todo = f", and move {file} away until then" if ours else ""
            yield Finding("broken", "kernel", text, f"report it with this output{todo}")
    for gpu in facts.tool.get("gpus", ()):
        for dtype in gpu["kernels"]:
            for problem in dtype["problems"]:
                missing = problem.startswith("no Triton kernels")
                text = f"GPU {gpu['index']}, {dtype['dtype']}: {problem}"
                if missing:
                    todo = "install triton: pip install 'quantd[gpu]'"
                    yield Finding("slow", "triton", text, todo)
                else:
                    yield Finding("broken", "kernel", text, "report it with this output")


def _processor(facts: Facts) -> Iterator[Finding]:
    cpu = facts.processor
    if cpu.quota is not None and cpu.quota < min(cpu.cores, cpu.allowed):
        below = "less than one core" if cpu.quota < 1 else f"less than the {cpu.cores} cores"
        text = f"a cgroup allows {cpu.quota:g} processors, {below}"
        yield Finding("slow", "cpu_quota", text, "raise CPUQuota= or the container's --cpus")
    if cpu.load is not None and cpu.load > cpu.allowed:
        text = (
            f"the machine was busy before this check: a load of {cpu.load:.1f} on {cpu.allowed} "
            "processors. What was measured is what that left"
        )
        yield Finding("slow", "busy", text, "check again when it is idle, or find who it is: top")
    if "powersave" in cpu.governors and cpu.frequency_driver not in _SELF_GOVERNED:
        text = "the frequency governor is powersave: cores stay at their lowest frequency"
        yield Finding("slow", "governor", text, "as root: cpupower frequency-set -g performance")
    elif cpu.energy_preference == "power":
        text = "the processor is told to save energy (energy_performance_preference is power)"
        yield Finding("slow", "governor", text, "powerprofilesctl set performance, or tuned-adm")
    if cpu.throttled:
        text = f"a core was slowed down by heat {cpu.throttled} times since the machine started"
        yield Finding("note", "cpu_heat", text, "look at its cooling if that goes on")


def _memory(facts: Facts) -> Iterator[Finding]:
    memory = facts.memory
    if memory.available < _LOW_MEMORY:
        text = f"{size(memory.available)} of memory are available"
        yield Finding("slow", "memory", text, "end what else runs, or raise the cgroup's limit")
    if memory.swap_used > _SWAPPED:
        text = f"{size(memory.swap_used)} are swapped out: what is needed of it comes from a disk"
        yield Finding("slow", "swap", text, "end what else runs, or serve smaller models")
    if memory.huge_pages == "never":
        text = "transparent huge pages are set to never: weights lie in small ones, some % slower"
        todo = "as root: echo madvise > /sys/kernel/mm/transparent_hugepage/enabled"
        yield Finding("note", "huge_pages", text, todo)
    if memory.nodes > 1:
        text = f"memory has {memory.nodes} nodes (NUMA): a core reads that of another one slower"
        todo = "give each model the cores of one node: numactl, or NUMAPolicy= in the unit"
        yield Finding("note", "numa", text, todo)
    if facts.disk is not None and facts.disk.free < _LOW_DISK:
        text = f"{size(facts.disk.free)} are free at {facts.disk.path}"
        yield Finding("slow", "disk", text, "make room, or set store.path and disk_kv_path")


def _rates(facts: Facts) -> Iterator[Finding]:
    rates, cpu = facts.tool.get("rates"), facts.processor
    if rates is None or (cpu.load is not None and cpu.load > cpu.allowed):
        return
    one, every, threads = rates["read_one_gb_s"], rates["read_gb_s"], facts.tool["threads"]
    if every < _LOW_READ:
        text = (
            f"memory is read with {every:.1f} GB/s; one channel of DDR4-2400 carries 19.2. Tokens "
            "of a lone request cannot come faster than the weights are read"
        )
        yield Finding("slow", "memory_rate", text, "fill all memory channels; look for neighbours")
    elif threads >= 4 and every < _NO_GAIN * one:
        text = f"{threads} threads read memory no faster than one: {every:.1f} and {one:.1f} GB/s"
        yield Finding("note", "memory_rate", text, "fill all memory channels; look for neighbours")


def _cards(facts: Facts) -> Iterator[Finding]:
    """Cards that quantd does not use, and why. Nothing of who asked for a processor only."""
    if facts.device == "cpu" or facts.tool.get("gpus"):
        return
    torch = facts.tool.get("torch", {})
    problem = facts.tool.get("gpu_problem")
    if problem is not None and facts.device != "auto":
        yield Finding("broken", "gpu", f"{facts.device} cannot be used: {problem}", "")
        problem = None
    nvidia = [card for card in facts.cards if card.vendor == "NVIDIA"]
    amd = [card for card in facts.cards if card.vendor == "AMD"]
    if nvidia:
        yield from _unused_nvidia(facts, nvidia[0], torch, problem)
    elif amd:
        yield from _unused_amd(facts, amd[0], torch, problem)
    elif problem is not None and facts.drivers["NVIDIA"] is not None:
        # Without a driver: the usual build of torch says so on every machine that has no GPU.
        yield Finding("broken", "gpu", f"no GPU can be used: {problem}", _update(problem))
    if "Intel" in facts.vendors():
        text = "an Intel GPU is here and not used: quantd has no kernels for it"
        yield Finding("note", "intel_gpu", text, "")


def _unused_nvidia(
    facts: Facts, card: Card, torch: dict[str, str | None], problem: str | None
) -> Iterator[Finding]:
    name = f"{card.name or 'an NVIDIA GPU'} ({card.address}) is not used: "
    if facts.drivers["NVIDIA"] is None:
        who = f" ({card.driver} has the card)" if card.driver in _MANAGED else ""
        text = f"{name}NVIDIA's driver is not loaded{who}"
        yield Finding("slow", "nvidia_driver", text, "install NVIDIA's driver, then restart")
    elif torch.get("version") is not None and torch.get("cuda") is None:
        text = f"{name}torch {torch['version']} is made for {_made_for(torch)}"
        yield Finding("slow", "torch_build", text, "install a CUDA build of torch, see pytorch.org")
    elif not facts.device_files:
        text = f"{name}there are no /dev/nvidia* files"
        todo = "nvidia-modprobe -u -c 0; in a container: --gpus all"
        yield Finding("slow", "device_files", text, todo)
    elif any(not node.usable for node in facts.device_files):
        yield _closed(name, facts)
    elif problem is not None:
        yield Finding("broken", "gpu", f"{name}{problem}", _update(problem))


def _unused_amd(
    facts: Facts, card: Card, torch: dict[str, str | None], problem: str | None
) -> Iterator[Finding]:
    name = f"{card.name or 'an AMD GPU'} ({card.address}) is not used: "
    if facts.drivers["AMD"] is None:
        yield Finding("slow", "amd_driver", f"{name}the module amdgpu is not loaded", "load it")
    elif torch.get("version") is not None and torch.get("hip") is None:
        text = f"{name}torch {torch['version']} is made for {_made_for(torch)}"
        todo = "install a ROCm build of torch; docs/gpus.md says what was tried of it"
        # Processors have small GPUs of their own, which nobody misses.
        yield Finding("note", "torch_build", text, todo)
    elif any(not node.usable for node in facts.device_files):
        yield _closed(name, facts)
    elif problem is not None:
        yield Finding("broken", "gpu", f"{name}{problem}", "")


def _made_for(torch: dict[str, str | None]) -> str:
    if torch.get("hip"):
        return "AMD's GPUs"
    return "NVIDIA's GPUs" if torch.get("cuda") else "processors only"


def _closed(name: str, facts: Facts) -> Finding:
    """Device files that this user may not open."""
    node = next(node for node in facts.device_files if not node.usable)
    group = re.split(r"[: ]", node.owner)[1]
    todo = f"add this user to the group {group}, then log in again"
    if group == "root":
        todo = "make the file readable and writable for this user: see NVreg_DeviceFileMode"
    text = f"{name}this user may not open {node.path} ({node.owner})"
    return Finding("slow", "device_files", text, todo)


def _update(problem: str) -> str:
    return "update NVIDIA's driver, or take an older build of torch" if "driver" in problem else ""


def _service(facts: Facts) -> Iterator[Finding]:
    if facts.service_sees_gpus is False and facts.vendors() & {"NVIDIA", "AMD"}:
        text = "the systemd service may not open GPUs: its unit has PrivateDevices=yes"
        todo = "install the drop-in quantd-gpu.conf, as `quantd install-service` says"
        yield Finding("slow", "service", text, todo)


def _links(facts: Facts) -> Iterator[Finding]:
    """Those of cards beyond the processor's own that compute."""
    for card in facts.cards:
        link = card.link
        if link is None or card.vendor == "Intel" or link.width >= link.max_width:
            continue
        text = (
            f"{card.name or card.vendor} ({card.address}) has {link.width} of its "
            f"{link.max_width} PCIe lanes"
        )
        severity: Severity = "slow" if link.width <= 4 else "note"
        todo = "put it into the slot that is wired to the processor with the most lanes"
        yield Finding(severity, "pcie", text, todo)


def _gpus(facts: Facts) -> Iterator[Finding]:
    """Cards that are used: other users, heat, limits, rates."""
    for gpu in facts.nvidia_smi.gpus if facts.nvidia_smi else ():
        yield from _state(gpu)
    if facts.nvidia_smi is not None and facts.nvidia_smi.problem is not None:
        yield Finding("note", "nvidia_smi", facts.nvidia_smi.problem, "")
    links = {card.address: card.link for card in facts.cards}
    for gpu in facts.tool.get("gpus", ()):
        rates, peak = gpu["rates"], gpu["memory_peak_gb_s"]
        if rates is None:
            continue
        if peak is not None and rates["copy_gb_s"] < _LOW_COPY * peak:
            text = (
                f"GPU {gpu['index']} copies {rates['copy_gb_s']:.0f} GB/s of its memory's "
                f"{peak:.0f}"
            )
            yield Finding("slow", "gpu_memory_rate", text, "see who else uses it: nvidia-smi")
        link = links.get(gpu["address"])
        carries = link.width * link.max_speed * _PER_LANE if link else None
        slowest = min(rates["from_host_gb_s"], rates["to_host_gb_s"])
        if carries is not None and slowest < _LOW_LINK * carries:
            text = (
                f"GPU {gpu['index']} exchanges {slowest:.1f} GB/s with the host, of the "
                f"{carries:.0f} that its PCIe link carries"
            )
            yield Finding(
                "slow", "pcie_rate", text, "look for errors of the link: dmesg, lspci -vv"
            )


def _state(gpu: Gpu) -> Iterator[Finding]:
    if gpu.slowed:
        why = ", ".join(gpu.slowed)
        clock = f" to {gpu.clock} of {gpu.max_clock} MHz" if gpu.clock and gpu.max_clock else ""
        heat = f", at {gpu.temperature} °C" if gpu.temperature is not None else ""
        text = f"{gpu.name} ({gpu.address}) is slowed down{clock}: {why}{heat}"
        yield Finding("slow", "gpu_heat", text, "look at its cooling and its power supply")
    low = gpu.power_limit and gpu.default_power_limit and gpu.power_limit < gpu.default_power_limit
    if low:
        text = (
            f"{gpu.name} ({gpu.address}) is limited to {gpu.power_limit:.0f} W, its default is "
            f"{gpu.default_power_limit:.0f} W"
        )
        yield Finding("note", "gpu_power", text, "as root: nvidia-smi -pl WATTS")
    if gpu.processes:
        named = ", ".join(
            f"{process.name} ({process.pid}"
            + (f", {size(process.bytes)})" if process.bytes is not None else ")")
            for process in gpu.processes
        )
        yield Finding("note", "gpu_users", f"{gpu.name} ({gpu.address}) is used by {named}", "")


_RULES: tuple[Callable[[Facts], Iterator[Finding]], ...] = (
    _torch,
    _library,
    _kernels,
    _cards,
    _service,
    _notes,
    _processor,
    _memory,
    _rates,
    _links,
    _gpus,
)

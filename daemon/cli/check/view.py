"""The report of `quantd check` for people: one screen."""

from __future__ import annotations

import shutil
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from quantd.daemon.cli.check.facts import Facts
from quantd.daemon.cli.check.findings import Finding
from quantd.daemon.cli.screen import size
from quantd.daemon.machine.graphics import Card

_WIDTH = 14
"""Of the names at the left."""
_LEAST, _MOST = 60, 110
"""Columns between which sentences are wrapped."""


def show(facts: Facts, findings: Sequence[Finding]) -> Iterator[str]:
    pairs = [*_software(facts), *_machine(facts), *_cards(facts), *_kernels(facts), *_rates(facts)]
    for name, text in pairs:
        yield f"{name.ljust(_WIDTH)}{text}"
    yield ""
    columns = min(max(shutil.get_terminal_size().columns, _LEAST), _MOST)
    for finding in findings:
        yield _wrap(finding.severity, finding.text, columns)
        if finding.todo:
            yield _wrap("", f"→ {finding.todo}", columns)
    if not any(finding.severity != "note" for finding in findings):
        yield "Nothing is broken, and nothing makes it slow that this check knows of."


def _wrap(name: str, text: str, columns: int) -> str:
    first = name.ljust(_WIDTH)
    return textwrap.fill(
        text,
        columns,
        initial_indent=first,
        subsequent_indent=" " * _WIDTH,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _software(facts: Facts) -> Iterator[tuple[str, str]]:
    packages = facts.versions
    others = (f"{name} {packages[name] or 'missing'}" for name in ("triton", "gguf"))
    yield "quantd", f"{packages['quantd']}, Python {packages['python']}, {', '.join(others)}"
    torch = facts.tool.get("torch", {})
    if torch.get("version"):
        build = "a CPU build"
        if torch["hip"]:
            build = f"for ROCm {torch['hip']}"
        elif torch["cuda"]:
            build = f"for CUDA {torch['cuda']}"
        yield "torch", f"{torch['version']}, {build}"
    else:
        problem = ", cannot be imported" if packages["torch"] and torch else ""
        yield "torch", f"{packages['torch'] or 'missing'}{problem}"
    drivers = [f"{vendor} driver {version}" for vendor, version in facts.drivers.items() if version]
    libc = f"glibc {facts.glibc}" if facts.glibc else "not glibc"
    yield "system", ", ".join([facts.kernel, libc, *drivers])


def _machine(facts: Facts) -> Iterator[tuple[str, str]]:
    cpu, memory = facts.processor, facts.memory
    parts = [f"{cpu.model} ({cpu.architecture}{', virtual' if cpu.virtual else ''})"]
    parts.append(_count(cpu.cores, "core"))
    parts.append(f"{cpu.allowed} of {_count(cpu.logical, 'processor')} allowed")
    parts.append("no quota" if cpu.quota is None else f"quota {cpu.quota:g}")
    yield "processor", ", ".join(parts)
    library = facts.tool.get("library")
    if library is not None:
        yield "instructions", f"{_level(library)}; {_count(facts.tool['threads'], 'thread')}"
    limit = "" if memory.limit is None else f", cgroup limit {size(memory.limit)}"
    swap = f"{size(memory.swap_used)} of {size(memory.swap_total)} swap used"
    pages = "" if memory.huge_pages is None else f", huge pages {memory.huge_pages}"
    yield (
        "memory",
        f"{size(memory.total)}, {size(memory.available)} available{limit}, "
        f"{swap if memory.swap_total else 'no swap'}{pages}",
    )
    if facts.disk is not None:
        about = f"{size(facts.disk.free)} free of {size(facts.disk.total)}"
        yield "disk", f"{about} at {facts.disk.path}"


def _level(library: dict[str, Any]) -> str:
    if library["problem"] is not None:
        return "no library" if library["file"] is None else "the library is not used"
    if not library["better"]:
        return f"{library['level']}, the best that the library has"
    return f"{library['level']}, not {library['better'][0]['level']}"


def _cards(facts: Facts) -> Iterator[tuple[str, str]]:
    gpus = facts.tool.get("gpus", ())
    cards = {card.address: card for card in facts.cards}
    for gpu in gpus:
        used = size(gpu["memory_total"] - gpu["memory_free"])
        text = (
            f"{gpu['name']}, capability {gpu['capability']}, {size(gpu['memory_total'])} "
            f"({used} in use)"
        )
        card = cards.pop(gpu["address"], None)
        yield f"GPU {gpu['index']}", text + (_link(card) if card else "")
    for card in () if gpus else cards.values():
        name = card.name or f"device {card.device}"
        yield "GPU", f"{card.vendor} {name} ({card.address}), not used{_link(card)}"
    if not gpus and not facts.cards:
        yield "GPU", "none"
    for gpu_state in facts.nvidia_smi.gpus if facts.nvidia_smi else ():
        clock = f"{gpu_state.clock} of {gpu_state.max_clock} MHz"
        power = f"{gpu_state.power or 0:.0f} of {gpu_state.power_limit or 0:.0f} W"
        parts = [clock] if gpu_state.clock and gpu_state.max_clock else []
        parts += [power] if gpu_state.power_limit else []
        parts += [f"{gpu_state.temperature} °C"] if gpu_state.temperature else []
        yield "", f"{gpu_state.address}: {', '.join(parts)}"


def _link(card: Card) -> str:
    if card.link is None:
        return ""
    return f", PCIe x{card.link.width} of x{card.link.max_width}, {card.link.max_speed:g} GT/s"


def _kernels(facts: Facts) -> Iterator[tuple[str, str]]:
    kernels = facts.tool.get("kernels")
    if kernels is None:
        return
    routes = Counter(one["route"] for one in kernels if one["problem"] is None)
    named = ", ".join(f"{count} by {route}" for route, count in routes.items())
    right = sum(routes.values())
    yield "kernels", f"{right} of {len(kernels)} right on the processor ({named})"
    for gpu in facts.tool["gpus"]:
        for dtype in gpu["kernels"]:
            count = len(dtype["right"])
            yield (
                "",
                f"{count} of {count + len(dtype['problems'])} right on GPU {gpu['index']} in "
                f"{dtype['dtype']} (Triton)",
            )


def _rates(facts: Facts) -> Iterator[tuple[str, str]]:
    rates, threads = facts.tool.get("rates"), facts.tool.get("threads", 1)
    if rates is not None:
        more = f", {rates['read_gb_s']:.1f} with {threads}" if threads > 1 else ""
        yield "memory read", f"{rates['read_one_gb_s']:.1f} GB/s with one thread{more}; seen"
        integers = rates["int8_gop_s"]
        peaks = f"{rates['float_gop_s']:.0f} GOP/s in fp32"
        peaks += f", {integers:.0f} in int8" if integers is not None else ""
        yield "arithmetic", f"{peaks} (registers); {rates['bfloat16_gop_s']:.0f} in a bf16 product"
    links = {card.address: card.link for card in facts.cards}
    for gpu in facts.tool.get("gpus", ()):
        if gpu["rates"] is not None:
            yield from _gpu_rates(gpu, links.get(gpu["address"]))


def _gpu_rates(gpu: dict[str, Any], link: Any) -> Iterator[tuple[str, str]]:
    rates, peak = gpu["rates"], gpu["memory_peak_gb_s"]
    expected = "seen" if peak is None else f"of {peak:.0f} that the memory carries"
    yield f"GPU {gpu['index']} copies", f"{rates['copy_gb_s']:.0f} GB/s; {expected}"
    carries = "seen" if link is None else f"of {link.width * link.max_speed / 8:.1f} on the link"
    yield (
        "",
        f"{rates['from_host_gb_s']:.1f} GB/s from pinned memory, {rates['to_host_gb_s']:.1f} back; "
        f"{carries}",
    )
    yield "", f"{rates['bfloat16_gop_s'] / 1e3:.1f} TOP/s in a bf16 product; seen"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"

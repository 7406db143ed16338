"""Everything that `quantd check` knows of the machine, gathered."""

from __future__ import annotations

import dataclasses
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from quantd.daemon.cli import child
from quantd.daemon.machine import nvidia
from quantd.daemon.machine.files import ROOT, children, lines
from quantd.daemon.machine.graphics import (
    Card,
    Node,
    amd_driver,
    nvidia_driver,
    read_cards,
    read_nodes,
)
from quantd.daemon.machine.memory import Disk, Memory, read_disk, read_memory
from quantd.daemon.machine.nvidia import Nvidia
from quantd.daemon.machine.processor import Processor, read_processor

_PACKAGES = ("quantd", "torch", "triton", "numpy", "gguf", "safetensors", "tokenizers")
_UNITS = ("usr/lib/systemd/system", "lib/systemd/system", "etc/systemd/system")

Tool = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What is measured and what torch says is the tool's (`worker/check.py`)."""

    versions: dict[str, str | None]
    """Of Python and packages; None: not installed."""
    kernel: str
    glibc: str | None
    processor: Processor
    memory: Memory
    disk: Disk | None
    """That of the state directory; None: there is none."""
    cards: list[Card]
    device_files: list[Node]
    drivers: dict[str, str | None]
    """By vendor: the version of the kernel's module; None: it is not loaded."""
    nvidia_smi: Nvidia | None
    """None: there is no NVIDIA card, or no driver for it."""
    service_sees_gpus: bool | None
    """Whether the systemd service may open the cards' device files; None: it is not installed."""
    device: str
    """As asked for."""
    tool: Tool
    """Empty if it has broken."""
    tool_problem: str | None

    def vendors(self) -> set[str]:
        return {card.vendor for card in self.cards}


def gather(
    device: str,
    state: Path | None,
    ask: Callable[[], Tool],
    root: Path = ROOT,
    query: Callable[[], Nvidia] = nvidia.query,
) -> Facts:
    """`ask` runs the tool, and may raise ToolError; `state` is the state directory."""
    cards = read_cards(root)
    vendors = {card.vendor for card in cards}
    drivers = {"NVIDIA": nvidia_driver(root), "AMD": amd_driver(root)}
    # Before the tool: it makes load of its own.
    about = read_processor(root)
    versions: dict[str, str | None] = {"python": platform.python_version()}
    tool, problem = _ask(ask)
    return Facts(
        versions=versions | {name: _version(name) for name in _PACKAGES},
        kernel=f"{platform.system()} {platform.release()}",
        glibc=_glibc(),
        processor=about,
        memory=read_memory(root),
        disk=None if state is None else read_disk(state),
        cards=cards,
        device_files=read_nodes(vendors, root),
        drivers=drivers,
        nvidia_smi=query() if drivers["NVIDIA"] is not None else None,
        service_sees_gpus=service_sees_gpus(root),
        device=device,
        tool=tool,
        tool_problem=problem,
    )


def _ask(ask: Callable[[], Tool]) -> tuple[Tool, str | None]:
    try:
        return ask(), None
    except child.ToolError as error:
        return {}, str(error)


def as_json(facts: Facts) -> dict[str, Any]:
    """The tool's keys beside the machine's own."""
    own = dataclasses.asdict(facts)
    tool: Tool = own.pop("tool")
    return own | tool


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _glibc() -> str | None:
    """None where the C library is another one."""
    try:
        name = os.confstr("CS_GNU_LIBC_VERSION")
    except (ValueError, OSError):
        return None
    return name.removeprefix("glibc ") if name else None


def service_sees_gpus(root: Path = ROOT) -> bool | None:
    """By the last word of the unit and its drop-ins on PrivateDevices=."""
    folders = [root / folder for folder in _UNITS]
    units = [path for folder in folders if (path := folder / "quantd.service").is_file()]
    if not units:
        return None
    drop_ins = [path for folder in folders for path in children(folder, "quantd.service.d/*.conf")]
    said = [
        line.partition("=")[2].strip()
        for path in (units[-1], *drop_ins)
        for line in lines(path)
        if line.startswith("PrivateDevices=")
    ]
    return not said or said[-1] in ("no", "false", "0", "off")

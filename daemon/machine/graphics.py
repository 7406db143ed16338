"""Graphics cards on the PCI bus, their kernel drivers and device files; whoever can use them."""

from __future__ import annotations

import grp
import os
import pwd
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from quantd.daemon.machine.files import ROOT, children, lines, number, target, text

_VENDORS = {"0x10de": "NVIDIA", "0x1002": "AMD", "0x8086": "Intel"}
"""Others only draw a console."""
_CLASSES = ("0x0300", "0x0302", "0x0380", "0x1200")
"""VGA, 3D, other display controllers; processing accelerators."""
_NODES = {
    "NVIDIA": ("nvidiactl", "nvidia-uvm", "nvidia[0-9]*"),
    "AMD": ("kfd", "dri/renderD*"),
    "Intel": ("dri/renderD*",),
}


@dataclass(frozen=True, slots=True)
class Link:
    """To the card. A link of the same width gets slower while a card is idle."""

    width: int
    max_width: int
    speed: float
    """GT/s of each lane."""
    max_speed: float


@dataclass(frozen=True, slots=True)
class Card:
    address: str
    """0000:01:00.0"""
    vendor: str
    device: str
    """The vendor's number of the model, 0x2684."""
    name: str | None
    driver: str | None
    """The kernel's module; None: none has taken it."""
    link: Link | None
    memory_total: int | None
    memory_used: int | None
    """In bytes, where the kernel's driver tells (AMD)."""


@dataclass(frozen=True, slots=True)
class Node:
    """A device file that a program opens to use the cards."""

    path: str
    usable: bool
    owner: str
    """root:render 0660"""


def read_cards(root: Path = ROOT) -> list[Card]:
    return [
        card
        for folder in children(root / "sys/bus/pci/devices", "*")
        if (card := _card(folder, root))
    ]


def _card(folder: Path, root: Path) -> Card | None:
    vendor = _VENDORS.get(text(folder / "vendor") or "")
    if vendor is None or not (text(folder / "class") or "").startswith(_CLASSES):
        return None
    return Card(
        address=folder.name,
        vendor=vendor,
        device=text(folder / "device") or "",
        name=text(folder / "product_name") or _nvidia_name(root, folder.name),
        driver=target(folder / "driver"),
        link=_link(folder),
        memory_total=number(folder / "mem_info_vram_total"),
        memory_used=number(folder / "mem_info_vram_used"),
    )


def _link(folder: Path) -> Link | None:
    """None for a card inside the processor, and where a virtual machine hides it."""
    widths = [number(folder / f"{which}_link_width") for which in ("current", "max")]
    speeds = [_speed(folder / f"{which}_link_speed") for which in ("current", "max")]
    if not all(widths) or not all(speeds) or 255 in widths:
        return None
    width, max_width = (value or 0 for value in widths)
    return Link(width, max_width, *speeds)


def _speed(path: Path) -> float:
    """Of "16.0 GT/s PCIe"."""
    found = re.match(r"[\d.]+", text(path) or "")
    return float(found[0]) if found else 0.0


def _nvidia_name(root: Path, address: str) -> str | None:
    for line in lines(root / "proc/driver/nvidia/gpus" / address / "information"):
        name, _, value = line.partition(":")
        if name == "Model":
            return value.strip()
    return None


def read_nodes(
    vendors: set[str], root: Path = ROOT, usable: Callable[[Path], bool] | None = None
) -> list[Node]:
    """Of these vendors' cards. `usable`: whether this process may open a file (None: asks)."""
    names = sorted({name for vendor in vendors for name in _NODES[vendor]})
    found = [path for name in names for path in children(root / "dev", name)]
    return [Node(str(path), (usable or _usable)(path), _owner(path)) for path in found]


def _usable(path: Path) -> bool:
    return os.access(path, os.R_OK | os.W_OK)


def _owner(path: Path) -> str:
    status = path.stat()
    return f"{_user(status.st_uid)}:{_group(status.st_gid)} {stat.S_IMODE(status.st_mode):04o}"


def _user(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)


def _group(number: int) -> str:
    try:
        return grp.getgrgid(number).gr_name
    except KeyError:
        return str(number)


def nvidia_driver(root: Path = ROOT) -> str | None:
    """The version of the kernel module; None: it is not loaded."""
    found = re.search(
        r"Kernel Module(?: for \S+)?\s+(\d[\w.]+)", text(root / "proc/driver/nvidia/version") or ""
    )
    return found[1] if found else None


def amd_driver(root: Path = ROOT) -> str | None:
    """The version of the kernel module, "in the kernel" for Linux's own; None: it is not loaded."""
    module = root / "sys/module/amdgpu"
    return text(module / "version") or ("in the kernel" if module.is_dir() else None)

"""What nvidia-smi says of NVIDIA's GPUs: the only door to NVML that needs no package."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from xml.etree import ElementTree

_SECONDS = 20
"""A driver that hangs must not hold up who asks."""


@dataclass(frozen=True, slots=True)
class Process:
    pid: int
    name: str
    bytes: int | None


@dataclass(frozen=True, slots=True)
class Gpu:
    """What is None was not told."""

    address: str
    """As in /sys: 0000:01:00.0"""
    name: str
    memory_total: int | None
    memory_used: int | None
    """In bytes."""
    temperature: int | None
    """In °C."""
    power: float | None
    power_limit: float | None
    default_power_limit: float | None
    """In W."""
    clock: int | None
    max_clock: int | None
    """Of the multiprocessors, in MHz."""
    slowed: tuple[str, ...]
    """Why clocks are held down now, as "hw thermal slowdown"."""
    processes: tuple[Process, ...]


@dataclass(frozen=True, slots=True)
class Nvidia:
    driver: str | None
    cuda: str | None
    """The newest that the driver supports."""
    gpus: tuple[Gpu, ...]
    problem: str | None
    """Why nothing could be asked."""


def query(run: Callable[[], str] | None = None) -> Nvidia:
    """`run`: gives the XML (None: nvidia-smi is run)."""
    try:
        return parse((run or _run)())
    except FileNotFoundError:
        return _nothing("nvidia-smi is not installed")
    except subprocess.TimeoutExpired:
        return _nothing(f"nvidia-smi has not answered for {_SECONDS} s")
    except subprocess.CalledProcessError as error:
        said = " ".join(f"{error.stdout or ''} {error.stderr or ''}".split())
        return _nothing(f"nvidia-smi failed (status {error.returncode}): {said}")
    except (OSError, ElementTree.ParseError) as error:
        return _nothing(f"nvidia-smi: {error}")


def _nothing(problem: str) -> Nvidia:
    return Nvidia(None, None, (), problem)


def _run() -> str:
    command = ["nvidia-smi", "-q", "-x"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=True)
    return done.stdout


def parse(xml: str) -> Nvidia:
    """Raises ParseError."""
    log = ElementTree.fromstring(xml)
    gpus = tuple(map(_gpu, log.iterfind("gpu")))
    return Nvidia(_text(log, "driver_version"), _text(log, "cuda_version"), gpus, None)


def _gpu(gpu: ElementTree.Element) -> Gpu:
    return Gpu(
        address=_address(gpu.get("id", "")),
        name=_text(gpu, "product_name") or "unknown",
        memory_total=_bytes(gpu, "fb_memory_usage/total"),
        memory_used=_bytes(gpu, "fb_memory_usage/used"),
        temperature=_whole(gpu, "temperature/gpu_temp"),
        # The names of newer drivers, then of older ones.
        power=_number(gpu, "gpu_power_readings/instant_power_draw")
        or _number(gpu, "gpu_power_readings/power_draw")
        or _number(gpu, "power_readings/power_draw"),
        power_limit=_number(gpu, "gpu_power_readings/current_power_limit")
        or _number(gpu, "power_readings/power_limit"),
        default_power_limit=_number(gpu, "gpu_power_readings/default_power_limit")
        or _number(gpu, "power_readings/default_power_limit"),
        clock=_whole(gpu, "clocks/sm_clock"),
        max_clock=_whole(gpu, "max_clocks/sm_clock"),
        slowed=tuple(_slowed(gpu)),
        processes=tuple(map(_process, gpu.iterfind("processes/process_info"))),
    )


def _slowed(gpu: ElementTree.Element) -> Iterator[str]:
    for prefix in ("clocks_event_reason", "clocks_throttle_reason"):
        for reason in gpu.find(f"{prefix}s") or ():
            name = reason.tag.removeprefix(f"{prefix}_")
            # Idling, an administrator's clocks and the power limit under load are none.
            if (reason.text or "").strip() == "Active" and name.endswith("slowdown"):
                yield name.replace("_", " ")


def _process(process: ElementTree.Element) -> Process:
    return Process(
        _whole(process, "pid") or 0,
        _text(process, "process_name") or "unknown",
        _bytes(process, "used_memory"),
    )


def _address(bus: str) -> str:
    """nvidia-smi's domain has eight digits and capitals, that of /sys four and none."""
    domain, _, rest = bus.lower().partition(":")
    return f"{domain[-4:]}:{rest}"


def _text(node: ElementTree.Element, path: str) -> str | None:
    found = (node.findtext(path) or "").strip()
    return None if found in ("", "N/A", "[N/A]", "Not Supported") else found


def _number(node: ElementTree.Element, path: str) -> float | None:
    """Without its unit."""
    found = re.match(r"\d+(\.\d+)?", _text(node, path) or "")
    return float(found[0]) if found else None


def _whole(node: ElementTree.Element, path: str) -> int | None:
    found = _number(node, path)
    return None if found is None else int(found)


def _bytes(node: ElementTree.Element, path: str) -> int | None:
    """Of "24564 MiB"."""
    found = _number(node, path)
    return None if found is None else int(found) << 20

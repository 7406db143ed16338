"""The GPUs' part of `quantd check`: what torch sees of them, their kernels, their rates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from quantd.daemon.worker import child
from quantd.kernels.bench.device import DeviceRates, measure_device
from quantd.kernels.checked import Checked, checked

Report = dict[str, Any]

_DTYPES = (torch.bfloat16, torch.float16)
"""Of the activations of nearly every model; the first is checked in any case."""


class Cuda(Protocol):
    """What is used of `torch.cuda`; tests have one of their own."""

    def init(self) -> None: ...
    def device_count(self) -> int: ...
    def set_device(self, device: Any, /) -> None: ...
    def get_device_properties(self, device: Any, /) -> Any: ...
    def mem_get_info(self, device: Any, /) -> tuple[int, int]: ...
    def synchronize(self) -> None: ...


def check_gpus(
    device: str,
    quick: bool,
    cuda: Cuda,
    send: child.Send,
    check: Callable[[torch.device, torch.dtype], Checked] = checked,
    measure: Callable[[torch.device, Callable[[], None]], DeviceRates] = measure_device,
) -> Report:
    """`gpus`: a report for each one asked for; `gpu_problem`: why there is none, where one was
    asked for or torch is made for them."""
    report: Report = {"gpus": [], "gpu_problem": None}
    if device == "cpu":
        return report
    try:
        cuda.init()
        count = cuda.device_count()
    except (AssertionError, RuntimeError) as error:
        # Of a CPU build: that it is one. Who asked for a GPU is told; else the cards tell.
        if device != "auto" or not isinstance(error, AssertionError):
            report["gpu_problem"] = str(error).strip().partition("\n")[0]
        return report
    indices = range(count) if device == "auto" else [int(device.partition(":")[2] or 0)]
    for index in indices:
        if index >= count:
            report["gpu_problem"] = f"device = {device!r}, but torch sees {count} GPUs"
            return report
        send({"stage": f"GPU {index}"})
        cuda.set_device(index)
        gpu = _gpu(index, cuda)
        here = torch.device("cuda", index)
        send({"stage": f"kernels on GPU {index}"})
        gpu["kernels"] = [
            {
                "dtype": str(dtype).removeprefix("torch."),
                "right": sorted(found.operations),
                "problems": list(found.problems),
            }
            for dtype in (_DTYPES[:1] if quick else _DTYPES)
            for found in (check(here, dtype),)
        ]
        send({"stage": f"memory and arithmetic of GPU {index}"})
        gpu["rates"] = None if quick else _rates(measure(here, cuda.synchronize))
        report["gpus"].append(gpu)
    return report


def _gpu(index: int, cuda: Cuda) -> Report:
    about = cuda.get_device_properties(index)
    free, total = cuda.mem_get_info(index)
    return {
        "index": index,
        "name": about.name,
        "capability": f"{about.major}.{about.minor}",
        "address": _address(about),
        "multiprocessors": about.multi_processor_count,
        "memory_total": total,
        "memory_free": free,
        "memory_peak_gb_s": _memory_peak(about),
    }


def _address(about: Any) -> str | None:
    """As in /sys; None where this torch does not tell."""
    parts = [getattr(about, f"pci_{part}_id", None) for part in ("domain", "bus", "device")]
    if any(part is None for part in parts):
        return None
    domain, bus, device = parts
    return f"{domain:04x}:{bus:02x}:{device:02x}.0"


def _memory_peak(about: Any) -> float | None:
    """From the clock (kHz, two transfers each) and the width of the bus, where torch tells them."""
    clock, width = (getattr(about, f"memory_{name}", None) for name in ("clock_rate", "bus_width"))
    if not clock or not width:
        return None
    return float(2 * clock * 1e3 * width / 8 / 1e9)


def _rates(rates: DeviceRates) -> Report:
    return {
        "copy_gb_s": rates.copy / 1e9,
        "from_host_gb_s": rates.from_host / 1e9,
        "to_host_gb_s": rates.to_host / 1e9,
        "bfloat16_gop_s": rates.multiply / 1e9,
    }

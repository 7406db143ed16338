"""What a GPU moves and multiplies: for `quantd check`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from quantd.kernels.bench.roofline import seconds

_MEGABYTES = 256
_COPIES = 4
"""In one measurement, so that waiting for the end is a small part of it."""
_SIDE = 4096
_SECONDS = 0.3


@dataclass(frozen=True, slots=True)
class DeviceRates:
    """Measured now."""

    copy: float
    """Bytes per second that a copy on the device reads and writes."""
    from_host: float
    to_host: float
    """Bytes per second between the device and pinned memory of the host."""
    multiply: float
    """Operations per second of a bfloat16 product, two for each multiplication."""


def measure_device(
    device: torch.device,
    synchronize: Callable[[], None],
    megabytes: int = _MEGABYTES,
    side: int = _SIDE,
) -> DeviceRates:
    """`synchronize` waits for all that was queued on the device."""

    def rate(amount: float, call: Callable[[], object]) -> float:
        def calls() -> None:
            for _ in range(_COPIES):
                call()
            synchronize()

        return _COPIES * amount / seconds(calls, _SECONDS)

    here = torch.zeros(megabytes << 20, dtype=torch.uint8, device=device)
    there = torch.zeros_like(here)
    host = torch.zeros(here.shape, dtype=torch.uint8, pin_memory=device.type == "cuda")
    a = torch.ones(side, side, dtype=torch.bfloat16, device=device)
    return DeviceRates(
        copy=rate(2.0 * here.nbytes, lambda: there.copy_(here)),
        from_host=rate(here.nbytes, lambda: here.copy_(host, non_blocking=True)),
        to_host=rate(here.nbytes, lambda: host.copy_(here, non_blocking=True)),
        multiply=rate(2.0 * side**3, lambda: F.linear(a, a)),
    )

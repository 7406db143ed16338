"""Which of Triton's operations are used on a device: those that were right there at start."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

import torch

_log = logging.getLogger("quantd.kernels")

Operation = Callable[..., Any]


class Checked(NamedTuple):
    operations: Mapping[str, Operation]
    """By name: those that may be used. What is missing runs the specification."""
    problems: tuple[str, ...]
    """Why each of the others may not, for the log and the API."""


_of_device: dict[torch.device, Checked] = {}


@cache
def checked(device: torch.device, dtype: torch.dtype) -> Checked:
    """For activations of `dtype`. The first call compiles and runs every operation on the device,
    and waits for it: seconds, or less where Triton has compiled them before."""
    try:
        from quantd.kernels.triton.check import check
    except ImportError as error:
        found = Checked({}, (f"no Triton kernels ({error}): operations run in plain torch",))
    else:
        found = check(device, dtype)
    for problem in found.problems:
        _log.warning("%s, %s: %s", device, dtype, problem)
    _of_device[device] = found
    return found


def checked_for_bytes(device: torch.device) -> Checked:
    """For what moves bytes, whatever they mean: of the activations that were checked last. Nothing,
    where none were."""
    return _of_device.get(device, Checked({}, ()))

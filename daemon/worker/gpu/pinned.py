"""Memory of the host that a CUDA device copies from and to while the host goes on.

Not torch's pinned memory, which is rounded up to a power of two: 65 GiB would take 128.
"""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

import torch
from torch import Tensor

from quantd.daemon.worker.gpu.borrowed import borrow


def pinned(num_bytes: int) -> Tensor:
    """uint8 [num_bytes], zeros, for the current device. MemoryError when it is not to be had."""
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    try:
        memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"{num_bytes} bytes of the host are not to be had: {error}") from None
    start = ctypes.c_ubyte.from_buffer(memory)
    address = ctypes.addressof(start)
    status = int(runtime.cudaHostRegister(address, num_bytes, 0))
    if status:
        why = runtime.cudaGetErrorString(runtime.cudaError(status))
        raise MemoryError(f"{num_bytes} bytes of the host cannot be pinned: {why}")

    def unpin(kept: object = start) -> None:
        torch.cuda.synchronize()  # copies may be under way
        runtime.cudaHostUnregister(address)

    return borrow(address, num_bytes, torch.device("cpu"), unpin)

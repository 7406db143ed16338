"""Grouped weights by device: packed by, joined by, unpacked by and multiplied by who runs there.

On a GPU (device type cuda) that is kernels/triton; else kernels/cpu, whose `GroupedWeight` is the
one opaque type.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING

import torch

from quantd.kernels.checked import checked
from quantd.kernels.cpu import grouped as cpu
from quantd.kernels.cpu.grouped import GroupedWeight
from quantd.kernels.grouped import GroupedCodes

if TYPE_CHECKING:
    from quantd.kernels.triton.linear import Part as GpuPart

GPU_ROUTE = "triton"


def grouped_route(device: torch.device | None = None) -> str:
    """Which route pack_grouped takes in this process for a device; None: the CPU."""
    return cpu.grouped_route() if device is None or _gpu(device) is None else GPU_ROUTE


def grouped_problem(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why grouped weights cannot be on this device for activations of `dtype`, or None when they
    can. On a GPU that is what the check at start found."""
    if device.type not in ("cpu", "cuda"):
        return f"grouped weights have no kernel for {device.type} yet"
    if device.type == "cpu":
        return None
    found = checked(device, dtype)
    if "grouped_linear" in found.operations:
        return None
    why = [problem for problem in found.problems if "grouped_linear" in problem] or found.problems
    return f"grouped weights on a GPU: {'; '.join(why)}"


def pack_grouped(
    chunks: Iterable[GroupedCodes],
    shape: tuple[int, int],
    *,
    order: torch.Tensor | None = None,
    exact: bool = False,
    per_row: bool = False,
    device: torch.device | None = None,
) -> GroupedWeight:
    """Packs a weight of `shape` (out_features, in_features) from its rows, chunk after chunk, each
    but the last a multiple of 16 rows; all chunks agree in bits, group, table, center and in
    having an offset. What a chunk holds is not kept, so the caller may unpack the next one into
    the same memory.

    `order` int64 [K'], when the codes are not in the order of the activations: column k of the
    codes (K' of them) multiplies x[:, order[k]], and nothing where order[k] is -1.
    `exact` keeps scales and offsets in fp32 and never quantizes activations. Otherwise they may be
    rounded to eleven bits, and activations to eight bits per 32 columns, on a CPU; a GPU does
    neither, and rounds weights to the dtype of the activations while it multiplies.
    `per_row` quantizes activations in one group per row, in any case: W8A8 formats define it.
    `device` is where the weight will lie; None: the CPU. Chunks may lie elsewhere.
    """
    gpu = None if device is None else _gpu(device)
    if gpu is None:
        return cpu.pack_grouped(chunks, shape, order=order, exact=exact, per_row=per_row)
    rows, columns = shape
    if order is not None:
        order = cpu.checked_order(order, columns)
        columns = order.numel()
    part = gpu.pack(chunks, rows, columns, order=order, per_row=per_row, device=device)
    return gpu_weight((part,), shape, exact, per_row)


def join_grouped(weights: Sequence[GroupedWeight]) -> GroupedWeight:
    """One weight of these, their rows one after the other; all with the same in_features."""
    on_gpu = [bool(w.gpu_parts) for w in weights]
    if not any(on_gpu):
        return cpu.join_grouped(weights)
    columns = weights[0].shape[1]
    if not all(on_gpu) or any(w.shape[1] != columns for w in weights):
        raise ValueError(f"weights of {[(w.route, w.shape[1]) for w in weights]} cannot be joined")
    from quantd.kernels.triton import linear as gpu

    parts = gpu.join([part for w in weights for part in w.gpu_parts])
    shape = (sum(w.shape[0] for w in weights), columns)
    return gpu_weight(parts, shape, all(w.exact for w in weights), all(w.per_row for w in weights))


def unpack_grouped(w: GroupedWeight) -> torch.Tensor:
    """The weight [N, K] that is multiplied by, fp32, columns in the order of the activations."""
    if not w.gpu_parts:
        return cpu.unpack_grouped(w)
    from quantd.kernels.triton import linear as gpu

    return torch.cat(
        [cpu.in_order(gpu.unpack(part), part.order, w.shape[1]) for part in w.gpu_parts]
    )


def grouped_linear(x: torch.Tensor, w: GroupedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """x [T, K] times w transposed plus bias [N] -> [T, N] of x's dtype, fp32 inside."""
    if not w.gpu_parts:
        return cpu.grouped_linear(x, w, bias)
    if x.shape[1] != w.shape[1]:
        raise ValueError(f"x is {list(x.shape)} for {w.shape[1]} columns")
    if x.shape[0] == 0:
        return x.new_empty((0, w.shape[0]))
    from quantd.kernels.triton import linear as gpu

    return gpu.multiply(x, w.gpu_parts, bias)


def _gpu(device: torch.device) -> ModuleType | None:
    """What runs on this device if that is a GPU. Imported late: it takes a quarter of a second, and
    a machine without a GPU may have no triton."""
    if device.type != "cuda":
        return None
    from quantd.kernels.triton import linear

    return linear


def gpu_weight(
    parts: tuple[GpuPart, ...], shape: tuple[int, int], exact: bool, per_row: bool
) -> GroupedWeight:
    """Of parts on a GPU whose rows lie one after the other."""
    nbytes = sum(part.nbytes for part in parts)
    return GroupedWeight((), None, shape, exact, per_row, GPU_ROUTE, nbytes, parts)

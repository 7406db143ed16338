"""RMSNorm and gated activations on a GPU: one program for each row, all of the row in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quantd.kernels.triton.variant import Variant


@triton.jit
def rms_norm_kernel(
    x,  # [rows * inner, width], row r of outer o at o * outer_stride + r * inner_stride
    residual,  # [rows, width] or None: x is added to it first, in place
    weight,  # fp32 [width]
    out,  # [rows * inner, width], contiguous
    outer_stride,
    inner_stride,
    inner,
    width,
    eps,
    WIDTH: tl.constexpr,  # a power of two, at least width
    HAS_RESIDUAL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < width
    at = (row // inner) * outer_stride + (row % inner) * inner_stride
    value = tl.load(x + at + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        place = residual + row * width + column
        value += tl.load(place, mask=inside, other=0.0).to(tl.float32)
        # The norm reads the sum as stored, as the specification has it.
        stored = value.to(residual.dtype.element_ty)
        tl.store(place, stored, mask=inside)
        value = stored.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(value * value, axis=0) / width + eps)
    factor = tl.load(weight + column, mask=inside, other=0.0)
    tl.store(
        out + row * width + column, (value * scale * factor).to(out.dtype.element_ty), mask=inside
    )


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """As the reference; x [..., H] with a contiguous last dimension, of three dimensions at most
    where it is a view."""
    return _norm(x, None, weight, eps)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    return _norm(x.contiguous(), residual, weight, eps)


def _norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    width = x.shape[-1]
    inner, outer_stride, inner_stride = 1, width, 0
    if x.dim() == 3 and x.stride(2) == 1:
        inner, outer_stride, inner_stride = x.shape[1], x.stride(0), x.stride(1)
    elif not x.is_contiguous():
        x = x.contiguous()
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    rows = x.numel() // width
    if rows:
        block = triton.next_power_of_2(width)
        rms_norm_kernel[(rows,)](
            x,
            residual,
            weight,
            out,
            outer_stride,
            inner_stride,
            inner,
            width,
            eps,
            WIDTH=block,
            HAS_RESIDUAL=residual is not None,
            num_warps=_warps(block),
        )
    return out


def _warps(width: int) -> int:
    """Eight elements or more for each thread."""
    return min(16, max(1, width // 256))


def _variant(dtype: str, width: int, has_residual: bool) -> Variant:
    pointer = f"*{dtype}"
    signature = {"x": pointer, "weight": "*fp32", "out": pointer}
    signature |= dict.fromkeys(("outer_stride", "inner_stride", "inner", "width"), "i32")
    constants: dict[str, object] = {"WIDTH": width, "HAS_RESIDUAL": has_residual}
    if has_residual:
        signature["residual"] = pointer
    else:
        constants["residual"] = None
    return Variant(
        f"rms_norm {dtype} {width}{' residual' if has_residual else ''}",
        rms_norm_kernel,
        {**signature, "eps": "fp32"},
        constants,
        num_warps=_warps(width),
        aligned=("x", "weight", "out", "width", *(["residual"] if has_residual else [])),
    )


VARIANTS = tuple(
    _variant(dtype, width, has_residual)
    for dtype in ("fp16", "bf16")
    for width in (128, 4096, 16384)
    for has_residual in (False, True)
)

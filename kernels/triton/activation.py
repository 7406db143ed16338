"""Activations, gated and plain, and LayerNorm on a GPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quantd.kernels.reference import Activation
from quantd.kernels.triton.variant import Variant

_COLUMNS = 1024
"""Of a program."""

_KINDS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}


@triton.jit
def _activated(x, KIND: tl.constexpr):
    if KIND == 0:
        return x / (1.0 + tl.exp(-x))
    if KIND == 1:
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    # 0.5 * (1 + tanh(y)) is the logistic function of 2 y.
    y = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    return x / (1.0 + tl.exp(-2.0 * y))


@triton.jit
def activation_kernel(
    x,  # [T, 2 * width] if GATED, else [T, width]; contiguous
    out,  # [T, width]
    width,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Program (t, j): COLUMNS columns of row t."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    start = x + row * width * 2 if GATED else x + row * width
    value = _activated(tl.load(start + column, mask=inside, other=0.0).to(tl.float32), KIND)
    if GATED:
        value *= tl.load(start + width + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + column, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def layer_norm_kernel(x, weight, bias, out, width, eps, WIDTH: tl.constexpr):
    """A row of x [T, width], all of it in registers; weight and bias fp32 [width]."""
    row = tl.program_id(0).to(tl.int64) * width
    column = tl.arange(0, WIDTH)
    inside = column < width
    value = tl.load(x + row + column, mask=inside, other=0.0).to(tl.float32)
    centred = tl.where(inside, value - tl.sum(value, axis=0) / width, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / width + eps)
    factor = tl.load(weight + column, mask=inside, other=0.0)
    shift = tl.load(bias + column, mask=inside, other=0.0)
    done = centred * scale * factor + shift
    tl.store(out + row + column, done.to(out.dtype.element_ty), mask=inside)


def act_and_mul(gate_up: torch.Tensor, activation: Activation) -> torch.Tensor:
    """As the reference."""
    return _activate(gate_up, activation, gated=True)


def activate(x: torch.Tensor, activation: Activation) -> torch.Tensor:
    """As the reference, for x [T, I]."""
    return _activate(x, activation, gated=False)


def _activate(x: torch.Tensor, activation: Activation, gated: bool) -> torch.Tensor:
    if activation not in _KINDS:
        raise ValueError(f"activation is {activation!r}, must be silu, gelu_tanh or gelu")
    x = x.contiguous()
    width = x.shape[1] // 2 if gated else x.shape[1]
    out = torch.empty(x.shape[0], width, dtype=x.dtype, device=x.device)
    if out.numel():
        activation_kernel[(x.shape[0], triton.cdiv(width, _COLUMNS))](
            x, out, width, KIND=_KINDS[activation], GATED=gated, COLUMNS=_COLUMNS, num_warps=4
        )
    return out


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, dtype: torch.dtype
) -> torch.Tensor:
    """As the reference."""
    x = x.contiguous()
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    if x.numel():
        width = triton.next_power_of_2(x.shape[1])
        layer_norm_kernel[(x.shape[0],)](
            x, weight, bias, out, x.shape[1], eps, WIDTH=width, num_warps=_warps(width)
        )
    return out


def _warps(width: int) -> int:
    """Eight elements or more for each thread."""
    return min(16, max(1, width // 256))


def _activation_variant(dtype: str, activation: str, gated: bool) -> Variant:
    return Variant(
        f"{activation}{' gated' * gated} {dtype}",
        activation_kernel,
        {"x": f"*{dtype}", "out": f"*{dtype}", "width": "i32"},
        {"KIND": _KINDS[activation], "GATED": gated, "COLUMNS": _COLUMNS},
        aligned=("x", "out", "width"),
    )


def _layer_norm_variant(dtype: str, out: str, width: int) -> Variant:
    signature = {"x": f"*{dtype}", "weight": "*fp32", "bias": "*fp32", "out": f"*{out}"}
    return Variant(
        f"layer_norm {dtype} {out} {width}",
        layer_norm_kernel,
        {**signature, "width": "i32", "eps": "fp32"},
        {"WIDTH": width},
        num_warps=_warps(width),
        aligned=(*signature, "width"),
    )


VARIANTS = (
    *(
        _activation_variant("bf16", activation, gated)
        for activation in _KINDS
        for gated in (False, True)
    ),
    _activation_variant("fp16", "silu", True),
    *(_layer_norm_variant(d, o, 1024) for d, o in (("bf16", "bf16"), ("fp32", "bf16"))),
    _layer_norm_variant("fp16", "fp16", 8192),
)

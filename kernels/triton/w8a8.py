"""Weights of eight bits times activations of eight bits, rounded row by row as they come.

int8: sums are exact in 32 bits, so a row's bits depend on nothing but the row. e4m3 (compute
capability 8.9 or later): sums of 128 products by the tensor core, added in fp32 in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from quantd.kernels.reference.w8a8 import MAX_FLOAT8
from quantd.kernels.triton.variant import Variant

COLUMN_MULTIPLE = 16
_BLOCK_K = 128
_ROUND = 12582912.0
"""1.5 * 2 ** 23: what is added to it loses its fraction, rounded half to even."""


@dataclass(frozen=True, slots=True)
class BytePart:
    """Rows of a weight of one byte each column, with a scale for each row."""

    data: torch.Tensor
    """int8 or e4m3 [rows, padded columns]; padding is zero."""
    scale: torch.Tensor
    """fp32 [rows]"""
    rows: int
    columns: int
    order: None = None
    """Columns are in the order of the activations."""

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + self.scale.nbytes


@triton.jit
def _quantize_kernel(
    x,  # [rows, columns]
    codes,  # [rows, padded columns]
    scale,  # fp32 [rows]
    columns,
    padded,
    x_stride,
    largest,  # of a code
    rounder,
    FLOAT: tl.constexpr,
    WIDTH: tl.constexpr,  # a power of two, at least padded
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    value = tl.load(x + row * x_stride + column, mask=column < columns, other=0.0).to(tl.float32)
    most = tl.max(tl.abs(value), axis=0)
    # tl.max passes over a NaN; the specification does not.
    most = tl.where(tl.sum((value != value).to(tl.int32), axis=0) > 0, float("nan"), most)
    step = tl.math.div_rn(most, largest)
    inverse = tl.where(step > 0, tl.math.div_rn(1.0, step), 0.0)
    scaled = value * inverse
    scaled = tl.where(scaled == scaled, scaled, 0.0)
    scaled = tl.minimum(tl.maximum(scaled, -largest), largest)
    if not FLOAT:
        scaled = (scaled + rounder) - rounder
    place = codes + row * padded + column
    tl.store(place, scaled.to(codes.dtype.element_ty), mask=column < padded)
    tl.store(scale + row, step)


@triton.jit(do_not_specialize=["rows"])
def _byte_kernel(
    x,  # [rows, columns], padded with zeros to a multiple of 16
    x_scale,
    weight,  # [width, columns]
    weight_scale,
    bias,
    out,
    rows,
    width,
    columns,
    out_stride,
    SUM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    m = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    n_inside, m_inside = n < width, m < rows
    column = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_N, BLOCK_M), dtype=SUM)
    for start in range(0, columns, BLOCK_K):
        k = start + column
        left = tl.load(
            weight + n[:, None] * columns + k[None, :],
            mask=n_inside[:, None] & (k < columns)[None, :],
            other=0.0,
        )
        right = tl.load(
            x + m[None, :] * columns + k[:, None],
            mask=m_inside[None, :] & (k < columns)[:, None],
            other=0.0,
        )
        # e4m3: Hopper's sums have fewer bits than fp32, so they are added to it block by block.
        total = tl.dot(left, right, total, out_dtype=SUM, max_num_imprecise_acc=BLOCK_K)
    sums = total.to(tl.float32)
    sums *= tl.load(x_scale + m, mask=m_inside, other=0.0)[None, :]
    sums *= tl.load(weight_scale + n, mask=n_inside, other=0.0)[:, None]
    if bias is not None:
        sums += tl.load(bias + n, mask=n_inside, other=0.0).to(tl.float32)[:, None]
    at = m[None, :] * out_stride + n[:, None]
    tl.store(out + at, sums.to(out.dtype.element_ty), mask=m_inside[None, :] & n_inside[:, None])


def quantize_rows(
    x: torch.Tensor, dtype: torch.dtype = torch.int8
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, K] -> int8 [T, K] and fp32 scales [T], bit for bit `reference.quantize_rows(x, None)`;
    or e4m3 as `reference.quantize_rows_float8`. The columns of the codes are padded with zeros to a
    multiple of 16. The last dimension of x is contiguous."""
    rows, columns = x.shape
    padded = -(-columns // COLUMN_MULTIPLE) * COLUMN_MULTIPLE
    codes = torch.empty(rows, padded, dtype=dtype, device=x.device)
    scale = torch.empty(rows, dtype=torch.float32, device=x.device)
    if rows:
        block = triton.next_power_of_2(padded)
        _quantize_kernel[(rows,)](
            x,
            codes,
            scale,
            columns,
            padded,
            x.stride(0),
            127.0 if dtype == torch.int8 else MAX_FLOAT8,
            _ROUND,
            FLOAT=dtype != torch.int8,
            WIDTH=block,
            num_warps=_warps(block),
        )
    return codes, scale


def pack_bytes(weight: torch.Tensor, scale: torch.Tensor) -> BytePart:
    """weight int8 or e4m3 [N, K], scale fp32 [N]. Neither is kept."""
    rows, columns = weight.shape
    as_bytes = F.pad(weight.view(torch.int8), (0, -columns % COLUMN_MULTIPLE)).contiguous()
    if as_bytes.data_ptr() == weight.data_ptr():
        as_bytes = as_bytes.clone()
    return BytePart(as_bytes.view(weight.dtype), scale.float().clone(), rows, columns)


def join_bytes(parts: Sequence[BytePart]) -> BytePart:
    """Their rows one after the other; of one dtype and number of columns."""
    if len(parts) == 1:
        return parts[0]
    data, scale = torch.cat([p.data for p in parts]), torch.cat([p.scale for p in parts])
    return BytePart(data, scale, len(data), parts[0].columns)


def unpack_bytes(part: BytePart) -> torch.Tensor:
    """fp32 [rows, columns]"""
    return part.data[:, : part.columns].float() * part.scale[:, None]


def byte_matmul(
    codes: torch.Tensor,
    scale: torch.Tensor,
    part: BytePart,
    bias: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """out [T, rows of the part] = codes [T, padded columns] times the part transposed, times scale
    [T], plus bias. `out` may be a view with a contiguous last dimension."""
    rows, columns = codes.shape
    block_n, block_m, warps = _tile(rows)
    _byte_kernel[(triton.cdiv(part.rows, block_n), triton.cdiv(rows, block_m))](
        codes,
        scale,
        part.data,
        part.scale,
        bias,
        out,
        rows,
        part.rows,
        columns,
        out.stride(0),
        SUM=tl.int32 if codes.dtype == torch.int8 else tl.float32,
        BLOCK_N=block_n,
        BLOCK_M=block_m,
        BLOCK_K=_BLOCK_K,
        num_warps=warps,
        num_stages=3,
    )


def _tile(rows: int) -> tuple[int, int, int]:
    """Rows of the weight, rows of activations, warps."""
    if rows <= 16:
        return 64, 16, 4
    return (64, 64, 4) if rows <= 64 else (128, 128, 8)


def _warps(width: int) -> int:
    return min(16, max(1, width // 256))


_TENSOR_CORES = {
    "i8": {
        80: r"mma\.sync\.\S*\.s32\.s8",
        90: r"wgmma\.mma_async\.\S*\.s32\.s8",
        120: r"mma\.sync\.\S*\.s32\.s8",
    },
    "fp8e4nv": {90: r"wgmma\.mma_async\.\S*e4m3", 120: r"mma\.sync\.\S*e4m3"},
}

_ROUNDED = {"i8": r"div\.rn\.f32", "fp8e4nv": r"(?s)div\.rn\.f32.*cvt\.rn\.satfinite\.e4m3x2\.f32"}
"""What is not rounded as IEEE 754 has it is not what the specification gives."""


def _byte_variant(code: str, out: str, rows: int) -> Variant:
    block_n, block_m, warps = _tile(rows)
    types = {"x": f"*{code}", "weight": f"*{code}", "bias": f"*{out}", "out": f"*{out}"}
    types |= dict.fromkeys(("x_scale", "weight_scale"), "*fp32")
    pointers = tuple(types)
    types |= dict.fromkeys(("rows", "width", "columns", "out_stride"), "i32")
    constants = {
        "SUM": tl.int32 if code == "i8" else tl.float32,
        "BLOCK_N": block_n,
        "BLOCK_M": block_m,
        "BLOCK_K": _BLOCK_K,
    }
    return Variant(
        f"w8a8 {code} {out} rows {rows}",
        _byte_kernel,
        types,
        constants,
        num_warps=warps,
        num_stages=3,
        aligned=(*pointers, "columns", "out_stride"),
        instructions=_TENSOR_CORES[code],
        architectures=tuple(_TENSOR_CORES[code]),
    )


def _quantize_variant(x: str, code: str, width: int) -> Variant:
    types = {"x": f"*{x}", "codes": f"*{code}", "scale": "*fp32"}
    types |= dict.fromkeys(("columns", "padded", "x_stride"), "i32")
    types |= dict.fromkeys(("largest", "rounder"), "fp32")
    return Variant(
        f"quantize rows {x} to {code} {width}",
        _quantize_kernel,
        types,
        {"FLOAT": code != "i8", "WIDTH": width},
        num_warps=_warps(width),
        aligned=("x", "codes", "scale", "columns", "padded", "x_stride"),
        instructions=dict.fromkeys(_TENSOR_CORES[code], _ROUNDED[code]),
        architectures=tuple(_TENSOR_CORES[code]),
    )


VARIANTS = (
    *(_quantize_variant("bf16", code, 4096) for code in ("i8", "fp8e4nv")),
    _quantize_variant("fp16", "i8", 16384),
    *(_byte_variant(code, "bf16", rows) for code in ("i8", "fp8e4nv") for rows in (1, 64, 512)),
    _byte_variant("i8", "fp16", 512),
)

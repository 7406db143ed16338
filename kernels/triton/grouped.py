"""Products with grouped weights on a GPU: unpacked in registers, multiplied on tensor cores.

One kernel for every number of rows. It multiplies sixteen columns at a time (a chunk of the
layout), adds up spans of SPAN columns from zero, and then the spans in order. Where rows are few,
what takes time is reading the weight, which all of the GPU must do: a program has one span then,
and `_add_spans_kernel` adds them up in the same order. So the position of its columns decides the
bits of a result, never the number of rows, as long as one instruction multiplies: see
kernels/README.md.

The weight is the left operand: its rows fill the tile that a tensor core wants to be large, also
when there is a single row of activations, and it goes from registers into the product.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quantd.kernels.triton import tuned
from quantd.kernels.triton.grouped_layout import BLOCK, PLANES, PackedPart
from quantd.kernels.triton.variant import Variant

SPAN_BLOCKS = 8
SPAN = SPAN_BLOCKS * BLOCK
"""Columns that are added up from zero."""

_MAGIC = 8388608.0
"""2 ** 23: a float whose mantissa holds a small integer beside these bits is 2 ** 23 plus it, which
saves a conversion, the slowest of the instructions here."""


@triton.jit
def unpack_chunk(
    low,  # words of a tile [n, 16]
    high,  # the same, of the second plane
    scale,  # fp32 [n, 1]
    offset,  # fp32 [n, 1]
    zero,  # 2 ** 23 + center
    table0,  # the bytes of table + 128, four to a word
    table1,
    table2,
    table3,
    chunk: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
):
    """The weight of a chunk of sixteen columns, fp32 [n, 16], as `GroupedCodes` defines it."""
    code = (low >> (chunk * LOW)) & ((1 << LOW) - 1)
    if HIGH:
        code |= ((high >> (chunk * HIGH)) & ((1 << HIGH) - 1)) << LOW
    if HAS_TABLE:
        lower = tl.where((code & 4) != 0, table1, table0)
        upper = tl.where((code & 4) != 0, table3, table2)
        word = tl.where((code & 8) != 0, upper, lower)
        code = (word >> ((code & 3) * 8)) & 255
    value = (code | 0x4B000000).to(tl.float32, bitcast=True) - zero
    value *= scale
    if HAS_OFFSET:
        value += offset
    return value


@triton.jit
def span_product(
    x,  # [*, columns]
    x_rows,  # int64 [m]: where the rows of x begin
    x_inside,  # [m]: which rows are there
    low,
    high,
    scale,
    offset,
    n,  # int64 [BLOCK_N], rows of the weight
    n_inside,
    first_block,
    last_block,
    columns,
    groups,
    stride,  # padded rows of the weight
    zero,
    table0,
    table1,
    table2,
    table3,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    GROUP: tl.constexpr,  # 0: one group
    HAS_TABLE: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """fp32 [BLOCK_N, BLOCK_M]: the weight times x over the blocks of columns from the first to the
    last, that one excluded."""
    sum_ = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    column = tl.arange(0, 16)
    for block in range(first_block, last_block):
        at = (block * 16 + column).to(tl.int64)[None, :] * stride + n[:, None]
        low_words = tl.load(low + at, mask=n_inside[:, None], other=0).to(tl.int32)
        high_words = low_words
        if HIGH:
            high_words = tl.load(high + at, mask=n_inside[:, None], other=0).to(tl.int32)
        for chunk in tl.static_range(8):
            start = block * 128 + chunk * 16
            # Only where a group may begin: the sizes are known when this is compiled.
            if chunk == 0 or (GROUP % 128 != 0 and (128 % GROUP != 0 or (chunk * 16) % GROUP == 0)):
                group = start // GROUP if GROUP else 0
                held = n_inside & (group < groups)
                place = (group + tl.zeros_like(n)) * stride + n
                scales = tl.load(scale + place, mask=held, other=0.0).to(tl.float32)
                offsets = scales
                if HAS_OFFSET:
                    offsets = tl.load(offset + place, mask=held, other=0.0).to(tl.float32)
            weight = unpack_chunk(
                low_words,
                high_words,
                scales[:, None],
                offsets[:, None],
                zero,
                table0,
                table1,
                table2,
                table3,
                chunk,
                LOW,
                HIGH,
                HAS_TABLE,
                HAS_OFFSET,
            )
            k = start + column
            read = tl.load(
                x + x_rows[None, :] + k[:, None],
                mask=x_inside[None, :] & (k < columns)[:, None],
                other=0.0,
            )
            sum_ = tl.dot(
                weight.to(DTYPE), read.to(DTYPE), sum_, input_precision="ieee", out_dtype=tl.float32
            )
    return sum_


_VARYING = ["rows", "spans", "groups"]
"""Numbers that no kernel is compiled anew for, when one becomes 1 or a multiple of 16. Rows are
others in each step, and no address's alignment follows from any of them."""


@triton.jit(do_not_specialize=_VARYING)
def grouped_kernel(
    x,  # [rows, columns]
    x_scale,  # fp32 [rows] or None: what the codes in x are multiplied by
    low,
    high,
    scale,
    offset,
    bias,
    out,  # [rows, width]; partial sums [spans, rows, width] where WHOLE is false
    rows,
    width,
    columns,
    groups,
    spans,
    x_stride,
    out_stride,
    stride,
    zero,
    table0,
    table1,
    table2,
    table3,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    DTYPE: tl.constexpr,
    WHOLE: tl.constexpr,  # all spans in one program
    SPAN_BLOCKS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    m = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    n_inside, m_inside = n < width, m < rows
    blocks = tl.cdiv(columns, 128)
    if WHOLE:
        first_span, last_span = 0, spans
    else:
        first_span = tl.program_id(2)
        last_span = first_span + 1
    total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for span in range(first_span, last_span):
        total += span_product(
            x,
            m * x_stride,
            m_inside,
            low,
            high,
            scale,
            offset,
            n,
            n_inside,
            span * SPAN_BLOCKS,
            tl.minimum(span * SPAN_BLOCKS + SPAN_BLOCKS, blocks),
            columns,
            groups,
            stride,
            zero,
            table0,
            table1,
            table2,
            table3,
            LOW,
            HIGH,
            GROUP,
            HAS_TABLE,
            HAS_OFFSET,
            DTYPE,
            BLOCK_N,
            BLOCK_M,
        )
    inside = m_inside[None, :] & n_inside[:, None]
    at = m[None, :] * out_stride + n[:, None]
    if WHOLE:
        if x_scale is not None:
            total *= tl.load(x_scale + m, mask=m_inside, other=0.0)[None, :]
        if bias is not None:
            total += tl.load(bias + n, mask=n_inside, other=0.0).to(tl.float32)[:, None]
    else:
        at += tl.program_id(2).to(tl.int64) * rows * out_stride
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_VARYING[:2])
def _add_spans_kernel(
    partial,  # fp32 [spans, rows, width]
    x_scale,
    bias,
    out,
    rows,
    width,
    spans,
    out_stride,
    BLOCK_N: tl.constexpr,
):
    m = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < width
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for span in range(spans):
        line = tl.cast(span, tl.int64) * rows + m
        total += tl.load(partial + line * width + n, mask=inside, other=0.0)
    if x_scale is not None:
        total *= tl.load(x_scale + m)
    if bias is not None:
        total += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + m * out_stride + n, total.to(out.dtype.element_ty), mask=inside)


DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
_ADD_BLOCK = 256


def grouped_matmul(
    x: torch.Tensor,
    part: PackedPart,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    x_scale: torch.Tensor | None = None,
) -> None:
    """out [T, rows of the part] = x [T, columns] times the part transposed, times x_scale fp32 [T]
    row by row, plus bias. `out` may be a view with a contiguous last dimension, as may x. x is of
    one of DTYPES, or int8 with x_scale, and is then multiplied in fp16, where its codes are exact,
    or in fp32 if `out` is.

    Weights are rounded to the dtype that multiplies; sums are fp32, rounded once.
    """
    rows, (columns, width) = x.shape[0], (part.columns, part.rows)
    dtype = x.dtype
    if dtype == torch.int8:
        dtype = torch.float32 if out.dtype == torch.float32 else torch.float16
    sizes = tuned.tile(x.device, dtype, part.bits, rows)
    spans = triton.cdiv(columns, SPAN)
    grid = (triton.cdiv(width, sizes.n), triton.cdiv(rows, sizes.m))
    whole = spans == 1 or grid[0] * grid[1] >= tuned.ENOUGH_PROGRAMS
    sums = out
    if not whole:
        sums = torch.empty(spans, rows, width, dtype=torch.float32, device=x.device)
    grouped_kernel[(*grid, 1 if whole else spans)](
        x,
        x_scale if whole else None,
        part.low,
        part.high,
        part.scale,
        part.offset,
        bias if whole else None,
        sums,
        rows,
        width,
        columns,
        len(part.scale),
        spans,
        x.stride(0),
        sums.stride(-2),
        part.low.shape[2],
        **value_arguments(part),
        **format_constants(part, len(part.scale)),
        DTYPE=DTYPES[dtype],
        WHOLE=whole,
        SPAN_BLOCKS=SPAN_BLOCKS,
        BLOCK_N=sizes.n,
        BLOCK_M=sizes.m,
        num_warps=sizes.warps,
        num_stages=sizes.stages,
    )
    if not whole:
        _add_spans_kernel[(triton.cdiv(width, _ADD_BLOCK), rows)](
            sums, x_scale, bias, out, rows, width, spans, out.stride(0), BLOCK_N=_ADD_BLOCK
        )


def value_arguments(part: PackedPart) -> dict[str, float | int]:
    """What `unpack_chunk` makes values of codes with."""
    if not part.table:
        return {"zero": _MAGIC + part.center} | dict.fromkeys(_TABLE_WORDS, 0)
    table = [value + 128 for value in part.table] + [0] * (16 - len(part.table))
    words = [int.from_bytes(table[i : i + 4], "little", signed=True) for i in range(0, 16, 4)]
    return {"zero": _MAGIC + 128} | dict(zip(_TABLE_WORDS, words, strict=True))


def format_constants(part: PackedPart, groups: int) -> dict[str, int | bool]:
    """What the kernels are compiled for."""
    low, high = PLANES[part.bits]
    return {
        "LOW": low,
        "HIGH": high,
        "GROUP": part.group if groups > 1 else 0,
        "HAS_TABLE": bool(part.table),
        "HAS_OFFSET": part.offset is not None,
    }


_TABLE_WORDS = ("table0", "table1", "table2", "table3")
_WORD_TYPES = {4: "*i32", 2: "*i16", 1: "*u8"}
_TENSOR_CORES = {80: r"mma\.sync", 90: r"wgmma\.mma_async", 120: r"mma\.sync"}

_SPILL_LIMIT = 64
"""ptxas spills some words of what is read once in a span, to stay at 128 registers or at 255."""


def format_types(
    bits: int, group: int, kind: str, scale: str
) -> tuple[dict[str, str], dict[str, object]]:
    """Types and constants of a format, for variants; kind is center, offset or table."""
    low, high = PLANES[bits]
    types = {"low": _WORD_TYPES[low], "scale": f"*{scale}", "zero": "fp32"}
    types |= dict.fromkeys((*_TABLE_WORDS, "groups", "stride"), "i32")
    constants: dict[str, object] = {
        "LOW": low,
        "HIGH": high,
        "GROUP": group,
        "HAS_TABLE": kind == "table",
        "HAS_OFFSET": kind == "offset",
    }
    for name, there, type_ in (
        ("high", bool(high), _WORD_TYPES.get(high, "")),
        ("offset", kind == "offset", f"*{scale}"),
    ):
        if there:
            types[name] = type_
        else:
            constants[name] = None
    return types, constants


def make_variant(
    x: str, bits: int, group: int, kind: str, rows: int, *, whole: bool, scale: str = "fp16"
) -> Variant:
    torch_dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
    multiplied = "fp16" if x == "i8" else x
    sizes = tuned.tile(torch.device("cpu"), torch_dtype[multiplied], bits, rows)
    types, constants = format_types(bits, group, kind, scale)
    types |= {"x": f"*{x}", "out": f"*{multiplied if whole else 'fp32'}"}
    for name, type_ in (("bias", f"*{multiplied}"), ("x_scale", "*fp32")):
        if whole and (name == "bias" or x == "i8"):
            types[name] = type_
        else:
            constants[name] = None
    types |= dict.fromkeys(("rows", "width", "columns", "spans", "x_stride", "out_stride"), "i32")
    pointers = tuple(name for name, type_ in types.items() if type_.startswith("*"))
    return Variant(
        f"grouped {x} {bits} bits {kind} of {group} rows {rows}{' whole' if whole else ''}",
        grouped_kernel,
        types,
        constants
        | {"DTYPE": DTYPES[torch_dtype[multiplied]], "WHOLE": whole, "SPAN_BLOCKS": SPAN_BLOCKS}
        | {"BLOCK_N": sizes.n, "BLOCK_M": sizes.m},
        num_warps=sizes.warps,
        num_stages=sizes.stages,
        aligned=(*pointers, "columns", "x_stride", "out_stride", "stride"),
        instructions={} if x == "fp32" else _TENSOR_CORES,
        spill_limit=_SPILL_LIMIT,
    )


_SUMS = Variant(
    "add spans",
    _add_spans_kernel,
    {"partial": "*fp32", "bias": "*fp16", "out": "*fp16"}
    | dict.fromkeys(("rows", "width", "spans", "out_stride"), "i32"),
    {"x_scale": None, "BLOCK_N": _ADD_BLOCK},
    aligned=("partial", "bias", "out", "width", "out_stride"),
)

VARIANTS = (
    make_variant("bf16", 2, 16, "offset", 1, whole=False),
    make_variant("bf16", 2, 32, "table", 64, whole=False),
    make_variant("bf16", 3, 128, "center", 64, whole=False),
    make_variant("bf16", 3, 32, "table", 1, whole=False),
    make_variant("bf16", 4, 128, "center", 1, whole=False),
    make_variant("bf16", 4, 128, "center", 512, whole=True),
    make_variant("bf16", 4, 32, "offset", 64, whole=False),
    make_variant("bf16", 4, 32, "table", 512, whole=True),
    make_variant("bf16", 4, 32, "table", 1, whole=False, scale="fp32"),
    make_variant("bf16", 5, 32, "offset", 512, whole=True),
    make_variant("bf16", 6, 16, "center", 1, whole=False),
    make_variant("bf16", 8, 48, "offset", 64, whole=False),
    make_variant("bf16", 8, 0, "center", 512, whole=True),
    make_variant("fp16", 4, 128, "center", 1, whole=True),
    make_variant("fp16", 5, 32, "offset", 64, whole=True),
    make_variant("fp16", 6, 16, "center", 512, whole=True),
    make_variant("i8", 4, 128, "center", 512, whole=True),
    make_variant("bf16", 4, 128, "offset", 512, whole=True, scale="fp32"),
    make_variant("fp32", 4, 32, "offset", 1, whole=False, scale="fp32"),
    _SUMS,
)
"""Every number of bits, every kind of value (a table in fp32 steps is MXFP4's), every tile, each
dtype; not all with all, which was compiled once and takes minutes."""

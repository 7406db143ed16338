"""Rotary position embedding and the write into the KV pools on a GPU, in one pass.

Three programs for each row of the batch: one rotates the heads of q, one those of k and stores
them in the pool, one stores v.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quantd.kernels.batch import BLOCK_SIZE
from quantd.kernels.triton.fp8 import narrow
from quantd.kernels.triton.variant import SHARED_LIMIT, Variant

_BLOCK = tl.constexpr(BLOCK_SIZE)
_WARPS = 4


@triton.jit
def _rotate(x, stride, heads, cos, sin, half, HEADS: tl.constexpr, HALF: tl.constexpr):
    """In place, the pairs (i, i + half) of x [heads, ...]."""
    head, column = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    inside = (head < heads) & (column < half)
    place = x + head.to(tl.int64) * stride + column
    c = tl.load(cos + column, mask=column < half, other=0.0)
    s = tl.load(sin + column, mask=column < half, other=0.0)
    first = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(place + half, mask=inside, other=0.0).to(tl.float32)
    tl.store(place, (first * c - second * s).to(x.dtype.element_ty), mask=inside)
    tl.store(place + half, (second * c + first * s).to(x.dtype.element_ty), mask=inside)


@triton.jit
def _store(
    x,
    stride,
    pool,
    slot,
    scale,
    heads,
    head_dim,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    FP8: tl.constexpr,
):
    """x [heads, head_dim] at a slot of the pool."""
    head, column = tl.arange(0, HEADS)[:, None], tl.arange(0, DIM)[None, :]
    inside = (head < heads) & (column < head_dim)
    value = tl.load(x + head.to(tl.int64) * stride + column, mask=inside, other=0.0)
    if FP8:
        value = narrow(tl.div_rn(value.to(tl.float32), scale))
    at = (slot // _BLOCK * heads + head) * _BLOCK + slot % _BLOCK
    tl.store(pool + at * head_dim + column, value, mask=inside)


@triton.jit
def rotary_kernel(
    q,  # [T, q_heads, head_dim], strides q_row, q_head, 1; the same of k and v
    k,
    v,
    cos,  # fp32 [T, half], or None: nothing is rotated
    sin,
    k_pool,  # [blocks, kv_heads, 16, head_dim], or None: nothing is stored
    v_pool,
    slots,  # int64 [T]
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    q_heads,
    kv_heads,
    head_dim,
    half,
    k_scale,
    v_scale,
    Q_HEADS: tl.constexpr,  # powers of two, at least as many
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    FP8: tl.constexpr,
):
    """Program (t, j): row t; q, k or v for j of 0, 1 and 2."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    if part == 0:
        if cos is not None:
            at = q + row * q_row
            _rotate(at, q_head, q_heads, cos + row * half, sin + row * half, half, Q_HEADS, HALF)
    elif part == 1:
        at = k + row * k_row
        if cos is not None:
            _rotate(at, k_head, kv_heads, cos + row * half, sin + row * half, half, KV_HEADS, HALF)
        if k_pool is not None:
            # Other threads read what these have written.
            tl.debug_barrier()
            slot = tl.load(slots + row)
            _store(at, k_head, k_pool, slot, k_scale, kv_heads, head_dim, KV_HEADS, DIM, FP8)
    else:
        if k_pool is not None:
            slot = tl.load(slots + row)
            at = v + row * v_row
            _store(at, v_head, v_pool, slot, v_scale, kv_heads, head_dim, KV_HEADS, DIM, FP8)


def rotary(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """As the reference; views with a contiguous last dimension."""
    _launch(q, k, k, (cos, sin), None, None, (1.0, 1.0))


def write_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    slots: torch.Tensor,
    kv_scale: tuple[float, float] = (1.0, 1.0),
) -> None:
    _launch(k, k, v, None, (k_pool, v_pool), slots, kv_scale)


def rotary_write_kv(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    slots: torch.Tensor,
    kv_scale: tuple[float, float] = (1.0, 1.0),
) -> None:
    """rotary(q, k, cos, sin), then write_kv of the rotated k and of v."""
    _launch(q, k, v, (cos, sin), (k_pool, v_pool), slots, kv_scale)


def _launch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tables: tuple[torch.Tensor, torch.Tensor] | None,
    pools: tuple[torch.Tensor, torch.Tensor] | None,
    slots: torch.Tensor | None,
    kv_scale: tuple[float, float],
) -> None:
    rows, q_heads, head_dim = q.shape
    kv_heads = k.shape[1]
    if not rows:
        return
    cos, sin = tables or (None, None)
    half = 0 if cos is None else cos.shape[1]
    k_pool, v_pool = pools or (None, None)
    fp8 = k_pool is not None and k_pool.dtype == torch.float8_e4m3fn
    if fp8:
        assert k_pool is not None and v_pool is not None
        k_pool, v_pool = k_pool.view(torch.uint8), v_pool.view(torch.uint8)
    rotary_kernel[(rows, 3)](
        q,
        k,
        v,
        cos,
        sin,
        k_pool,
        v_pool,
        slots,
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        q_heads,
        kv_heads,
        head_dim,
        half,
        *kv_scale,
        Q_HEADS=triton.next_power_of_2(q_heads),
        KV_HEADS=triton.next_power_of_2(kv_heads),
        DIM=triton.next_power_of_2(head_dim),
        HALF=triton.next_power_of_2(max(half, 1)),
        FP8=fp8,
        num_warps=_WARPS,
    )


_ROWS = ("q", "k", "v")
_STRIDES = tuple(f"{x}_{part}" for x in _ROWS for part in ("row", "head"))


def _variant(
    dtype: str, heads: int, fp8: bool, rotates: bool = True, writes: bool = True
) -> Variant:
    signature = dict.fromkeys(_ROWS, f"*{dtype}")
    signature |= dict.fromkeys((*_STRIDES, "q_heads", "kv_heads", "head_dim", "half"), "i32")
    signature |= dict.fromkeys(("k_scale", "v_scale"), "fp32")
    constants: dict[str, object] = {"Q_HEADS": heads, "KV_HEADS": 8, "DIM": 128, "HALF": 64}
    tables = dict.fromkeys(("cos", "sin"), "*fp32")
    pools = dict.fromkeys(("k_pool", "v_pool"), "*u8" if fp8 else f"*{dtype}") | {"slots": "*i64"}
    for wanted, part in ((rotates, tables), (writes, pools)):
        if wanted:
            signature |= part
        else:
            constants |= dict.fromkeys(part)
    name = f"rotary{'' if rotates else ' none'}{' writes' * writes}{' e4m3' * fp8} {dtype} {heads}"
    aligned = (*_ROWS, *tables, *pools, *_STRIDES, "head_dim", "half")
    return Variant(
        name,
        rotary_kernel,
        signature,
        {**constants, "FP8": fp8},
        num_warps=_WARPS,
        aligned=tuple(a for a in aligned if a in signature),
        # The barrier between rotating and storing, without which nothing else would bring one.
        instructions=dict.fromkeys(SHARED_LIMIT, r"bar\.sync") if rotates and writes else {},
    )


VARIANTS = (
    *(_variant(dtype, heads, False) for dtype in ("fp16", "bf16") for heads in (32, 128)),
    _variant("bf16", 32, True),
    _variant("bf16", 32, False, writes=False),
    _variant("bf16", 8, True, rotates=False),
)

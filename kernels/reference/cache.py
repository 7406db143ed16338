"""Writes into the KV pools in plain torch: the specification. A pool is [blocks, Hkv, 16, D]."""

from collections.abc import Sequence

import torch

from quantd.kernels.batch import BLOCK_SIZE
from quantd.kernels.reference.rotary import rotary

_LARGEST = torch.finfo(torch.float8_e4m3fn).max


def write_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    slots: torch.Tensor,
    kv_scale: tuple[float, float] = (1.0, 1.0),
) -> None:
    """Stores row t of k and v [T, Hkv, D] at slots[t] of the pools. Slots must be distinct.

    Pools are of the same dtype, or e4m3: those hold what is stored divided by `kv_scale` (of the
    keys, of the values; in fp32), rounded once, and at most 448 in magnitude. Other pools have the
    scale 1.
    """
    blocks, offsets = slots // BLOCK_SIZE, slots % BLOCK_SIZE
    for rows, pool, scale in ((k, k_pool, kv_scale[0]), (v, v_pool, kv_scale[1])):
        if pool.dtype == torch.float8_e4m3fn:
            rows = (rows.float() / scale).clamp(-_LARGEST, _LARGEST)
        pool[blocks, :, offsets] = rows.to(pool.dtype)


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
    """rotary(q, k, cos, sin), then write_kv of what k holds then, and of v."""
    rotary(q, k, cos, sin)
    write_kv(k, v, k_pool, v_pool, slots, kv_scale)


def copy_blocks(pools: Sequence[torch.Tensor], copies: Sequence[tuple[int, int]]) -> None:
    """For each (source, target), one after another in order: the block `target` of every pool
    becomes what the block `source` is at that time."""
    for source, target in copies:
        for pool in pools:
            pool[target].copy_(pool[source])


def gather_blocks(pools: Sequence[torch.Tensor], blocks: Sequence[int], rows: torch.Tensor) -> None:
    """The first rows of `rows` [n, pools * numbers of a block] become these blocks of all pools,
    one pool after another in a row."""
    for block, row in zip(blocks, rows[: len(blocks)], strict=True):
        for pool, part in zip(pools, row.chunk(len(pools)), strict=True):
            part.copy_(pool[block].reshape(-1))


def scatter_blocks(
    rows: torch.Tensor, pools: Sequence[torch.Tensor], blocks: Sequence[int]
) -> None:
    """The way back, one row after another: a block that comes twice has the later row."""
    for block, row in zip(blocks, rows[: len(blocks)], strict=True):
        for pool, part in zip(pools, row.chunk(len(pools)), strict=True):
            pool[block].view(-1).copy_(part)

"""Writes into the KV pools in plain torch: the specification. A pool is [blocks, Hkv, 16, D]."""

import torch

from quantd.kernels.batch import BLOCK_SIZE


def write_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    """Stores row t of k and v [T, Hkv, D] at slots[t] of the pools. Slots must be distinct."""
    blocks, offsets = slots // BLOCK_SIZE, slots % BLOCK_SIZE
    k_pool[blocks, :, offsets] = k
    v_pool[blocks, :, offsets] = v

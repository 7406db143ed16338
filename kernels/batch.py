"""The ragged batch of one step, as attention sees it."""

from dataclasses import dataclass

import torch

BLOCK_SIZE = 16
"""Tokens in a KV block: fixed, because the pool's layout and every kernel are built on it."""


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """Which rows belong to which sequence, and where their keys lie. All tensors contiguous and on
    the device of the pools; nothing here is mutated by an operation.

    Row t of sequence s (query_start[s] <= t < query_start[s+1]) stands at the absolute position
    kv_len[s] - (query_start[s+1] - t), and its own key is in the pool when attention runs.
    """

    query_start: torch.Tensor
    """int32 [S+1]: rows of sequence s are [query_start[s], query_start[s+1])."""
    kv_len: torch.Tensor
    """int32 [S]: keys visible to the last row of s, that is its absolute position + 1."""
    block_table: torch.Tensor
    """int32 [S, M]: block ids in order of position, padded with 0."""
    slots: torch.Tensor
    """int64 [T]: where row t's key and value go, block * BLOCK_SIZE + offset."""
    positions: torch.Tensor
    """int64 [T]: absolute positions, for the rotary tables."""

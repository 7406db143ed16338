"""Causal attention of a ragged batch over the paged KV pools in plain torch: the specification."""

from dataclasses import dataclass

import torch

from quantd.kernels.batch import BLOCK_SIZE, AttentionBatch

_MAX_SCORES = 1 << 24
"""Scores held at once (64 MiB of fp32), so that a long prompt does not need Hq * T * kv_len."""


@dataclass(frozen=True, slots=True)
class _Scoring:
    scale: float
    window: int | None
    softcap: float | None
    sinks: torch.Tensor | None


def paged_attention(
    q: torch.Tensor,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    batch: AttentionBatch,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    kv_scale: tuple[float, float] = (1.0, 1.0),
) -> torch.Tensor:
    """q [T, Hq, D] (a view or not), pools [blocks, Hkv, 16, D] -> a new tensor [T, Hq, D].

    A row at position p attends the keys [max(0, p - window + 1), p]. Scores are q.k * scale, then
    softcap * tanh(score / softcap) if given, then softmax in fp32. Query head h reads KV head
    h // (Hq / Hkv). sinks fp32 [Hq]: one more logit per head that takes part in the softmax but
    has no value. Keys and values are what the pools hold times `kv_scale` (see `write_kv`).
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    scoring = _Scoring(scale, window, softcap, sinks)
    starts = batch.query_start.tolist()
    for s, kv_len in enumerate(batch.kv_len.tolist()):
        start, stop = starts[s], starts[s + 1]
        blocks = batch.block_table[s, : -(-kv_len // BLOCK_SIZE)].long()
        keys, values = (
            _gather(pool, blocks, kv_len) * factor
            for pool, factor in zip((k_pool, v_pool), kv_scale, strict=True)
        )
        step = max(1, _MAX_SCORES // (q.shape[1] * kv_len))
        for row in range(start, stop, step):
            end = min(row + step, stop)
            out[row:end] = _attend(q[row:end], keys, values, kv_len - (stop - row), scoring)
    return out


def _gather(pool: torch.Tensor, blocks: torch.Tensor, kv_len: int) -> torch.Tensor:
    """The first kv_len rows of a sequence as [Hkv, kv_len, D] in fp32 or wider."""
    rows = pool[blocks].transpose(0, 1).flatten(1, 2)[:, :kv_len]
    return rows.to(torch.float64 if pool.dtype == torch.float64 else torch.float32)


def _attend(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    first: int,
    scoring: _Scoring,
) -> torch.Tensor:
    """Rows at positions first, first + 1, ... of one sequence over its keys [Hkv, kv_len, D]."""
    num_rows, num_heads, head_dim = q.shape
    num_kv_heads, kv_len, _ = keys.shape
    grouped = q.to(keys.dtype).reshape(num_rows, num_kv_heads, -1, head_dim).permute(1, 2, 0, 3)
    scores = grouped @ keys.transpose(1, 2)[:, None] * scoring.scale
    if scoring.softcap is not None:
        scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
    position = torch.arange(first, first + num_rows, device=q.device)[:, None]
    key = torch.arange(kv_len, device=q.device)
    visible = key <= position
    if scoring.window is not None:
        visible &= key > position - scoring.window
    scores = scores.masked_fill(~visible, float("-inf"))
    if scoring.sinks is not None:
        sink = (
            scoring.sinks.to(scores.dtype).view(num_kv_heads, -1, 1, 1).expand(*scores.shape[:3], 1)
        )
        weights = torch.softmax(torch.cat((scores, sink), dim=-1), dim=-1)[..., :-1]
    else:
        weights = torch.softmax(scores, dim=-1)
    out = (weights @ values[:, None]).permute(2, 0, 1, 3)
    return out.reshape(num_rows, num_heads, head_dim).to(q.dtype)

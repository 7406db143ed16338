"""The one decoder: T tokens of a ragged batch in, hidden states of the rows that are asked for out.

The residual stream is one tensor, updated in place; each block (attention, feed-forward) yields a
`delta` that the next norm adds to it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantd.daemon.worker.loader import Weights
from quantd.daemon.worker.memory import KvPools
from quantd.daemon.worker.models.config import LayerConfig, ModelConfig
from quantd.daemon.worker.models.moe import Experts, FeedForward
from quantd.daemon.worker.models.rope import RopeTable
from quantd.kernels import ops
from quantd.plugins.api import QuantLinear


@dataclass(frozen=True, slots=True)
class _Layer:
    config: LayerConfig
    qkv: QuantLinear
    o: QuantLinear
    feed_forward: FeedForward | Experts
    norm_before_attention: Tensor | None
    norm_after_attention: Tensor | None
    norm_before_mlp: Tensor | None
    norm_after_mlp: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None


class Decoder:
    """Owns the weights and the rope tables; the KV pools come with each call. Mutates nothing but
    the pools, so a step that failed may be run again."""

    def __init__(
        self, config: ModelConfig, weights: Weights, dtype: torch.dtype, max_context: int
    ) -> None:
        self._config = config
        self._dtype = dtype
        self._embedding = weights.embedding
        # Rounded to the activations' type, as Gemma's was when it was trained.
        self._embedding_scale = torch.tensor(config.embedding_scale, dtype=dtype).item()
        device = weights.embedding.device
        self._ropes = tuple(RopeTable(rope, max_context, device) for rope in config.ropes)
        self._layers = tuple(
            _layer(config, weights, i, layer) for i, layer in enumerate(config.layers)
        )
        self._norm = weights.vectors["model.norm"]
        self._lm_head = weights.linears.get("lm_head")
        """None: nobody will ask for logits."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the hidden states."""
        return self._dtype

    def reserve(self, stop: int) -> None:
        """Nothing of the decoder moves in memory while positions are below `stop`: what was
        recorded of it stays valid."""
        for rope in self._ropes:
            rope.reserve(stop)

    @property
    def waits(self) -> bool:
        """On a GPU: `forward` waits for it and cannot be recorded, because the weights of some
        experts are not stacked."""
        parts = [layer.feed_forward for layer in self._layers]
        return any(isinstance(part, Experts) and part.stacked is None for part in parts)

    def forward(
        self,
        tokens: Tensor,
        batch: ops.AttentionBatch,
        stop: int,
        pools: KvPools,
        rows: Tensor | None,
    ) -> Tensor:
        """tokens int64 [T], all positions below `stop`; writes keys and values into the pools.

        Returns the normalized hidden states [n, hidden] of `rows` (int64 [n]), of all rows for
        None. What only other rows need of the last layer is not computed.
        """
        eps = self._config.norm_eps
        tables = [rope.at(batch.positions, stop) for rope in self._ropes]
        residual = self._embedding(tokens, self._dtype)
        if self._embedding_scale != 1.0:
            residual = residual * self._embedding_scale
        delta: Tensor | None = None
        last = len(self._layers) - 1
        for i, layer in enumerate(self._layers):
            x = _add_norm(delta, residual, layer.norm_before_attention, eps)
            rope = layer.config.rope
            table = None if rope is None else tables[rope]
            delta = self._attention(layer, x, batch, table, pools.keys[i], pools.values[i])
            if i == last and rows is not None:
                delta, residual = delta.index_select(0, rows), residual.index_select(0, rows)
            delta = self._finish(layer.o(delta), layer.norm_after_attention)
            x = _add_norm(delta, residual, layer.norm_before_mlp, eps)
            delta = self._finish(layer.feed_forward(x), layer.norm_after_mlp)
        return _add_norm(delta, residual, self._norm, eps)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [n, hidden] as `forward` returned it -> [n, vocab], in the activations' type, or
        in fp32 where the family scales or caps them."""
        assert self._lm_head is not None
        out = self._lm_head(hidden)
        cap = self._config.logits_softcap
        if self._config.logits_scale != 1.0:
            out = out.float() * self._config.logits_scale
        if cap is not None:
            out = torch.tanh(out.float() / cap) * cap
        return out

    def _attention(
        self,
        layer: _Layer,
        x: Tensor,
        batch: ops.AttentionBatch,
        table: tuple[Tensor, Tensor] | None,
        keys: Tensor,
        values: Tensor,
    ) -> Tensor:
        """x [T, hidden] -> [T, heads * head_dim], not yet projected."""
        config = self._config
        heads, kv_heads = config.num_heads, config.num_kv_heads
        qkv = layer.qkv(x)
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = _normed(qkv, layer.q_norm, layer.k_norm, config)
            v = qkv.view(len(x), -1, config.head_dim)[:, heads + kv_heads :]
        else:
            q, k, v = torch.split_with_sizes(
                qkv.view(len(x), -1, config.head_dim), (heads, kv_heads, kv_heads), 1
            )
        if table is None:
            ops.write_kv(k, v, keys, values, batch.slots)
        else:
            ops.rotary_write_kv(q, k, v, *table, keys, values, batch.slots)
        out = ops.paged_attention(
            q,
            keys,
            values,
            batch,
            config.scale,
            layer.config.window,
            config.attention_softcap,
            None,
        )
        return out.view(len(x), -1)

    def _finish(self, delta: Tensor, norm: Tensor | None) -> Tensor:
        """What a block adds to the residual, from its last projection."""
        if norm is not None:
            delta = ops.rms_norm(delta, norm, self._config.norm_eps)
        if self._config.residual_scale != 1.0:
            delta = delta * self._config.residual_scale
        return delta


def _add_norm(delta: Tensor | None, residual: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Adds `delta` into the residual, in place, and returns what the next block reads."""
    if weight is None:
        return residual if delta is None else residual.add_(delta)
    if delta is None:
        return ops.rms_norm(residual, weight, eps)
    return ops.add_rms_norm(delta, residual, weight, eps)


def _normed(
    qkv: Tensor, q_norm: Tensor, k_norm: Tensor, config: ModelConfig
) -> tuple[Tensor, Tensor]:
    """Queries and keys [T, heads, head_dim], each normalized over as much as its weight spans."""
    rows, middle = len(qkv), config.num_heads * config.head_dim
    end = middle + config.num_kv_heads * config.head_dim
    q = qkv[:, :middle].view(rows, -1, len(q_norm))
    k = qkv[:, middle:end].view(rows, -1, len(k_norm))
    q = ops.rms_norm(q, q_norm, config.norm_eps)
    k = ops.rms_norm(k, k_norm, config.norm_eps)
    return q.view(rows, -1, config.head_dim), k.view(rows, -1, config.head_dim)


def _layer(config: ModelConfig, weights: Weights, index: int, layer: LayerConfig) -> _Layer:
    at = f"model.layers.{index}."
    before, after, both = (config.norms == kind for kind in ("before", "after", "both"))

    def vector(name: str, present: bool = True) -> Tensor | None:
        return weights.vectors[f"{at}{name}"] if present else None

    qk_norm = config.qk_norm is not None
    return _Layer(
        config=layer,
        qkv=weights.linears[f"{at}self_attn.qkv_proj"],
        o=weights.linears[f"{at}self_attn.o_proj"],
        feed_forward=_experts(config, weights, f"{at}mlp.")
        if layer.experts
        else _feed_forward(config, weights, f"{at}mlp."),
        norm_before_attention=vector("input_layernorm", before or both),
        norm_after_attention=vector("post_attention_layernorm", after or both),
        # The oldest families call it by where it stands: after the attention.
        norm_before_mlp=vector("post_attention_layernorm")
        if before
        else vector("pre_feedforward_layernorm", both),
        norm_after_mlp=vector("post_feedforward_layernorm", after or both),
        q_norm=vector("self_attn.q_norm", qk_norm),
        k_norm=vector("self_attn.k_norm", qk_norm),
    )


def _feed_forward(config: ModelConfig, weights: Weights, at: str) -> FeedForward:
    return FeedForward(
        weights.linears[f"{at}gate_up_proj"], weights.linears[f"{at}down_proj"], config.activation
    )


def _experts(config: ModelConfig, weights: Weights, at: str) -> Experts:
    moe = config.moe
    assert moe is not None
    experts = [
        _feed_forward(config, weights, f"{at}experts.{expert}.")
        for expert in range(moe.num_experts)
    ]
    return Experts(
        weights.linears[f"{at}gate"],
        experts,
        moe.top_k,
        moe.renormalize,
        _stacked(config, weights, at),
    )


def _stacked(config: ModelConfig, weights: Weights, at: str) -> ops.StackedExperts | None:
    gate_up, down = (
        weights.stacks.get(f"{at}experts.{leaf}") for leaf in ("gate_up_proj", "down_proj")
    )
    if gate_up is None or down is None:
        return None
    return ops.stacked_experts(gate_up, down, config.activation)

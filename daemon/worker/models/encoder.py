"""The one encoder: the rows of a ragged batch in, their hidden states out. It keeps nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantd.daemon.worker.loader import Weights
from quantd.daemon.worker.models.encoder_config import EncoderConfig
from quantd.kernels import ops
from quantd.plugins.api import QuantLinear


@dataclass(frozen=True, slots=True)
class _Norm:
    weight: Tensor
    bias: Tensor


@dataclass(frozen=True, slots=True)
class _Layer:
    qkv: QuantLinear
    o: QuantLinear
    norm_after_attention: _Norm
    up: QuantLinear
    down: QuantLinear
    norm_after_mlp: _Norm


class Encoder:
    """BERT (Devlin et al., 2018) and RoBERTa (Liu et al., 2019). Owns the weights."""

    def __init__(self, config: EncoderConfig, weights: Weights, dtype: torch.dtype) -> None:
        self._config = config
        self._dtype = dtype
        self._embedding = weights.embedding
        self._positions = weights.tables["positions"]
        self._types = weights.tables["token_types"]
        self._norm = _norm(weights, "norm")
        self._layers = tuple(_layer(weights, i) for i in range(config.num_layers))
        self._dense = weights.linears.get("head.dense")
        self._score = weights.linears.get("head.score")

    def forward(
        self, tokens: Tensor, positions: Tensor, types: Tensor, starts: Sequence[int]
    ) -> Tensor:
        """tokens, positions (rows of the table) and token types int64 [T]; sequence s is the rows
        [starts[s], starts[s + 1]). Returns the last hidden states [T, hidden]."""
        x = self._embedding(tokens, torch.float32)
        x += self._types[types]
        x += self._positions[positions]
        hidden = self._normed(x, self._norm)
        for layer in self._layers:
            hidden = self._normed(
                layer.o(self._attention(layer, hidden, starts)), layer.norm_after_attention, hidden
            )
            inner = ops.activate(layer.up(hidden), self._config.activation)
            hidden = self._normed(layer.down(inner), layer.norm_after_mlp, hidden)
        return hidden

    def score(self, hidden: Tensor) -> Tensor:
        """The hidden states [n, hidden] of n sequences' first tokens -> the head's logits fp32
        [n, labels]."""
        assert self._dense is not None and self._score is not None
        # Row by row, for the same bits in any batch: see `ops.activate`.
        inner = torch.stack([torch.tanh(row) for row in self._dense(hidden)])
        return self._score(inner).float()

    def _attention(self, layer: _Layer, x: Tensor, starts: Sequence[int]) -> Tensor:
        config = self._config
        qkv = layer.qkv(x).view(len(x), 3, config.num_heads, config.head_dim)
        q, k, v = qkv.unbind(1)
        out = ops.encoder_attention(q, k, v, starts, config.head_dim**-0.5)
        return out.view(len(x), -1)

    def _normed(self, x: Tensor, norm: _Norm, residual: Tensor | None = None) -> Tensor:
        """The norm of the sum, which is not rounded before."""
        if residual is not None:
            x = x.float() + residual.float()
        return ops.layer_norm(x, norm.weight, norm.bias, self._config.norm_eps, self._dtype)


def _norm(weights: Weights, name: str) -> _Norm:
    return _Norm(weights.vectors[f"model.{name}.weight"], weights.vectors[f"model.{name}.bias"])


def _layer(weights: Weights, index: int) -> _Layer:
    at = f"layers.{index}."
    linears = weights.linears
    return _Layer(
        qkv=linears[f"model.{at}self_attn.qkv_proj"],
        o=linears[f"model.{at}self_attn.o_proj"],
        norm_after_attention=_norm(weights, f"{at}post_attention_layernorm"),
        up=linears[f"model.{at}mlp.up_proj"],
        down=linears[f"model.{at}mlp.down_proj"],
        norm_after_mlp=_norm(weights, f"{at}post_feedforward_layernorm"),
    )

"""config.json of an encoder, and which tensors it is made of, under the names of transformers.

BERT and RoBERTa (which XLM-RoBERTa and CamemBERT are but for their vocabulary) differ in three
things: where positions begin, the names of the head, and the prefix.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from quantd.daemon.worker.models.families import read_activation
from quantd.daemon.worker.models.fields import Fields
from quantd.daemon.worker.models.names import ModelTensors, Table, Vector
from quantd.kernels.ops import Activation
from quantd.plugins.api import LinearSpec, Refused

_FAMILIES = ("Bert", "Roberta", "XLMRoberta", "Camembert")
_KINDS = ("Model", "ForMaskedLM", "ForSequenceClassification")
ENCODERS = frozenset(f"{family}{kind}" for family in _FAMILIES for kind in _KINDS)
_PREFIXES = ("", "bert.", "roberta.")
_UNREAD = ("cls.", "lm_head.")
"""Of a masked language model: what predicts words."""


@dataclass(frozen=True, slots=True)
class EncoderConfig:
    """What an encoder is made of: absolute positions, norms after each block."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_layers: int
    num_positions: int
    """Rows of the table of positions."""
    num_types: int
    norm_eps: float
    activation: Activation
    dtype: str | None
    """As config.json has it; None: absent."""
    padding: int | None
    """RoBERTa's: positions begin behind it, and tokens of this id have none of their own. None:
    positions begin at 0."""
    num_labels: int | None
    """Of the head; None: there is none."""
    tied: bool = True
    """There is no output layer over the vocabulary."""
    norm_offset: float = 0.0

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def context_limit(self) -> int:
        """Tokens for which there are positions."""
        return self.num_positions - (0 if self.padding is None else self.padding + 1)


def read_encoder(raw: Mapping[str, Any]) -> EncoderConfig:
    """Raises Refused for what is not understood. `architectures` is known to name an encoder; the
    defaults are those of transformers."""
    name = str(raw["architectures"][0])
    roberta = not name.startswith("Bert")
    f = Fields(raw, {"hidden_act": "gelu"})
    hidden, heads = f.integer("hidden_size", 768), f.integer("num_attention_heads", 12)
    if hidden % heads:
        raise f.wrong("hidden_size", f"a multiple of num_attention_heads, {heads}")
    if f.text("position_embedding_type", "absolute") != "absolute":
        raise f.wrong("position_embedding_type", "absolute")
    for flag in ("is_decoder", "add_cross_attention"):
        if f.flag(flag, False):
            raise f.wrong(flag, "false")
    padding = f.integer("pad_token_id", 1) if roberta else None
    return EncoderConfig(
        architecture=name,
        vocab_size=f.integer("vocab_size", 50265 if name.startswith("Roberta") else 30522),
        hidden_size=hidden,
        intermediate_size=f.integer("intermediate_size", 3072),
        num_heads=heads,
        num_layers=f.integer("num_hidden_layers", 12),
        num_positions=f.integer("max_position_embeddings", 512),
        num_types=f.integer("type_vocab_size", 2),
        norm_eps=f.number("layer_norm_eps", 1e-12),
        activation=read_activation(f, "hidden_act"),
        dtype=f.value("dtype", f.value("torch_dtype")),
        padding=padding,
        num_labels=_num_labels(f) if name.endswith("ForSequenceClassification") else None,
    )


def _num_labels(f: Fields) -> int:
    """transformers writes the labels' names, of which two are the default, and not their number."""
    labels = f.value("id2label")
    return len(labels) if isinstance(labels, Mapping) else int(f.value("num_labels", 2))


def encoder_tensors(
    config: EncoderConfig, dtype: torch.dtype, names: Collection[str], exact: bool = False
) -> ModelTensors:
    """`names` are the checkpoint's, `exact` what every layer's spec says."""
    word = "embeddings.word_embeddings.weight"
    prefix = next((prefix for prefix in _PREFIXES if f"{prefix}{word}" in names), "")
    return _Builder(config, dtype, frozenset(names), prefix, exact).build()


class _Builder:
    def __init__(
        self,
        config: EncoderConfig,
        dtype: torch.dtype,
        names: frozenset[str],
        prefix: str,
        exact: bool,
    ) -> None:
        self._config = config
        self._dtype = dtype
        self._names = names
        self._prefix = prefix
        self._exact = exact
        self._tensors = ModelTensors(f"{prefix}embeddings.word_embeddings.weight")

    def build(self) -> ModelTensors:
        config, at = self._config, f"{self._prefix}embeddings."
        tables = {"positions": config.num_positions, "token_types": config.num_types}
        sources = ("position_embeddings", "token_type_embeddings")
        for (name, rows), source in zip(tables.items(), sources, strict=True):
            self._tensors.tables[name] = Table(f"{at}{source}.weight", rows, config.hidden_size)
        self._norm("norm", at)
        for i in range(config.num_layers):
            self._layer(f"layers.{i}.", f"{self._prefix}encoder.layer.{i}.")
        if config.num_labels is not None:
            self._head(config.num_labels)
        self._tensors.is_ignored = self._is_ignored
        return self._tensors

    def _layer(self, ours: str, at: str) -> None:
        hidden, inner = self._config.hidden_size, self._config.intermediate_size
        parts = tuple(f"{at}attention.self.{part}" for part in ("query", "key", "value"))
        self._linear(f"model.{ours}self_attn.qkv_proj", parts, hidden, (hidden,) * 3)
        output = f"{at}attention.output."
        self._linear(f"model.{ours}self_attn.o_proj", (f"{output}dense",), hidden, (hidden,))
        self._norm(f"{ours}post_attention_layernorm", output)
        up, down = f"{at}intermediate.dense", f"{at}output.dense"
        self._linear(f"model.{ours}mlp.up_proj", (up,), hidden, (inner,))
        self._linear(f"model.{ours}mlp.down_proj", (down,), inner, (hidden,))
        self._norm(f"{ours}post_feedforward_layernorm", f"{at}output.")

    def _head(self, num_labels: int) -> None:
        hidden = self._config.hidden_size
        bert = self._config.padding is None
        dense = f"{self._prefix}pooler.dense" if bert else "classifier.dense"
        self._linear("head.dense", (dense,), hidden, (hidden,))
        out = "classifier" if bert else "classifier.out_proj"
        self._linear("head.score", (out,), hidden, (num_labels,))

    def _is_ignored(self, name: str) -> bool:
        # Old checkpoints hold the numbers of the positions; the pooler is for a task of training.
        unread = (*_UNREAD, f"{self._prefix}pooler.")
        return name.startswith(unread) or name.endswith(".position_ids")

    def _linear(
        self, name: str, parts: tuple[str, ...], in_features: int, splits: tuple[int, ...]
    ) -> None:
        self._tensors.linears[name] = LinearSpec(
            name, in_features, splits, parts, self._dtype, True, self._exact
        )

    def _norm(self, name: str, at: str) -> None:
        """The first BERT checkpoints call weight and bias gamma and beta."""
        old = f"{at}LayerNorm.gamma" in self._names
        for ours, theirs in (("weight", "gamma"), ("bias", "beta")):
            source = f"{at}LayerNorm.{theirs if old else ours}"
            self._tensors.vectors[f"model.{name}.{ours}"] = Vector(source, self._config.hidden_size)


def refuse_labels(config: EncoderConfig) -> None:
    """Raises Refused for a classifier of several labels, whose scores are no relevance."""
    if config.num_labels != 1:
        raise Refused(
            f"{config.architecture} has {config.num_labels} labels; a reranker has 1, and "
            "classification is not served"
        )

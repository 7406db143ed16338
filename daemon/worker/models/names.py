"""Which tensors of a checkpoint a decoder is made of, under the names of transformers.

Queries, keys and values are one layer here, and so are gate and up, whether the checkpoint stores
them apart or (Phi-3) fused. The names below are therefore those of the fused layers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch

from quantd.daemon.worker.models.config import CheckpointConfig, ModelConfig
from quantd.plugins.api import LinearSpec

_OTHER_MODALITIES = (
    "vision_tower.",
    "multi_modal_projector.",
    "model.vision_tower.",
    "model.multi_modal_projector.",
)
_PREFIXES = ("model.", "language_model.model.", "model.language_model.", "")
"""Nothing where the decoder was saved alone, without its output layer."""
_BUFFERS = ("rotary_emb.inv_freq", "masked_bias", "attn.bias")
"""Tensors of old checkpoints that hold what is computed."""


@dataclass(slots=True)
class Vector:
    """A norm's weight, or its bias."""

    source: str
    size: int


@dataclass(slots=True)
class Table:
    """Rows that are added to embeddings: of positions, of token types."""

    source: str
    rows: int
    columns: int


@dataclass(slots=True)
class ModelTensors:
    """Everything to load, by our names, all under "model." but the output layer, "lm_head"."""

    embedding: str
    """The table's name in the checkpoint."""
    linears: dict[str, LinearSpec] = field(default_factory=dict)
    experts: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """The linear layers of a mixture that are the same one of each expert, in order of the experts:
    under "model.layers.0.mlp.experts.down_proj" and the like."""
    vectors: dict[str, Vector] = field(default_factory=dict)
    tables: dict[str, Table] = field(default_factory=dict)
    is_ignored: Callable[[str], bool] = lambda name: False
    """Tensors that a checkpoint may hold although they are not read."""


def model_tensors(
    config: ModelConfig,
    dtype: torch.dtype,
    names: Collection[str] = (),
    exact: bool = False,
    head: bool = True,
) -> ModelTensors:
    """`names` are the checkpoint's: they tell under which prefix the decoder stands. `exact` is
    what every layer's spec says. head: with the output layer."""
    tensors = _Builder(config, _prefix(names), dtype, exact).build()
    if not head:
        del tensors.linears["lm_head"]
    tensors.is_ignored = partial(_is_ignored, config, head)
    return tensors


def _is_ignored(config: ModelConfig, head: bool, name: str) -> bool:
    if name.endswith(_BUFFERS):
        return True
    if (config.tied or not head) and name.endswith("lm_head.weight"):
        return True
    multimodal = config.architecture.endswith("ForConditionalGeneration")
    return multimodal and name.startswith(_OTHER_MODALITIES)


def _prefix(names: Collection[str]) -> str:
    for prefix in _PREFIXES:
        if f"{prefix}embed_tokens.weight" in names:
            return prefix
    return _PREFIXES[0]


class _Builder:
    def __init__(self, config: ModelConfig, prefix: str, dtype: torch.dtype, exact: bool) -> None:
        self._config = config
        self._dtype = dtype
        self._exact = exact
        self._prefix = prefix
        self._fused = config.architecture == "Phi3ForCausalLM"
        self._tensors = ModelTensors(f"{prefix}embed_tokens.weight")

    def build(self) -> ModelTensors:
        config = self._config
        self._vector("norm", config.hidden_size)
        # The output layer of a multimodal checkpoint stands beside its "model.".
        outer = "language_model." if self._prefix == "language_model.model." else ""
        part = f"{self._prefix}embed_tokens" if config.tied else f"{outer}lm_head"
        self._tensors.linears["lm_head"] = LinearSpec(
            "lm_head",
            config.hidden_size,
            (config.vocab_size,),
            (part,),
            self._dtype,
            exact=self._exact,
        )
        for i, layer in enumerate(config.layers):
            self._norms(f"layers.{i}.")
            self._attention(f"layers.{i}.self_attn.")
            if layer.experts:
                self._experts(i)
            else:
                size = config.intermediate_size
                self._feed_forward(f"layers.{i}.mlp.", size, ("gate_proj", "up_proj", "down_proj"))
        return self._tensors

    def _norms(self, layer: str) -> None:
        kinds = {
            "before": ("input_layernorm", "post_attention_layernorm"),
            "after": ("post_attention_layernorm", "post_feedforward_layernorm"),
            "both": (
                "input_layernorm",
                "post_attention_layernorm",
                "pre_feedforward_layernorm",
                "post_feedforward_layernorm",
            ),
        }
        for name in kinds[self._config.norms]:
            self._vector(f"{layer}{name}", self._config.hidden_size)

    def _attention(self, at: str) -> None:
        config = self._config
        queries = config.num_heads * config.head_dim
        keys = config.num_kv_heads * config.head_dim
        parts = ("qkv_proj",) if self._fused else ("q_proj", "k_proj", "v_proj")
        splits = (queries, keys, keys)
        self._linear(f"{at}qkv_proj", at, parts, config.hidden_size, splits, config.qkv_bias)
        self._linear(f"{at}o_proj", at, ("o_proj",), queries, (config.hidden_size,), config.o_bias)
        if config.qk_norm is not None:
            whole = config.qk_norm == "projection"
            self._vector(f"{at}q_norm", queries if whole else config.head_dim)
            self._vector(f"{at}k_norm", keys if whole else config.head_dim)

    def _experts(self, layer: int) -> None:
        moe = self._config.moe
        assert moe is not None
        mixtral = self._config.architecture == "MixtralForCausalLM"
        at = f"layers.{layer}.{'block_sparse_moe' if mixtral else 'mlp'}."
        leaves = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
        ours = f"layers.{layer}.mlp."
        self._linear(
            f"{ours}gate", at, ("gate",), self._config.hidden_size, (moe.num_experts,), False
        )
        for expert in range(moe.num_experts):
            self._feed_forward(
                f"{ours}experts.{expert}.",
                moe.intermediate_size,
                leaves,
                f"{at}experts.{expert}.",
            )
        for leaf in ("gate_up_proj", "down_proj"):
            self._tensors.experts[f"model.{ours}experts.{leaf}"] = tuple(
                f"model.{ours}experts.{expert}.{leaf}" for expert in range(moe.num_experts)
            )

    def _feed_forward(
        self, ours: str, size: int, leaves: tuple[str, str, str], at: str | None = None
    ) -> None:
        """`leaves` are the checkpoint's gate, up and down, under `at` (None: as ours)."""
        at = ours if at is None else at
        hidden, bias = self._config.hidden_size, self._config.mlp_bias
        gate, up, down = leaves
        parts = ("gate_up_proj",) if self._fused else (gate, up)
        self._linear(f"{ours}gate_up_proj", at, parts, hidden, (size, size), bias)
        self._linear(f"{ours}down_proj", at, (down,), size, (hidden,), bias)

    def _linear(
        self,
        name: str,
        at: str,
        leaves: tuple[str, ...],
        in_features: int,
        splits: tuple[int, ...],
        bias: bool,
    ) -> None:
        parts = tuple(f"{self._prefix}{at}{leaf}" for leaf in leaves)
        ours = f"model.{name}"
        self._tensors.linears[ours] = LinearSpec(
            ours, in_features, splits, parts, self._dtype, bias, self._exact
        )

    def _vector(self, name: str, size: int) -> None:
        self._tensors.vectors[f"model.{name}"] = Vector(f"{self._prefix}{name}.weight", size)


def dense_shapes(
    tensors: ModelTensors, config: CheckpointConfig
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor of an unquantized checkpoint, for weights that are made up."""
    yield tensors.embedding, (config.vocab_size, config.hidden_size)
    for vector in tensors.vectors.values():
        yield vector.source, (vector.size,)
    for table in tensors.tables.values():
        yield table.source, (table.rows, table.columns)
    for spec in tensors.linears.values():
        for part, rows in zip(spec.parts, spec.part_rows, strict=True):
            yield f"{part}.weight", (rows, spec.in_features)
            if spec.bias:
                yield f"{part}.bias", (rows,)

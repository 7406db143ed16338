"""What a decoder is made of.

Everything in which the families differ is a value here, so that there is one decoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from quantd.daemon.worker.models.rope import RopeConfig
from quantd.kernels.ops import Activation


class CheckpointConfig(Protocol):
    """What is asked of a model's configuration while a checkpoint is loaded."""

    @property
    def architecture(self) -> str: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def hidden_size(self) -> int: ...

    @property
    def tied(self) -> bool: ...

    @property
    def norm_offset(self) -> float: ...


@dataclass(frozen=True, slots=True)
class LayerConfig:
    """In what one layer may differ from its neighbours."""

    window: int | None = None
    """A row sees this many keys, its own included; None: all."""
    rope: int | None = 0
    """Index into `ModelConfig.ropes`; None: no positions at all."""
    experts: bool = False
    """Its feed-forward part is a mixture of experts."""


@dataclass(frozen=True, slots=True)
class MoeConfig:
    num_experts: int
    top_k: int
    intermediate_size: int
    """Of one expert."""
    renormalize: bool
    """The weights of the chosen experts are made to sum to 1."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    architecture: str
    vocab_size: int
    """Rows of the embedding table, padding included."""
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layers: tuple[LayerConfig, ...]
    ropes: tuple[RopeConfig, ...]
    norm_eps: float
    activation: Activation
    scale: float
    """Of attention scores."""
    tied: bool
    """The output layer is the embedding table."""
    dtype: str | None
    """As config.json has it; None: absent."""
    norms: Literal["before", "after", "both"] = "before"
    """Where a layer's two blocks (attention, feed-forward) have their norms."""
    norm_offset: float = 0.0
    """Added to the norms' weights as they are stored."""
    qk_norm: Literal["head", "projection"] | None = None
    """Norm of queries and keys, over each head or over the whole projection."""
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    attention_softcap: float | None = None
    logits_softcap: float | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    """Of what each block adds to the residual."""
    logits_scale: float = 1.0
    moe: MoeConfig | None = None

    @property
    def default_context(self) -> int:
        return self.ropes[0].default_context

    @property
    def context_limit(self) -> int:
        """The longest max_context that may be configured."""
        return self.ropes[0].context_limit

"""All that the author of a quantization format reads.

A format is a class that satisfies `Quantizer`, registered under the entry point group
`quantd.quantizers`. The worker makes one instance without arguments, asks it about each linear
layer of a model, and calls the `QuantLinear` that it returned. Model code never sees bits.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from quantd.kernels import ops

api_version = 1
"""Raised when a change here breaks a plug-in that was written for the version before."""


class Refused(Exception):
    """The checkpoint is not understood, and loading it again cannot help. The text is for users."""


@dataclass(frozen=True, slots=True)
class LinearSpec:
    """One linear layer as the model runs it, which may be several of the checkpoint's in a row."""

    name: str
    """The layer's own name, what rules match: "model.layers.0.self_attn.qkv_proj"."""
    in_features: int
    out_splits: tuple[int, ...]
    """Rows of each logical part: (q, k, v), (gate, up) or one number."""
    parts: tuple[str, ...]
    """The checkpoint's modules whose rows, one after the other, are the layer's: one per split, or
    one that holds all splits already."""
    dtype: torch.dtype
    """Of the activations that come in and go out."""
    bias: bool = False
    """Every part has a bias, or none has."""
    exact: bool = False
    """Multiply by the weights exactly as the format defines them, and do not round activations:
    what a user asks for with dtype = "float32". Otherwise speed may cost a stated error."""
    rank: int = 0
    world: int = 1
    sharded_dim: int | None = None
    """0: rows are split over the ranks, 1: columns, None: every rank has all."""

    @property
    def out_features(self) -> int:
        return sum(self.out_splits)

    @property
    def part_rows(self) -> tuple[int, ...]:
        """Rows of each of `parts`."""
        return self.out_splits if len(self.parts) > 1 else (self.out_features,)


class TensorSource(Protocol):
    """The tensors of a checkpoint. Any thread may read; nothing is copied until it is asked for."""

    @property
    def config(self) -> Mapping[str, Any]:
        """config.json as it is."""

    def names(self) -> Collection[str]: ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Raises KeyError when there is no such tensor."""

    def dtype(self, name: str) -> str:
        """As the file format spells it: "BF16", "F16", "F32", "I32", ..."""

    def read(self, name: str) -> Tensor:
        """The tensor as a view of mapped memory, in its stored dtype. Never written to, and not
        kept by who reads it, except where a copy on each use is meant (a table of embeddings)."""

    def release(self, name: str) -> None:
        """The caller is done with what `read` gave: its pages go back to the system. A view that
        is used nevertheless stays right, it only reads the file again."""


class QuantLinear(Protocol):
    """A loaded layer."""

    @property
    def nbytes(self) -> int:
        """Bytes that the weights hold."""

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, in_features] -> [T, out_features], both of the spec's dtype and contiguous."""

    def dequantize(self) -> Tensor:
        """The weight [out_features, in_features] that the layer multiplies by, a new tensor in
        the dtype in which it is exact."""


@runtime_checkable
class OneWeight(Protocol):
    """What a `QuantLinear` may have in addition: on a GPU the experts of a mixture that all have it
    are multiplied by at once. Without it they are computed one after the other."""

    @property
    def weight(self) -> ops.Weight | None:
        """What the layer multiplies by, with nothing added; None: it has a bias, or several
        weights. The layer is not used again by who takes its weight."""


class Quantizer(Protocol):
    """One format. Stateless, called from any thread."""

    @property
    def name(self) -> str:
        """What users write in a rule: "gptq"."""

    @property
    def api_version(self) -> int:
        """The version of this module that it was written for."""

    def claims(self, spec: LinearSpec, source: TensorSource) -> bool:
        """Do the layer's tensors in this checkpoint have this format? Reads names and headers."""

    def refuses(self, spec: LinearSpec, device: torch.device) -> str | None:
        """Why a layer of this shape cannot run on this device, or None when it can."""

    def tensors(self, spec: LinearSpec, source: TensorSource) -> Mapping[str, tuple[int, ...]]:
        """Names and shapes that `load` will read, so that a wrong checkpoint is refused before
        memory is taken."""

    def dequantize_rows(self, name: str, source: TensorSource, rows: Tensor) -> Tensor:
        """fp32 [n, columns]: these rows (int64 [n]) of a tensor of this format. For tables of
        embeddings. Raises Refused where the format has none."""

    def load(self, spec: LinearSpec, source: TensorSource, device: torch.device) -> QuantLinear:
        """Reads and packs; holds no view of the source afterwards. Releases what it read."""


@runtime_checkable
class FromPlain(Protocol):
    """What a quantizer has in addition that is made from plain weights while they load. It gets a
    layer of plain tensors by a rule; without this attribute a rule leaves such a layer plain."""

    @property
    def from_plain(self) -> bool:
        """True."""


@dataclass(frozen=True, slots=True)
class Description:
    """What a user is told of a layer's format."""

    text: str
    """Bits, group and what is special: "4 bits, groups of 128, act-order"."""
    nbytes: int
    """Memory that the layer will hold, padding aside."""
    route: str
    """Which kernel multiplies."""


@runtime_checkable
class Describes(Protocol):
    """What a quantizer may have in addition: `quantd inspect` shows it."""

    def describe(self, spec: LinearSpec, source: TensorSource, device: torch.device) -> Description:
        """Of a layer that it takes; reads names and headers only."""


@runtime_checkable
class Notes(Protocol):
    """What a quantizer may have in addition: shown of a loaded model and by `quantd inspect`."""

    def notes(self, spec: LinearSpec, source: TensorSource) -> Collection[str]:
        """What a user should know of a layer that it takes, as where settings and tensors disagree
        and which is followed. Each note is a sentence without the layer's name: one that many
        layers share is shown once, with their number. May read small tensors, and may raise
        Refused as `load` would."""

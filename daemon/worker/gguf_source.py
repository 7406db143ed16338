"""A GGUF file as a TensorSource: mapped, under the names and in the shapes of transformers.

What differs from the file: merged experts and fused projections are read in their parts; the rows
of queries and keys are put back in the order of transformers for architectures that store them
interleaved. Quantized tensors are given as the blocks they are, uint8 [rows, bytes of a row].
"""

from __future__ import annotations

import mmap
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantd.daemon.gguf.config import model_config
from quantd.daemon.gguf.names import INTERLEAVED, to_hf
from quantd.daemon.gguf.reader import GgufError, GgufModel, GgufTensor, open_gguf
from quantd.daemon.worker.machine import MAP_NORESERVE
from quantd.plugins.api import Refused

_FLOATS = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}
"""Types whose elements stand alone."""
_FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors that are part of the configuration."""
_GEMMA = ("gemma2", "gemma3")


@dataclass(frozen=True, slots=True)
class _Entry:
    """Rows of a tensor in the file."""

    tensor: GgufTensor
    shape: tuple[int, ...]
    start: int
    """Of the file."""
    stop: int
    heads: int = 0
    """Not 0: so many heads, the rows of each interleaved."""


def open_source(path: Path) -> GgufSource:
    """Raises Refused for a file that is not sound or not supported."""
    try:
        return GgufSource(path)
    except GgufError as error:
        raise Refused(str(error)) from error


class GgufSource:
    """The tensors of a model in one GGUF file or in shards. Raises GgufError."""

    def __init__(self, path: Path) -> None:
        self.model = open_gguf(path)
        self._config = model_config(self.model)
        self._architecture = str(self.model.metadata["general.architecture"])
        self._refuse_more_than_there_is()
        self._maps = {file: _map(file) for file in self.model.files}
        self._entries: dict[str, _Entry] = {}
        for name, entry in self._find(self.model):
            if name in self._entries:
                raise GgufError(f"{path.name}: two tensors are {name}")
            self._entries[name] = entry
        # A table that is not the output layer too is read by rows, and never as a whole.
        tied = self._config["tie_word_embeddings"]
        self._advised = set() if tied else {"model.embed_tokens.weight"}

    @property
    def config(self) -> Mapping[str, Any]:
        """What config.json would say."""
        return self._config

    @property
    def norm_offset_baked(self) -> bool:
        """What transformers adds to the stored weights of norms (1 in Gemma) is added already."""
        return self._architecture in _GEMMA

    def names(self) -> Collection[str]:
        return self._entries.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape

    def dtype(self, name: str) -> str:
        return self._entries[name].tensor.type_name

    def read(self, name: str) -> Tensor:
        entry = self._entries[name]
        memory = self._maps[entry.tensor.path]
        if name not in self._advised:
            self._advised.add(name)
            page = entry.start - entry.start % mmap.PAGESIZE
            memory.madvise(mmap.MADV_WILLNEED, page, entry.stop - page)
        dtype = _FLOATS.get(entry.tensor.type_name)
        raw = torch.frombuffer(
            memory, dtype=torch.uint8, count=entry.stop - entry.start, offset=entry.start
        )
        rows = raw.view(entry.shape[0], -1)
        if entry.heads:
            rows = _deinterleave(rows, entry.heads)
        if dtype is None:
            return rows
        if rows.data_ptr() % dtype.itemsize:
            rows = rows.clone()
        return rows.view(dtype).view(entry.shape)

    def release(self, name: str) -> None:
        entry = self._entries[name]
        page = entry.start - entry.start % mmap.PAGESIZE
        self._maps[entry.tensor.path].madvise(mmap.MADV_DONTNEED, page, entry.stop - page)

    def _refuse_more_than_there_is(self) -> None:
        """A decoder is planned by the numbers of layers and experts: a small file must not be able
        to claim large ones."""
        tensors, config = self.model.tensors, self._config
        layers = config["num_hidden_layers"]
        if layers > len(tensors):
            raise GgufError(
                f"{self.model.path.name}: block_count is {layers}, but there are only "
                f"{len(tensors)} tensors"
            )
        merged = sum(name.endswith("_exps.weight") for name in tensors)
        if self._num_experts and merged < layers:
            raise GgufError(
                f"{self.model.path.name}: {layers} layers have experts, but there are only "
                f"{merged} tensors of experts"
            )

    def _find(self, model: GgufModel) -> Iterator[tuple[str, _Entry]]:
        for tensor in model.tensors.values():
            if tensor.name in _FACTORS:
                continue
            if len(tensor.dims) == 1 and tensor.type_name not in _FLOATS:
                raise GgufError(
                    f"{tensor.path.name}: the tensor {tensor.name} is {tensor.type_name}, but a "
                    "vector must not be quantized"
                )
            # A tensor that has no name in transformers is kept for the loader to refuse.
            pattern = to_hf(self._architecture, tensor.name)
            if pattern is None:
                yield tensor.name, _whole(tensor)
                continue
            if "{}" not in pattern:
                yield from self._parts(pattern, _whole(tensor))
                continue
            if len(tensor.dims) != 3:
                raise GgufError(
                    f"{tensor.path.name}: the tensor {tensor.name} is {list(tensor.dims)}, must "
                    "have 3 dimensions for its experts"
                )
            if tensor.dims[0] != self._num_experts:
                raise GgufError(
                    f"{tensor.path.name}: the tensor {tensor.name} is {list(tensor.dims)}, must "
                    f"have {self._num_experts} experts"
                )
            size = tensor.nbytes // tensor.dims[0]
            for i in range(tensor.dims[0]):
                start = tensor.offset + i * size
                expert = _Entry(tensor, tensor.dims[1:], start, start + size)
                yield from self._parts(pattern.format(i), expert)

    def _parts(self, name: str, entry: _Entry) -> Iterator[tuple[str, _Entry]]:
        """One name for each of queries, keys and values where they are one tensor, but in Phi-3,
        which is fused in transformers too."""
        config, stem = self._config, name.rpartition(".")[0]
        queries = config["num_attention_heads"] * config["head_dim"]
        keys = config["num_key_value_heads"] * config["head_dim"]
        if self._architecture == "phi3":
            yield name, entry
        elif stem.endswith(".qkv_proj"):
            sizes = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
            for leaf, part in _split(entry, sizes).items():
                yield name.replace("qkv_proj", leaf), self._interleaved(leaf, part)
        else:
            yield name, self._interleaved(stem.rpartition(".")[2], entry)

    def _interleaved(self, leaf: str, entry: _Entry) -> _Entry:
        keys = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
        if self._architecture not in INTERLEAVED or leaf not in keys:
            return entry
        heads = self._config[keys[leaf]]
        if not heads or entry.shape[0] % (2 * heads):
            raise GgufError(
                f"{entry.tensor.path.name}: the tensor {entry.tensor.name} has {entry.shape[0]} "
                f"rows, must have an even number for each of {heads} heads"
            )
        return _Entry(entry.tensor, entry.shape, entry.start, entry.stop, heads)

    @property
    def _num_experts(self) -> int:
        config = self._config
        return int(config.get("num_experts", config.get("num_local_experts", 0)))


def _map(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        # Private and writable, because torch warns of read-only memory; nobody writes.
        return mmap.mmap(
            file.fileno(),
            0,
            flags=mmap.MAP_PRIVATE | MAP_NORESERVE,
            prot=mmap.PROT_READ | mmap.PROT_WRITE,
        )


def _whole(tensor: GgufTensor) -> _Entry:
    return _Entry(tensor, tensor.dims, tensor.offset, tensor.offset + tensor.nbytes)


def _split(entry: _Entry, sizes: Mapping[str, int]) -> dict[str, _Entry]:
    """By rows."""
    if sum(sizes.values()) != entry.shape[0]:
        raise GgufError(
            f"{entry.tensor.path.name}: the tensor {entry.tensor.name} has {entry.shape[0]} rows, "
            f"must have {sum(sizes.values())}"
        )
    row_bytes = (entry.stop - entry.start) // entry.shape[0]
    parts, start = {}, entry.start
    for name, rows in sizes.items():
        stop = start + rows * row_bytes
        parts[name] = _Entry(entry.tensor, (rows, *entry.shape[1:]), start, stop)
        start = stop
    return parts


def _deinterleave(rows: Tensor, heads: int) -> Tensor:
    """Rows (2i, 2i + 1) of each head to (i, i + d / 2). A copy."""
    pairs = rows.view(heads, -1, 2, rows.shape[1])
    return pairs.transpose(1, 2).reshape(rows.shape)

"""A checkpoint to weights in place: checked from headers first, then loaded in parallel.

Nothing is copied twice: a tensor is a view of the mapped file until its quantizer packs it, and
then its pages go back to the system, so that the peak of memory is near the packed weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantd.daemon.types import LoadProgress
from quantd.daemon.worker.embedding import Embedding, unpacked
from quantd.daemon.worker.models.config import CheckpointConfig
from quantd.daemon.worker.models.names import ModelTensors
from quantd.daemon.worker.stacked import Stacks
from quantd.kernels import ops
from quantd.plugins.api import LinearSpec, Quantizer, QuantLinear, Refused, TensorSource
from quantd.plugins.select import Choice, Registry, Rule, check_rules, select

__all__ = [
    "Choices",
    "Progress",
    "Refused",
    "Weights",
    "choose",
    "count_quantizers",
    "load_weights",
    "read_json",
]

Progress = Callable[[LoadProgress], None]

_FLOATS = frozenset({"BF16", "F16", "F32"})
_MAX_LOADERS = 4
"""More threads than this wait for memory, not for each other."""
_SHOWN = 4
"""Names in a message; the rest is counted."""


@dataclass(frozen=True, slots=True)
class Weights:
    """Everything that a model holds, by the names of `models/names.py`."""

    linears: dict[str, QuantLinear]
    vectors: dict[str, Tensor]
    """fp32; what a family adds to its norms' weights is added."""
    embedding: Embedding
    num_parameters: int
    nbytes: int
    """Of what is packed; a mapped table of embeddings does not count."""
    tables: dict[str, Tensor] = field(default_factory=dict)
    """fp32"""
    stacks: Mapping[str, ops.ExpertStack] = field(default_factory=dict)
    """On a GPU: where the weights of a mixture's linear layers lie, by the names of
    `ModelTensors.experts`."""


@dataclass(frozen=True, slots=True)
class Choices:
    """Who reads what of a checkpoint."""

    linears: tuple[Choice, ...]
    """In the order of `ModelTensors.linears`."""
    embedding: Choice


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """A JSON object of the model's folder."""
    path = folder / name
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise Refused(f"{folder} has no {name}") from None
    except OSError as error:
        raise Refused(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise Refused(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise Refused(f"{path} holds no object")
    return value


def choose(
    config: CheckpointConfig,
    source: TensorSource,
    tensors: ModelTensors,
    device: torch.device,
    registry: Registry,
    rules: Sequence[Rule],
) -> Choices:
    """A quantizer for each linear layer and for the table of embeddings. Raises Refused for a
    checkpoint that is not exactly what the decoder is made of; takes no memory."""
    names = source.names()
    modules = {name.rpartition(".")[0] for name in names}
    parts = {part for spec in tensors.linears.values() for part in spec.parts}
    absent = [f"{part}.weight" for part in sorted(parts - modules)]
    vectors = [vector.source for vector in tensors.vectors.values()]
    vectors += [table.source for table in tensors.tables.values()]
    others = [tensors.embedding, *vectors]
    absent += [name for name in others if name not in names and name not in absent]
    _refuse("the checkpoint lacks", absent)
    choices = Choices(
        tuple(select(spec, source, device, registry, rules) for spec in tensors.linears.values()),
        # Rules are for layers that multiply; a table is read in the format that it has.
        select(_table(config, tensors), source, device, registry),
    )
    check_rules(rules, tensors.linears.values(), choices.linears)
    expected = _expected(config, source, tensors, choices)
    _refuse("the checkpoint lacks", [name for name in expected if name not in names])
    _refuse(
        f"{config.architecture} has no place for",
        [name for name in names if name not in expected and not tensors.is_ignored(name)],
    )
    _refuse(
        "the checkpoint does not fit its config.json:",
        [
            f"{name} is {list(source.shape(name))}, must be {list(shape)}"
            for name, shape in expected.items()
            if source.shape(name) != shape
        ],
        "",
    )
    for name in vectors:
        if source.dtype(name) not in _FLOATS:
            raise Refused(f"the tensor {name} is of the type {source.dtype(name)}, must be a float")
    return choices


def _table(config: CheckpointConfig, tensors: ModelTensors) -> LinearSpec:
    """The table of embeddings, as if it were a layer."""
    dtype = next(iter(tensors.linears.values())).dtype
    part = tensors.embedding.removesuffix(".weight")
    shape = config.hidden_size, (config.vocab_size,)
    return LinearSpec("model.embed_tokens", *shape, (part,), dtype)


def _expected(
    config: CheckpointConfig, source: TensorSource, tensors: ModelTensors, choices: Choices
) -> dict[str, tuple[int, ...]]:
    expected: dict[str, tuple[int, ...]] = {
        tensors.embedding: (config.vocab_size, config.hidden_size)
    }
    expected |= {vector.source: (vector.size,) for vector in tensors.vectors.values()}
    expected |= {table.source: (table.rows, table.columns) for table in tensors.tables.values()}
    for spec, choice in zip(tensors.linears.values(), choices.linears, strict=True):
        expected |= choice.quantizer.tensors(spec, source)
    return expected


def _refuse(what: str, names: Sequence[str], noun: str = "tensor") -> None:
    if not names:
        return
    plural = "s" if noun and len(names) > 1 else ""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    shown = ", ".join(sorted(names)[:_SHOWN]) if noun else "; ".join(names[:_SHOWN])
    raise Refused(f"{what} {noun}{plural}{' ' if noun else ''}{shown}{more}")


def load_weights(
    config: CheckpointConfig,
    source: TensorSource,
    tensors: ModelTensors,
    choices: Choices,
    device: torch.device,
    progress: Progress,
) -> Weights:
    """Loads what `choose` has checked. Progress is reported from the calling thread."""
    specs = {
        name: (spec, choice)
        for (name, spec), choice in zip(tensors.linears.items(), choices.linears, strict=True)
    }
    sizes = {name: spec.out_features * spec.in_features for name, (spec, _) in specs.items()}
    dtype = next(iter(tensors.linears.values())).dtype
    total = sum(sizes.values()) * dtype.itemsize
    progress(LoadProgress("weights", 0, total))
    linears: dict[str, QuantLinear] = {}
    stacks = Stacks(tensors, device)

    def load(name: str) -> QuantLinear:
        spec, choice = specs[name]
        return stacks.take(name, choice.quantizer.load(spec, source, device))

    num_threads = ops.num_threads()
    num_loaders = min(_MAX_LOADERS, num_threads)

    def begin() -> None:
        ops.set_num_threads(max(1, num_threads // num_loaders))
        if device.type == "cuda":
            torch.cuda.set_device(device)  # of this thread; Triton launches there

    with ThreadPoolExecutor(num_loaders, "load", begin) as pool:
        # The largest first: the peak is then over before the rest is there, and no thread is left
        # alone with it at the end.
        order = sorted(specs, key=lambda name: -sizes[name])
        futures = {pool.submit(load, name): name for name in order}
        try:
            done = 0
            for future in as_completed(futures):
                linears[futures[future]] = future.result()
                done += sizes[futures[future]] * total // sum(sizes.values())
                progress(LoadProgress("weights", min(done, total), total))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    ops.set_num_threads(num_threads)
    vectors = {
        name: _vector(source, vector.source, device, config.norm_offset)
        for name, vector in tensors.vectors.items()
    }
    tables = {
        name: _vector(source, table.source, device, 0.0) for name, table in tensors.tables.items()
    }
    embedding = _embedding(
        choices.embedding.quantizer, source, tensors.embedding, config.vocab_size, device, dtype
    )
    nbytes = sum(linear.nbytes for linear in linears.values())
    nbytes += sum(vector.nbytes for vector in vectors.values())
    nbytes += sum(table.nbytes for table in tables.values())
    nbytes += embedding.nbytes
    biases = sum(spec.out_features for spec, _ in specs.values() if spec.bias)
    is_counted = config.tied and "lm_head" in specs
    untied = 0 if is_counted else config.vocab_size * config.hidden_size
    parameters = sum(sizes.values()) + biases + untied + sum(map(len, vectors.values()))
    parameters += sum(table.numel() for table in tables.values())
    return Weights(linears, vectors, embedding, parameters, nbytes, tables, stacks.full())


def _embedding(
    quantizer: Quantizer,
    source: TensorSource,
    name: str,
    num_rows: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Embedding:
    table: Tensor | None = None
    if source.dtype(name) in _FLOATS:
        table = source.read(name).to(device)
    elif device.type != "cpu":
        table = unpacked(quantizer, name, source, num_rows, device, dtype)
    return Embedding(quantizer, name, source, device, table)


def _vector(source: TensorSource, name: str, device: torch.device, offset: float) -> Tensor:
    vector = source.read(name).to(device, torch.float32, copy=True).add_(offset)
    source.release(name)
    return vector


def count_quantizers(choices: Iterable[Choice]) -> tuple[tuple[str, int], ...]:
    """(quantizer, how many layers it took), the most first."""
    counts: dict[str, int] = {}
    for choice in choices:
        counts[choice.quantizer.name] = counts.get(choice.quantizer.name, 0) + 1
    return tuple(sorted(counts.items(), key=lambda item: (-item[1], item[0])))

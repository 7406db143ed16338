"""What a checkpoint gives instead of tokens, and hidden states to it.

A checkpoint of sentence-transformers says in modules.json, 1_Pooling/config.json and
sentence_bert_config.json how a text's hidden states become its vector. Without these files an
encoder's vector is the mean of all hidden states, a decoder's is the last token's, and both are
normalized.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from quantd.daemon.types import LoadModel, Pooling
from quantd.daemon.worker.models.encoder_config import ENCODERS
from quantd.daemon.worker.models.fields import Fields
from quantd.plugins.api import Refused

Kind = Literal["mean", "cls", "last"]

_MODES: Mapping[str, Kind] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "last",
}
_NAMES: Mapping[str, Kind] = {"mean": "mean", "cls": "cls", "lasttoken": "last", "last": "last"}
_MODULES = ("Transformer", "Pooling", "Normalize")


@dataclass(frozen=True, slots=True)
class PoolingPlan:
    """How a checkpoint is to be run that does not generate."""

    task: Literal["embed", "rerank"]
    kind: Kind
    normalized: bool
    is_encoder: bool
    max_tokens: int | None
    """Of a text, as the checkpoint says; None: it does not."""
    matryoshka: bool
    dimensions: tuple[int, ...]
    notes: tuple[str, ...] = ()

    def info(self, size: int) -> Pooling:
        """`size`: numbers in a hidden state."""
        over = [length for length in self.dimensions if length > size]
        if over:
            raise Refused(f"config.json: matryoshka_dimensions has {over[0]}, more than {size}")
        if self.task == "rerank":
            return Pooling("rerank", 1, whole=True)
        return Pooling(
            "embed",
            size,
            self.normalized,
            self.is_encoder or self.kind != "last",
            self.matryoshka,
            self.dimensions,
        )


@dataclass(frozen=True, slots=True)
class _Said:
    """By sentence-transformers' files."""

    kind: Kind
    normalized: bool


def plan_pooling(load: LoadModel, folder: Path, config: Mapping[str, Any]) -> PoolingPlan | None:
    """None for a model that generates. `config` is config.json. Raises Refused when the checkpoint
    cannot do what `load.task` asks for, or says what is not understood."""
    architectures = config.get("architectures")
    name = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    is_encoder = name in ENCODERS
    ranks = is_encoder and name.endswith("ForSequenceClassification")
    if load.task not in ("auto", "embed") and (load.task == "rerank") != ranks:
        raise Refused(f"task = {load.task!r}, but {name or 'this checkpoint'} is not made for that")
    if load.task == "embed" and ranks:
        raise Refused(f"task = 'embed', but {name} is a reranker: task = 'rerank'")
    said = None if ranks or not folder.is_dir() else _read_modules(folder)
    embeds = is_encoder or said is not None or name.endswith("Model") or load.task == "embed"
    if load.task == "generate" and is_encoder:
        raise Refused(f"task = 'generate', but {name} is an encoder")
    if load.task == "generate" or not embeds:
        return None
    f = Fields(config)
    dimensions = tuple(f.items("matryoshka_dimensions", []))
    if any(type(length) is not int or length < 1 for length in dimensions):
        raise f.wrong("matryoshka_dimensions", "a list of lengths")
    kind: Kind = said.kind if said is not None else "mean" if is_encoder else "last"
    max_tokens, notes = _read_limits(folder)
    return PoolingPlan(
        task="rerank" if ranks else "embed",
        kind=kind if load.pooling == "auto" else cast(Kind, load.pooling),
        normalized=said is None or said.normalized,
        is_encoder=is_encoder,
        max_tokens=max_tokens,
        matryoshka=load.matryoshka or f.flag("is_matryoshka", False) or bool(dimensions),
        dimensions=() if load.matryoshka else dimensions,
        notes=notes,
    )


def pool(hidden: Tensor, starts: Sequence[int], kind: Kind, normalized: bool) -> Tensor:
    """hidden [T, size], sequence s in the rows [starts[s], starts[s + 1]) -> fp32 [S, size]."""
    firsts, stops = list(starts[:-1]), list(starts[1:])
    if kind == "mean":
        # One by one: a sum has the same bits whatever else is in the batch.
        means = [hidden[a:b].float().mean(0) for a, b in zip(firsts, stops, strict=True)]
        out = torch.stack(means)
    else:
        rows = firsts if kind == "cls" else [stop - 1 for stop in stops]
        out = hidden[torch.tensor(rows, device=hidden.device)].float()
    if normalized:
        norms = torch.stack([row.norm() for row in out])
        out = out / norms.clamp_min(1e-12)[:, None]
    return out


def vectors(out: Tensor) -> list[bytes | None]:
    """Rows fp32 [S, size] as little-endian bytes; None for one that is not finite."""
    finite = out.isfinite().all(1).tolist()
    rows = out.cpu().numpy().astype("<f4")
    return [row.tobytes() if ok else None for row, ok in zip(rows, finite, strict=True)]


def _read_modules(folder: Path) -> _Said | None:
    modules = _read(folder / "modules.json")
    if modules is None:
        return None
    if not isinstance(modules, list) or not all(isinstance(item, dict) for item in modules):
        raise Refused(f"{folder / 'modules.json'} is no list of modules")
    kinds = [str(module.get("type", "")).rpartition(".")[2] for module in modules]
    for kind, module in zip(kinds, modules, strict=True):
        if kind not in _MODULES:
            raise Refused(f"modules.json has a module {module.get('type')!r}, unknown here")
    if kinds[:2] != ["Transformer", "Pooling"] or kinds[2:] not in ([], ["Normalize"]):
        raise Refused(f"modules.json has {', '.join(kinds)}, must have Transformer, Pooling")
    if modules[0].get("path"):
        raise Refused(f"the transformer lies in {modules[0]['path']}: name that folder as the path")
    file = folder / str(modules[1].get("path", "1_Pooling")) / "config.json"
    return _Said(_read_kind(file), len(kinds) == 3)


def _read_kind(file: Path) -> Kind:
    config = _read(file)
    if not isinstance(config, dict):
        raise Refused(f"{file} is missing, or is no object")
    named = config.get("pooling_mode")
    if isinstance(named, str):
        modes = [named]
        found = [_NAMES[named]] if named in _NAMES else []
    else:
        modes = [key for key, on in config.items() if key.startswith("pooling_mode_") and on]
        found = [_MODES[key] for key in modes if key in _MODES]
    if len(modes) != 1 or not found:
        shown = ", ".join(modes) or "none"
        raise Refused(f"{file}: the modes are {shown}; one of mean, cls and last token is served")
    return found[0]


def _read_limits(folder: Path) -> tuple[int | None, tuple[str, ...]]:
    """The longest text, and what a user should know."""
    said = _read(folder / "sentence_bert_config.json") if folder.is_dir() else None
    if not isinstance(said, dict):
        return None, ()
    notes: tuple[str, ...] = ()
    if said.get("do_lower_case"):
        notes = ("sentence_bert_config.json has do_lower_case; texts are taken as they are",)
    limit = said.get("max_seq_length")
    return (limit if isinstance(limit, int) and limit > 0 else None), notes


def _read(path: Path) -> Any:
    """None when there is no such file."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise Refused(f"{path} cannot be read: {error}") from error

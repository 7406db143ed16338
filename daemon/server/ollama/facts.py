"""What a checkpoint's small files tell about a model that need not be in memory. Reads files."""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from quantd.daemon.errors import ModelRefused
from quantd.daemon.gguf.place import find_gguf
from quantd.daemon.gguf.reader import open_gguf
from quantd.daemon.server.schemas import Json
from quantd.daemon.text.checkpoint import read_text_files
from quantd.daemon.text.gguf_files import chat_templates

_SUFFIXES = (".safetensors", ".gguf", ".json", ".jinja")
_KEYS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "vocab_size": "vocab_size",
}
"""GGUF's name for a number → that of config.json."""
_CACHED = 64

Signature = tuple[tuple[str, int, int], ...]


class Facts(NamedTuple):
    """Empty, as far as files are not there or not understood."""

    format: str = ""
    """gguf | safetensors"""
    family: str = ""
    """As GGUF has it: "llama"."""
    info: Mapping[str, Json] = {}
    """By GGUF's keys."""
    templates: Mapping[str, str] = {}
    task: str = "generate"
    """generate | embed | rerank, unless the configuration says otherwise."""
    level: str = ""
    """The type of most matrices, as GGUF has it ("Q4_K"); not said of other formats."""
    size: int = 0
    """Bytes of its files."""
    digest: str = ""
    """Of the place, and the files' names, sizes and times: to read 30 GB for the weights' own takes
    too long."""
    modified: float = 0.0
    """When the newest of them was written, in seconds since the epoch."""


def facts_of(path: Path) -> Facts:
    """Blocking; raises nothing, whatever somebody has written there."""
    signature: Signature = ()
    try:
        signature = _signature(path)
        read = _read(path, signature)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ModelRefused):
        read = Facts()
    text = json.dumps([str(path), signature])
    return read._replace(
        size=sum(size for _, size, _ in signature),
        digest=hashlib.sha256(text.encode()).hexdigest(),
        modified=max((time for _, _, time in signature), default=0) / 1e9,
    )


def _signature(path: Path) -> Signature:
    """Name, size and time of each file."""
    paths = [path]
    if path.is_dir():
        paths = sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES)
    stats = [(file.name, file.stat()) for file in paths]
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)


@functools.lru_cache(_CACHED)
def _read(path: Path, signature: Signature) -> Facts:
    """Once for each state of the files: the header of a GGUF file takes a tenth of a second."""
    gguf = find_gguf(path)
    return _of_folder(path) if gguf is None else _of_gguf(gguf)


def _of_gguf(path: Path) -> Facts:
    model = open_gguf(path)
    metadata = model.metadata
    family = str(metadata.get("general.architecture", ""))
    prefixes = ("general.", f"{family}.")
    info = {
        key: value
        for key, value in metadata.items()
        if key.startswith(prefixes) and isinstance(value, str | int | float)
    }
    count = sum(math.prod(tensor.dims) for tensor in model.tensors.values())
    matrices = Counter(t.type_name for t in model.tensors.values() if len(t.dims) > 1)
    level = max(matrices, key=lambda name: matrices[name], default="")
    info = {"general.parameter_count": count, **info}
    return Facts("gguf", family, info, chat_templates(metadata), level=level)


def _of_folder(path: Path) -> Facts:
    config = json.loads((path / "config.json").read_bytes())
    inner = config.get("text_config", config)
    family = str(config.get("model_type", ""))
    info: dict[str, Json] = {"general.architecture": family}
    for key, name in _KEYS.items():
        if isinstance(inner.get(name), int):
            info[f"{family}.{key}"] = inner[name]
    templates = read_text_files(path).chat_templates
    return Facts("safetensors", family, info, templates, _task(path, config))


def _task(path: Path, config: Mapping[str, Json]) -> str:
    """As the worker decides it when it loads the model."""
    name = str((config.get("architectures") or [""])[0])
    if name.endswith("ForSequenceClassification"):
        return "rerank"
    embeds = name.endswith(("Model", "ForMaskedLM")) or (path / "modules.json").exists()
    return "embed" if embeds else "generate"

"""What stands at a model's path: a folder in the layout of transformers, or a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantd.daemon.gguf.place import find_gguf
from quantd.daemon.gguf.reader import GgufError
from quantd.daemon.gguf.tokenizer_metadata import read_tokenizer_metadata
from quantd.daemon.worker.gguf_source import GgufSource, open_source
from quantd.daemon.worker.loader import read_json
from quantd.daemon.worker.source import SafetensorsSource
from quantd.daemon.worker.vocabulary import sampled_vocab_size
from quantd.plugins.api import Refused, TensorSource

_QUANTIZE_CONFIG = "quantize_config.json"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Opened, with headers read and no weights."""

    path: Path
    config: Mapping[str, Any]
    """config.json, or what says the same."""
    gguf: GgufSource | None = None

    def vocab_size(self, padded: int) -> int:
        """Ids in [0, this) may be sampled; `padded` is the number of rows of the output layer."""
        if self.gguf is None:
            return sampled_vocab_size(self.path, padded)
        try:
            return min(padded, read_tokenizer_metadata(self.gguf.model.metadata).vocab_size)
        except GgufError as error:
            raise Refused(f"{self.path.name}: {error}") from error

    def source(self) -> TensorSource:
        """Raises Refused."""
        return SafetensorsSource(self.path, self.config) if self.gguf is None else self.gguf

    @property
    def norm_offset_baked(self) -> bool:
        """What a family adds to the weights of its norms has been added already."""
        return self.gguf is not None and self.gguf.norm_offset_baked


def open_checkpoint(path: Path) -> Checkpoint:
    """Raises Refused."""
    try:
        file = find_gguf(path)
    except GgufError as error:
        raise Refused(str(error)) from error
    if file is not None:
        source = open_source(file)
        return Checkpoint(file, source.config, source)
    return Checkpoint(path, _with_quantize_config(path, read_json(path, "config.json")))


def _with_quantize_config(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """AutoGPTQ's older files have what others put under quantization_config in a file beside."""
    if "quantization_config" in config or not (folder / _QUANTIZE_CONFIG).exists():
        return config
    beside = read_json(folder, _QUANTIZE_CONFIG)
    if "bits" not in beside:
        raise Refused(f"{folder / _QUANTIZE_CONFIG} has no bits")
    return config | {"quantization_config": {"quant_method": "gptq"} | beside}

"""What a KV block's bytes depend on beside its tokens, as one digest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from quantd.daemon.types import BLOCK_TOKENS, LoadModel
from quantd.kernels import ops

_EDGE_BYTES = 1 << 20
_WEIGHTS = (".safetensors", ".gguf", ".json")


def kv_revision(
    load: LoadModel,
    config: Mapping[str, Any],
    dtype: torch.dtype,
    device: torch.device,
    max_context: int,
) -> str:
    """Hexadecimal. Equal only for the same files, settings and code.

    A weight file counts by its name, size, time of change, first and last MiB: reading all of it
    would take as long as loading it. The code counts by its version and the library's build.
    """
    digest = hashlib.blake2b(digest_size=32, person=b"quantd-kv-rev")
    code = (version("quantd"), torch.__version__, *ops.identity())
    dtypes = (str(dtype), load.kv_dtype)
    settings = (load.quantization, load.load_format, *dtypes, device.type, max_context)
    parts = [BLOCK_TOKENS, code, settings, json.dumps(config, sort_keys=True, default=str)]
    digest.update(json.dumps(parts).encode())
    for path in _files(Path(load.path)):
        stat = path.stat()
        digest.update(json.dumps([path.name, stat.st_size, stat.st_mtime_ns]).encode())
        with path.open("rb") as file:
            digest.update(file.read(_EDGE_BYTES))
            file.seek(max(0, stat.st_size - _EDGE_BYTES))
            digest.update(file.read(_EDGE_BYTES))
    return digest.hexdigest()


def _files(path: Path) -> Iterator[Path]:
    """Of a folder all that may decide a weight; of a GGUF file it and those beside it: shards."""
    folder = path if path.is_dir() else path.parent
    for file in sorted(folder.iterdir()):
        if file.is_file() and (file.suffix in _WEIGHTS or file == path):
            yield file

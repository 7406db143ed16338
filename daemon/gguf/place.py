"""Where the GGUF file of a model lies."""

from __future__ import annotations

import re
from pathlib import Path

from quantd.daemon.gguf.reader import GgufError

_SHARD = re.compile(r".*-(?P<number>\d{5})-of-\d{5}", re.DOTALL)


def find_gguf(path: Path) -> Path | None:
    """The file to open for a model at `path`: `path` itself when it is a file, or the one GGUF
    model (the first of its shards) in a folder. None for a folder with a config.json, which is
    the layout of transformers, and for what has no GGUF file.

    Raises GgufError for a folder that holds more than one.
    """
    if path.is_file():
        return path
    if (path / "config.json").exists():
        return None
    models = [file for file in sorted(path.glob("*.gguf")) if _begins_a_model(file)]
    if len(models) > 1:
        names = ", ".join(file.name for file in models)
        raise GgufError(f"{path} holds {len(models)} GGUF models; name one of {names}")
    return models[0] if models else None


def _begins_a_model(file: Path) -> bool:
    """Not a later shard, and not the image encoder that comes beside a model."""
    match = _SHARD.fullmatch(file.stem)
    return (match is None or int(match["number"]) == 1) and not file.name.startswith("mmproj")

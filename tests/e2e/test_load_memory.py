"""Memory while loading: a weight is mapped or packed, never both. Measured in the real worker."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import quantized
import shapes
from harness import Daemon
from safetensors.torch import save_file

pytestmark = pytest.mark.cpu

_SHAPE = {
    "hidden_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "intermediate_size": 4096,
    "vocab_size": 2048,
    "head_dim": 128,
    "rope_theta": 10000.0,
}
_SCRATCH_MIB = 48
"""What packing needs beside the weights: chunks that are unpacked, of two loaders."""


def make(folder: Path, kind: str, **changes: int) -> Path:
    """A checkpoint of 136 million parameters, but for `changes`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(shapes.SHAPES, "made", _SHAPE | changes)
        config = shapes.write_config("made", folder)
    if kind == "dense":
        weights = shapes.tensors(config)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    quantized.write_gguf(config, folder, kind)
    return folder / "model.gguf"


def peak_and_weights(path: Path, *options: str) -> tuple[int, int]:
    """(the most that the worker ever had resident, what it holds of weights), in bytes."""
    with Daemon(f"model={path}", "--threads", "2", *options) as daemon:
        (worker,) = daemon.workers()
        status = Path(f"/proc/{worker}/status").read_text().splitlines()
        peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
        _, listed = daemon.get("/admin/models", unix=True)
        (model,) = json.loads(listed)["models"]
    return peak * 1024, int(model["info"]["weight_bytes"])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> int:
    """The peak of a worker whose model is too small to matter."""
    small = {"num_hidden_layers": 1, "hidden_size": 256, "intermediate_size": 256, "head_dim": 32}
    peak, weights = peak_and_weights(make(tmp_path_factory.mktemp("small"), "Q8_0", **small))
    return peak - weights


@pytest.mark.parametrize(
    ("kind", "options", "least"),
    [
        pytest.param("Q8_0", (), 120 << 20, id="GGUF"),
        pytest.param("Q4_K_M", (), 60 << 20, id="GGUF of mixed types"),
        pytest.param("dense", (), 250 << 20, id="safetensors"),
        pytest.param("dense", ("--quantization", "int8"), 120 << 20, id="rounded at load"),
    ],
)
def test_the_peak_is_the_weights_and_not_the_file_too(
    base: int, tmp_path: Path, kind: str, options: Any, least: int
) -> None:
    peak, weights = peak_and_weights(make(tmp_path, kind), *options)
    assert weights > least
    assert peak - base < 1.15 * weights + (_SCRATCH_MIB << 20)

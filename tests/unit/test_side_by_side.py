"""benchmarks/serve.py: which server is meant, and what its tables and its file of results say."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import peers
import pytest
import serve

PROGRAMS = peers.Programs(2, llama_server="/opt/llama-server", openvino_python="/opt/python")


@pytest.fixture
def models(tmp_path: Path) -> Path:
    for name in ("gguf", "dense", "dummy"):
        (tmp_path / name).mkdir()
    (tmp_path / "gguf/model.gguf").touch()
    (tmp_path / "dense/config.json").touch()
    (tmp_path / "dense/model.safetensors").touch()
    (tmp_path / "dummy/config.json").touch()
    return tmp_path


def test_a_server_is_an_engine_with_a_path_and_perhaps_a_quantization(models: Path) -> None:
    ours = peers.parse(f"quantd:{models}/dense:w8a8", PROGRAMS)
    assert ours.name == "quantd dense w8a8"
    assert ours.command[0] == sys.executable
    assert ours.command[-2:] == ("--quantization", "w8a8")
    assert f"model={models}/dense" in ours.command
    for engine in ("quantd", "llama.cpp"):
        command = peers.parse(f"{engine}:{models}/gguf", PROGRAMS).command
        assert any(part.endswith(f"{models}/gguf/model.gguf") for part in command)
    assert "dummy" in peers.parse(f"quantd:{models}/dummy", PROGRAMS).command
    assert peers.parse(f"openvino:{models}/dense", PROGRAMS).command[0] == "/opt/python"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ollama:x", "an engine is one of quantd, llama.cpp, openvino, vllm, not 'ollama'"),
        ("vllm:x", "where is vllm's program"),
        ("quantd:/nowhere", "no file or folder '/nowhere'"),
        ("quantd", "no file or folder ''"),
        ("llama.cpp:/:int8", "only quantd quantizes"),
    ],
)
def test_what_is_no_server_says_why(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        peers.parse(text, PROGRAMS)


def test_ratios_are_of_medians_and_of_each_quantd_to_what_comes_after_it() -> None:
    def rounds(*rates: float) -> list[dict[str, Any]]:
        return [{"start": 1.0, "8": {"output_rate": rate}, "peak_mib": 100} for rate in rates]

    text = serve.table(
        {
            "quantd a": rounds(10, 30, 20),
            "llama.cpp a": rounds(10, 10, 10),
            "quantd b": rounds(40, 40, 40),
        }
    )
    assert "| | 8 streams, tok/s | start to first token, s | peak memory, MiB |" in text
    assert "| quantd a | 20.0 | 1.0 | 100.0 |" in text
    assert "| quantd a / llama.cpp a | 2.00 | 1.00 | 1.00 |" in text
    assert "| quantd a / quantd b | 0.50 |" in text
    assert "llama.cpp a / " not in text


def test_rounds_are_added_only_to_a_file_of_the_same_servers(tmp_path: Path) -> None:
    chosen = [peers.Peer("quantd", "quantd a", ("python", "-m", "x"))]
    path = tmp_path / "results.json"
    record = serve.resume(path, chosen)
    record["results"]["quantd a"].append({"start": 1.0})
    path.write_text(json.dumps(record))
    assert serve.resume(path, chosen)["results"] == {"quantd a": [{"start": 1.0}]}
    with pytest.raises(ValueError, match="another commands"):
        serve.resume(path, [peers.Peer("quantd", "quantd b", ("python",))])

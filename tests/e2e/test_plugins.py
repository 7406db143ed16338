"""A format that somebody else wrote: installed with pip, served by a real daemon."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Daemon
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.xdist_group("plugins")

ROOT = Path(__file__).parents[2]
TOY = ROOT / "tests" / "fixtures" / "toy_plugin"
DEMO = ROOT / "daemon" / "embedded" / "demo"
EXACT = ("--dtype", "float32", "--threads", "1")
BODY = {
    "prompt": "What is 2 + 3? What is 4 + 5?",
    "max_tokens": 12,
    "temperature": 0,
    "logprobs": 5,
    "echo": True,
}
"""With the prompt's own scores: a model rounded so roughly may end its answer at once."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PYTHONPATH with the toy format installed."""
    folder = tmp_path_factory.mktemp("site")
    # A build leaves files beside its source.
    source = folder / "source"
    shutil.copytree(TOY, source)
    offline = ["--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "install", "-q", *offline]
    subprocess.run([*command, "--target", folder / "lib", source], check=True, timeout=540)
    return folder / "lib"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The demo with weights rounded to -1, 0 and 1 times a scale: ternary, and the same dense."""
    folder = tmp_path_factory.mktemp("models")
    ternary, dense = folder / "ternary", folder / "dense"
    for copy in (ternary, dense):
        shutil.copytree(DEMO, copy)
    tensors = load_file(DEMO / "model.safetensors")
    packed, plain = dict(tensors), dict(tensors)
    for name, weight in tensors.items():
        if not name.endswith("_proj.weight"):
            continue
        scale = weight.float().abs().mean(dim=1)
        values = (weight.float() / scale[:, None]).round().clamp(-1, 1)
        plain[name] = values * scale[:, None]
        del packed[name]
        module = name.removesuffix(".weight")
        four = (values + 1).to(torch.uint8).view(len(values), -1, 4)
        shifted = four << torch.tensor([0, 2, 4, 6], dtype=torch.uint8)
        packed[f"{module}.weight_ternary"] = shifted.sum(dim=2, dtype=torch.uint8)
        packed[f"{module}.weight_scale"] = scale
    save_file(packed, ternary / "model.safetensors")
    save_file(plain, dense / "model.safetensors")
    return ternary, dense


def broken(site: Path, folder: Path, name: str, code: str) -> None:
    """Adds an installed format whose module is `code`."""
    if not folder.exists():
        shutil.copytree(site, folder)
    (folder / f"{name}_format.py").write_text(code)
    information = folder / f"{name}_format-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-format\nVersion: 1")
    points = f"[quantd.quantizers]\n{name} = {name}_format:Format\n"
    (information / "entry_points.txt").write_text(points)


def answer(daemon: Daemon, model: str) -> dict[str, Any]:
    [choice] = daemon.post("/v1/completions", BODY | {"model": model})["choices"]
    return choice


def test_a_plug_in_serves_what_the_same_weights_dense_serve(
    serve: Callable[..., Daemon],
    site: Path,
    models: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(site))
    ternary, dense = (answer(serve(str(model), *EXACT), model.name) for model in models)
    assert ternary["text"] == dense["text"]
    assert ternary["logprobs"]["tokens"] == dense["logprobs"]["tokens"]
    ours, plain = (c["logprobs"]["token_logprobs"][1:] for c in (ternary, dense))
    assert len(ours) > 8
    assert ours == pytest.approx(plain, abs=1e-3)
    assert min(ours) < -0.1, "scores that tell models apart"


def test_broken_plug_ins_are_warnings_and_the_daemon_lives(
    serve: Callable[..., Daemon],
    site: Path,
    models: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    folder = tmp_path / "lib"
    broken(site, folder, "absent", "import no_such_library\n")
    broken(site, folder, "antique", "class Format:\n    name = 'antique'\n    api_version = 0\n")
    monkeypatch.setenv("PYTHONPATH", str(folder))
    daemon = serve(str(models[0]), *EXACT)
    assert answer(daemon, "ternary")["text"]
    said = daemon.get("/admin/models", unix=True)[1].decode()
    assert "quantizer 'absent' (absent_format:Format) could not be loaded" in said
    assert "No module named 'no_such_library'" in said
    assert "quantizer 'antique' (antique_format:Format) could not be loaded" in said
    assert "it has api_version 0, this is 1" in said


def test_without_the_plug_in_the_model_is_refused_with_reasons(
    models: tuple[Path, Path],
) -> None:
    command = [sys.executable, "-m", "quantd.daemon", "inspect", str(models[0]), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=540)
    assert done.returncode != 0
    report = json.dumps(json.loads(done.stdout))
    assert "no quantizer takes the layer" in report

"""Checkpoints of the quantization tools, and made-up ones of every format, on a GPU as on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_harness import DEVICE, MARKS, sized
from gpu_models import write
from gpu_steps import NAME, Steps
from numerics.tiny import prompt_of

from quantd.daemon.types import LoadModel
from quantd.daemon.worker.load import Model, load_model

pytestmark = MARKS

FIXTURES = Path(__file__).parents[1] / "fixtures" / "quantized"
WHOLE = sorted(path.parent.name for path in FIXTURES.glob("*/model.safetensors"))
_GPTQ = {"quant_method": "gptq", "group_size": 128, "sym": True}
MADE_UP: dict[str, dict[str, Any]] = {
    **{f"GPTQ {bits}": _GPTQ | {"bits": bits} for bits in (2, 3, 4, 8)},
    "GPTQ act-order": _GPTQ | {"bits": 4, "desc_act": True},
    **{
        kind: {"quant_method": "gguf", "types": {"*": kind}}
        for kind in ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "IQ4_XS", "MXFP4", "Q5_1")
    },
}
RULES = ("int8", "w8a8", "int4")
MAX_ERROR = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 1e-3}
"""What a layer that is wrong gives is near 1."""


def models(folder: Path, **options: Any) -> tuple[Model, Model]:
    """In fp32, which multiplies exactly, on the device and on a CPU."""
    more = {"dtype": "float32", "max_context": 64, "threads": 1} | options
    names = (NAME, "cpu")
    loads = [LoadModel("m", str(folder), device=name, **more) for name in names]
    one, two = (load_model(load, lambda progress: None) for load in loads)
    return one, two


def assert_same_weights(one: Model, two: Model) -> None:
    """Bit for bit, whatever device unpacks them."""
    assert one.info.quantizers == two.info.quantizers
    for name, linear in one.weights.linears.items():
        here, there = linear.dequantize(), two.weights.linears[name].dequantize()
        assert here.device.type == DEVICE.type
        assert torch.equal(here.cpu().float(), there.float()), name


@pytest.mark.parametrize("name", WHOLE)
def test_checkpoints_of_the_tools(name: str) -> None:
    assert_same_weights(*models(FIXTURES / name))


@pytest.mark.parametrize("name", MADE_UP)
def test_made_up_checkpoints(name: str, tmp_path: Path) -> None:
    folder = write(tmp_path, MADE_UP[name])
    assert_same_weights(*models(folder, load_format="dummy"))


@pytest.mark.parametrize("rule", RULES)
def test_rounded_at_load(rule: str, tmp_path: Path) -> None:
    assert_same_weights(*models(write(tmp_path), load_format="dummy", quantization=rule))


@pytest.mark.parametrize("dtype", sized(tuple(MAX_ERROR), ("bfloat16",)))
@pytest.mark.parametrize("name", [*MADE_UP, *RULES])
def test_log_probabilities_are_those_of_a_cpu(name: str, dtype: str, tmp_path: Path) -> None:
    folder = write(tmp_path, MADE_UP.get(name))
    rule = {"quantization": name} if name in RULES else {}
    options: dict[str, Any] = {"load_format": "dummy", "max_context": 64} | rule
    (want,) = Steps(folder, "cpu", dtype="float32", **options).run([prompt_of(40)])
    (got,) = Steps(folder, NAME, dtype=dtype, **options).run([prompt_of(40)])
    assert got.error(want) <= MAX_ERROR[dtype]


def test_there_are_checkpoints() -> None:
    assert len(WHOLE) >= 2

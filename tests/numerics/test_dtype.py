"""Which type a model computes in, when the configuration leaves it open."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from quantd.daemon.machine import processor
from quantd.daemon.worker import load

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("flags\t\t: fpu avx2 avx512f avx512_bf16", torch.bfloat16),
        ("Features\t: fp asimd bf16", torch.bfloat16),
        ("flags\t\t: fpu avx2", torch.float32),
    ],
)
def test_bfloat16_only_where_the_processor_computes_in_it(
    flags: str, expected: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "cpuinfo").write_text(f"processor\t: 0\n{flags}\n\n")
    monkeypatch.setattr(processor, "flags", partial(processor.flags, tmp_path))
    assert load.choose_dtype("auto", "bfloat16", CPU) is expected
    assert load.choose_dtype("bfloat16", "float32", CPU) is torch.bfloat16
    assert load.choose_dtype("auto", "float16", CPU) is torch.float16

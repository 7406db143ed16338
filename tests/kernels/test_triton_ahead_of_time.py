"""Every variant of every Triton kernel compiles for every GPU that is promised, without one: within
the shared memory there is, with no more spilled registers than it says, on tensor cores where it
says so."""

from __future__ import annotations

import importlib
import os
import pkgutil
import re

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET"):
    pytest.skip("what is interpreted cannot be compiled", allow_module_level=True)

from quantd.kernels import triton as room  # noqa: E402
from quantd.kernels.triton.variant import (  # noqa: E402
    AMD_SHARED_LIMIT,
    SHARED_LIMIT,
    Variant,
    compile_for_amd,
    compile_variant,
)

_NAMES = [module.name for module in pkgutil.iter_modules(room.__path__)]
_MODULES = [importlib.import_module(f"{room.__name__}.{name}") for name in _NAMES]
VARIANTS: list[Variant] = [v for module in _MODULES for v in getattr(module, "VARIANTS", ())]


CASES = [(variant, architecture) for variant in VARIANTS for architecture in variant.architectures]


@pytest.mark.parametrize(
    ("variant", "architecture"), CASES, ids=[f"{v.name} sm_{a}" for v, a in CASES]
)
def test_compiles(variant: Variant, architecture: int) -> None:
    compiled = compile_variant(variant, architecture)
    assert compiled.shared <= SHARED_LIMIT[architecture]
    assert compiled.spilled <= variant.spill_limit
    expected = variant.instructions.get(architecture)
    assert expected is None or re.search(expected, compiled.ptx), f"no {expected} in the PTX"


_AMD_SPILL_LIMIT = 256
"""Bytes of a lane: attention over wide heads holds more than there are registers."""


@pytest.mark.parametrize("architecture", AMD_SHARED_LIMIT)
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
def test_compiles_for_amd(variant: Variant, architecture: str) -> None:
    """Which nobody promises (docs/gpus.md): so that it stays known what is missing."""
    compiled = compile_for_amd(variant, architecture)
    assert compiled.shared <= AMD_SHARED_LIMIT[architecture]
    assert compiled.spilled <= _AMD_SPILL_LIMIT
    if "mma" in variant.instructions.get(90, ""):
        assert "v_mfma" in compiled.ptx, "no matrix cores"

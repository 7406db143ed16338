"""Every variant of every Triton kernel compiles for every GPU that is promised, without one: within
the shared memory there is, with no more spilled registers than it says, with addresses in 64 bits,
on tensor cores where it says so."""

from __future__ import annotations

import importlib
import os
import pkgutil
import re

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET"):
    pytest.skip("what is interpreted cannot be compiled", allow_module_level=True)

from triton.runtime.jit import JITFunction  # noqa: E402

from quantd.kernels import triton as room  # noqa: E402
from quantd.kernels.triton import grouped, tuned  # noqa: E402
from quantd.kernels.triton.grouped_layout import PLANES  # noqa: E402
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


def test_no_kernel_is_left_out() -> None:
    kernels = {
        name
        for module in _MODULES
        for name, value in vars(module).items()
        if isinstance(value, JITFunction) and name.endswith("_kernel")
    }
    assert kernels == {variant.kernel.__name__ for variant in VARIANTS}


def test_no_number_of_bits_is_left_out() -> None:
    of_grouped = [v.constants for v in VARIANTS if v.kernel is grouped.grouped_kernel]
    assert {(c["LOW"], c["HIGH"]) for c in of_grouped} == set(PLANES.values())
    assert {(c["LOW"], c["HIGH"]) for c in of_grouped if c["HAS_TABLE"]} == {
        planes for bits, planes in PLANES.items() if bits <= 4
    }


@pytest.mark.parametrize(
    ("variant", "architecture"), CASES, ids=[f"{v.name} sm_{a}" for v, a in CASES]
)
def test_compiles(variant: Variant, architecture: int) -> None:
    compiled = compile_variant(variant, architecture)
    assert compiled.shared <= SHARED_LIMIT[architecture]
    assert not variant.instructions or compiled.plain_products == 0
    assert compiled.spilled <= variant.spill_limit
    assert compiled.narrow == (), "an address beyond 2 ** 31 would wrap around"
    expected = variant.instructions.get(architecture)
    assert expected is None or re.search(expected, compiled.ptx), f"no {expected} in the PTX"


@pytest.mark.parametrize(
    ("most", "tile"), [(most, tile) for most, tiles in tuned.CANDIDATES.items() for tile in tiles]
)
def test_every_tile_that_may_be_measured_has_one_instruction(
    monkeypatch: pytest.MonkeyPatch, most: int, tile: tuned.Tile
) -> None:
    """On 9.0, where a narrow one would have another; what does not fit elsewhere is passed over."""
    monkeypatch.setitem(tuned.MEASURED, ("cpu", 4, most), tile)
    variant = grouped.make_variant("bf16", 4, 128, "center", most, whole=most > 64)
    assert variant.constants["BLOCK_N"] == tile.n
    compiled = compile_variant(variant, 90)
    assert compiled.shared <= SHARED_LIMIT[90]
    assert re.search(r"wgmma\.mma_async", compiled.ptx) and "mma.sync" not in compiled.ptx


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
        assert "v_mfma" in compiled.ptx and not compiled.plain_products, "no matrix cores"

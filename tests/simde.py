"""Levels of the instruction set that this processor lacks, emulated: `emulated` in
kernels/conftest.py compiles them."""

from typing import Any

import pytest

from quantd.kernels.cpu.library import Library, levels, open_library

_LIBRARY = open_library()
_HERE = levels(_LIBRARY) if isinstance(_LIBRARY, Library) else ()
BY_SIMDE = "by SIMDe"


def by_simde(level: str) -> list[Any]:
    """The parameter of a fixture for it; none where the processor has it. One worker compiles it,
    for half a minute, and runs all that needs it."""
    if level in _HERE:
        return []
    return [pytest.param(BY_SIMDE, marks=pytest.mark.xdist_group("simde"))]

"""Every native operation is tested at every level of the instruction set that can run here."""

import ctypes
import dataclasses
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from quantd.kernels.cpu import library as library_module
from quantd.kernels.cpu.library import Library, levels, open_library
from quantd.kernels.cpu.native import Native

_LIBRARY = open_library()
_LEVELS = levels(_LIBRARY) if isinstance(_LIBRARY, Library) else ("not built",)

MAX_NMSE = {torch.float32: 1e-12, torch.bfloat16: 2.0**-16, torch.float16: 2.0**-22}
"""The one table of error ceilings: mean squared error over mean square, against fp64. For 16 bits
it is what rounding the result once can cost at most (half a unit in the last place, squared)."""


@pytest.fixture(params=_LEVELS, scope="session")
def lib(request: pytest.FixtureRequest) -> Native:
    if not isinstance(_LIBRARY, Library):
        pytest.skip(f"no native library: {_LIBRARY}")
    return Native(_LIBRARY, request.param)


@pytest.fixture(scope="session")
def best() -> Native:
    if not isinstance(_LIBRARY, Library):
        pytest.skip(f"no native library: {_LIBRARY}")
    return Native(_LIBRARY, _LIBRARY.best_level)


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Library:
    """What needs AVX-512 with VNNI or BF16, on a processor with AVX2 (`avx512_by_simde.c`)."""
    compiler = shutil.which("gcc")
    if compiler is None or not Path("/usr/include/simde").exists():
        pytest.skip("no gcc or no libsimde-dev")
    if not isinstance(_LIBRARY, Library) or "avx2" not in _LEVELS:
        pytest.skip("no native library, or this processor has no AVX2")
    sources = Path(library_module.__file__).parent / "csrc"
    flags = "-std=gnu11 -O1 -fPIC -ffp-contract=off -w -mavx2 -mfma -mf16c -shared".split()
    path = tmp_path_factory.mktemp("simde") / "emulated.so"
    files = [Path(__file__).parent / "avx512_by_simde.c", sources / "parallel.c"]
    subprocess.run(
        [compiler, *flags, f"-I{sources}", '-DSOURCES=""', *files, "-lm", "-o", path], check=True
    )
    return dataclasses.replace(_LIBRARY, handle=ctypes.CDLL(str(path)))


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    found: torch.dtype = request.param
    return found


@pytest.fixture(autouse=True)
def one_thread_and_a_seed() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def _assert_close(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.shape == want.shape and want.dtype == torch.float64
    error = (got.double() - want).square().mean() / want.square().mean()
    assert error.item() <= MAX_NMSE[got.dtype]


@pytest.fixture(scope="session")
def assert_close() -> Callable[[torch.Tensor, torch.Tensor], None]:
    """got against the specification evaluated in fp64, by the ceiling of got's dtype."""
    return _assert_close

"""Finds and opens the native library, and gives it torch's own threads."""

import ctypes
import glob
import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

LEVELS = ("portable", "avx2", "avx512", "avx512vnni", "avx512bf16")
"""Instruction sets the library knows, ascending; the numbers that quantd_best_level gives."""


@dataclass(frozen=True, slots=True)
class Library:
    handle: ctypes.CDLL
    best_level: str
    """The highest level that this processor has and the library was built with."""
    has_threads: bool
    """Whether torch's thread pool was found; without it every call runs on one thread."""


@cache
def open_library() -> Library | str:
    """The library, or the reason why there is none. Opened once per process."""
    here = Path(__file__).parent
    path = next((p for p in (here / "_native.so", here / "_native.dylib") if p.exists()), None)
    if path is None:
        return "it was not built (a C compiler was missing at installation)"
    try:
        handle = ctypes.CDLL(str(path))
        handle.quantd_sources.restype = ctypes.c_char_p
        if handle.quantd_sources().decode() != _source_digest(here / "csrc"):
            return f"{path.name} is older than its sources: python setup.py build_ext --inplace"
        best = LEVELS[handle.quantd_best_level()]
        # A build for a processor that is not x86 has the portable level only.
        best = best if hasattr(handle, f"quantd_rms_norm_{best}") else LEVELS[0]
    except (OSError, AttributeError) as error:
        return f"{path.name} cannot be opened: {error}"
    return Library(handle, best, _share_threads(handle))


def _source_digest(folder: Path) -> str:
    """As in setup.py. The sources are installed beside the library, so that they can be compared:
    a signature that changed under a stale library would corrupt memory."""
    files = sorted(folder.glob("*.[ch]"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def levels(library: Library) -> tuple[str, ...]:
    """The levels that can run here, ascending."""
    names = LEVELS[: LEVELS.index(library.best_level) + 1]
    return tuple(n for n in names if hasattr(library.handle, f"quantd_rms_norm_{n}"))


def _share_threads(handle: ctypes.CDLL) -> bool:
    """Hands the entry point of torch's OpenMP runtime to the library.

    First what is already visible in the process (torch opens its dependencies globally), then the
    copies that torch's wheels bring. Never the system's own: if that is not the one torch uses, it
    would be a second pool on the same cores.
    """
    root = Path(torch.__file__).parent
    bundled = glob.glob(f"{root}/lib/libgomp*") + glob.glob(f"{root.parent}/torch.libs/libgomp*")
    for name in (None, *bundled):
        try:
            start_team = ctypes.CDLL(name).GOMP_parallel
        except (OSError, AttributeError):
            continue
        handle.quantd_set_runtime.argtypes = [ctypes.c_void_p]
        handle.quantd_set_runtime.restype = None
        handle.quantd_set_runtime(ctypes.cast(start_team, ctypes.c_void_p))
        return True
    return False

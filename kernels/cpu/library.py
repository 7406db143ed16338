"""Finds and opens the native library."""

import ctypes
import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

LEVELS = ("portable", "avx2", "avx512", "avx512vnni", "avx512bf16")
"""Instruction sets the library knows, ascending; the numbers that quantd_best_level gives."""

NEEDS = {
    "avx2": ("avx2", "fma", "f16c"),
    "avx512": ("avx512f", "avx512bw", "avx512dq", "avx512vl"),
    "avx512vnni": ("avx512_vnni",),
    "avx512bf16": ("avx512_bf16",),
}
"""What a level needs beyond the one below, in Linux's names: to say why it was not taken."""


@dataclass(frozen=True, slots=True)
class Library:
    handle: ctypes.CDLL
    best_level: str
    """The highest level that this processor has and the library was built with."""


@cache
def open_library() -> Library | str:
    """The library, or the reason why there is none. Opened once per process."""
    here = Path(__file__).parent
    path = library_file()
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
    return Library(handle, best)


def library_file() -> Path | None:
    """None: it was not built."""
    here = Path(__file__).parent
    return next((p for p in (here / "_native.so", here / "_native.dylib") if p.exists()), None)


def _source_digest(folder: Path) -> str:
    """As in setup.py. The sources are installed beside the library, so that they can be compared:
    a signature that changed under a stale library would corrupt memory."""
    files = sorted(folder.glob("*.[ch]"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def levels(library: Library) -> tuple[str, ...]:
    """The levels that can run here, ascending."""
    names = LEVELS[: LEVELS.index(library.best_level) + 1]
    return tuple(n for n in names if hasattr(library.handle, f"quantd_rms_norm_{n}"))

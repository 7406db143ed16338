"""Builds the native CPU library (kernels/cpu/csrc); everything else is in pyproject.toml.

It is plain C, loaded with ctypes, so it needs no Python or torch headers. Without a compiler the
installation succeeds all the same and the operations run in plain torch.
"""

import hashlib
import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CSRC = Path("kernels/cpu/csrc")
FLAGS = [
    "-std=gnu11",
    "-O3",
    "-g0",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-Wno-psabi",
]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
LEVELS = {"portable": []}
"""Each level of the instruction set is the same source compiled with other flags; the one to use
is chosen when the library is loaded."""
if platform.machine() in ("x86_64", "AMD64"):
    LEVELS |= {
        "avx2": AVX2,
        "avx512": AVX512,
        "avx512vnni": [*AVX512, "-mavx512vnni"],
        "avx512bf16": [*AVX512, "-mavx512vnni", "-mavx512bf16"],
    }


def source_digest() -> str:
    """What the library says it was built from; kernels/cpu/library.py computes the same."""
    files = sorted(CSRC.glob("*.[ch]"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


class BuildNative(build_ext):
    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        parts = [(CSRC / "parallel.c", "parallel", [f'-DSOURCES="{source_digest()}"'])]
        for level, flags in LEVELS.items():
            parts.append((CSRC / "level.c", level, [*flags, f"-DLEVEL={level}"]))
        # Side by side: a level takes some ten seconds of a core.
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(self._compile, parts))
        self.compiler.link_shared_object(sum(objects, []), str(target), libraries=["m", "pthread"])

    def _compile(self, part: tuple[Path, str, list[str]]) -> list[str]:
        source, name, flags = part
        # A directory per object: the compiler class names objects after their source.
        output = Path(self.build_temp) / name
        return self.compiler.compile([str(source)], str(output), extra_preargs=[*FLAGS, *flags])

    def get_ext_filename(self, fullname: str) -> str:
        # No Python ABI in the name: it is not a Python module and any version can load it.
        return str(Path(*fullname.split("."))) + (".dylib" if sys.platform == "darwin" else ".so")


setup(
    ext_modules=[
        # optional: a failed build is a warning and not an error.
        Extension(
            "quantd.kernels.cpu._native",
            sources=[str(CSRC / "parallel.c"), str(CSRC / "level.c")],
            depends=sorted(str(path) for path in CSRC.glob("*.h")),
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildNative},
)

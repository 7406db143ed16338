"""What a kernel is compiled to: the variants that are proven without a GPU, and what each may cost.

A kernel's module lists the variants that the launchers use, as `VARIANTS`. `tests/kernels/
test_triton_ahead_of_time.py` compiles every one for every architecture, with no GPU needed.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

SHARED_LIMIT = {80: 166_912, 90: 232_448, 120: 101_376}
"""Bytes of shared memory that one block may have, by compute capability (CUDA C++ Programming
Guide, table of technical specifications)."""
AMD_SHARED_LIMIT = {"gfx942": 65_536}
"""The same of AMD's GPUs, by architecture (CDNA 3 Instruction Set Architecture: LDS)."""

_SPILLED = re.compile(r"(\d+) bytes spill stores")
_REGISTERS = re.compile(r"Used (\d+) registers")
_VGPRS = re.compile(r"\.vgpr_count:\s*(\d+)")
_VGPRS_SPILLED = re.compile(r"\.vgpr_spill_count:\s*(\d+)")
_PLAIN_PRODUCT = re.compile(r"tt\.dot .*parent = #blocked")
_CONSTANT = re.compile(r"(%\S+) = arith\.constant")
_SPLAT = re.compile(r"(%\S+) = tt\.splat (%\S+)")
_PRODUCT_OF_32_BITS = re.compile(r"arith\.muli (%\S+), (%\S+) : (?:i32|\S+xi32>) loc\((#loc\d*)\)")
_PLACE = re.compile(r"^(#loc\d*) = loc\((.*)\)$", re.MULTILINE)
_ANOTHER_PLACE = re.compile(r"#loc\d*")
_FILE_AND_LINE = re.compile(r'"([^"]*\.py)":(\d+):')


@dataclass(frozen=True, slots=True)
class Variant:
    """One kernel with its types and constants."""

    name: str
    kernel: Any
    """A `triton.jit` function, not an autotuned one."""
    signature: Mapping[str, str]
    """Argument → Triton's name of its type: "*fp16", "*i32", "i64", "fp32"; without constants."""
    constants: Mapping[str, object]
    num_warps: int = 4
    num_stages: int = 2
    is_fused: bool = True
    """A product and a sum may be rounded once, as Triton does it unless told not to."""
    aligned: tuple[str, ...] = ()
    """Pointers and integers that are multiples of 16, as the launcher's always are."""
    instructions: Mapping[int, str] = field(default_factory=lambda: MappingProxyType({}))
    """Architecture → a regular expression of what the PTX must have: the tensor core's products."""
    spill_limit: int = 0
    """Bytes of registers that may be spilled to memory."""
    architectures: tuple[int, ...] = tuple(SHARED_LIMIT)
    """Those that have what it needs."""


@dataclass(frozen=True, slots=True)
class Compiled:
    ptx: str
    """Or another vendor's assembly."""
    shared: int
    """Bytes of shared memory of a block."""
    registers: int
    """Of a thread."""
    spilled: int
    """Bytes of a thread's registers that live in memory."""
    narrow: tuple[str, ...]
    """Products in 32 bits of two numbers that are known only when it runs, as "file.py:line": what
    an address beyond 2**31 must not be made of."""
    plain_products: int
    """Matrix products that do without tensor cores."""


def compile_variant(variant: Variant, architecture: int) -> Compiled:
    """For an NVIDIA GPU of compute capability architecture / 10, here without one. Raises what
    Triton or ptxas raises."""
    built = _compile(variant, "cuda", architecture, 32)
    ptx: str = built.asm["ptx"]
    registers, spilled = _assembled(ptx)
    return _compiled(built, ptx, registers, spilled)


def compile_for_amd(variant: Variant, architecture: str) -> Compiled:
    """For an AMD GPU of 64 lanes such as "gfx942", its assembly in the place of PTX. Raises what
    Triton raises; what it gives, it has linked."""
    built = _compile(variant, "hip", architecture, 64)
    assembly: str = built.asm["amdgcn"]
    registers, spilled = _VGPRS.search(assembly), _VGPRS_SPILLED.search(assembly)
    assert registers and spilled and built.asm["hsaco"], assembly
    return _compiled(built, assembly, int(registers[1]), 4 * int(spilled[1]))


def _compile(variant: Variant, backend: str, architecture: int | str, lanes: int) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = variant.kernel.arg_names
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in variant.aligned}
    constants = {(names.index(name),): value for name, value in variant.constants.items()}
    types = dict.fromkeys(variant.constants, "constexpr") | dict(variant.signature)
    source = ASTSource(variant.kernel, {n: types[n] for n in names}, constants, attributes)
    options = {
        "num_warps": variant.num_warps,
        "num_stages": variant.num_stages,
        "enable_fp_fusion": variant.is_fused,
    }
    target = GPUTarget(backend, architecture, lanes)
    return triton.compile(source, target=target, options=options)


def _compiled(built: Any, assembly: str, registers: int, spilled: int) -> Compiled:
    plain = len(_PLAIN_PRODUCT.findall(built.asm["ttgir"]))
    shared, narrow = built.metadata.shared, _narrow(built.asm["ttir"])
    return Compiled(assembly, shared, registers, spilled, narrow, plain)


def _narrow(ttir: str) -> tuple[str, ...]:
    places = dict(_PLACE.findall(ttir))
    constants = set(_CONSTANT.findall(ttir))
    constants |= {name for name, value in _SPLAT.findall(ttir) if value in constants}
    return tuple(
        sorted(
            {
                _source(place, places)
                for left, right, place in _PRODUCT_OF_32_BITS.findall(ttir)
                if not {left, right} & constants
            }
        )
    )


def _source(place: str, places: Mapping[str, str]) -> str:
    """The innermost line of a location, which may name others."""
    text = places[place]
    while (found := _FILE_AND_LINE.search(text)) is None:
        inner = _ANOTHER_PLACE.search(text)
        if inner is None:
            return text
        text = places[inner[0]]
    return f"{Path(found[1]).name}:{found[2]}"


def _assembled(ptx: str) -> tuple[int, int]:
    """Registers of a thread and bytes it spills, by the assembler that Triton brings."""
    import triton

    found = re.search(r"^\.target (sm_\w+)", ptx, re.MULTILINE)
    assert found is not None, "PTX names its target"
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    if found[1].startswith("sm_12") and tool.with_name("ptxas-blackwell").exists():
        tool = tool.with_name("ptxas-blackwell")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(ptx)
        output = f"{folder}/kernel.cubin"
        command = [str(tool), "-v", f"--gpu-name={found[1]}", str(path), "-o", output]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spilled, registers = _SPILLED.search(said), _REGISTERS.search(said)
    assert spilled and registers, said
    return int(registers[1]), int(spilled[1])

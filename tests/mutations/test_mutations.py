"""The proofs of the Triton kernels fail when a kernel is broken on purpose: `make test-mutations`.

Each mutation changes one place of a copy of `kernels/`, and the tests named beside it, run against
that copy, must fail, in the way that is said. A proof that no mutation breaks proves nothing.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]

_ASSERTED = r"^E +(assert|AssertionError)"
_SHARED = r"\.shared$"
_SPILLED = r"\.spilled$"
_NARROW = r"would wrap around"
_PLAIN = r"\.plain_products$"
_NO_INSTRUCTION = r"in the PTX"


@dataclass(frozen=True, slots=True)
class Mutation:
    name: str
    file: str
    """In kernels/triton."""
    old: str
    """Occurs once."""
    new: str
    test: str
    """In tests/triton, or a name of a variant with its architecture."""
    shows: str = _ASSERTED
    """A regular expression that a line of the failure matches."""

    @property
    def interpreted(self) -> bool:
        return self.test.startswith("test_")


ARITHMETIC = (
    Mutation(
        "attention sees one key too many",
        "attention.py",
        "(key[None, :] <= last_key[:, None])",
        "(key[None, :] <= last_key[:, None] + 1)",
        "test_attention.py::test_one_sequence",
    ),
    Mutation(
        "a window is one key too long",
        "attention.py",
        "first_key = last_key - window + 1",
        "first_key = last_key - window",
        "test_attention.py::test_a_sliding_window",
    ),
    Mutation(
        "merging two spans does not scale the first",
        "attention.py",
        "total = tl.fma(total, keep, part_total * add)",
        "total = total + part_total * add",
        "test_attention.py::test_a_ragged_batch",
    ),
    Mutation(
        "a sink is not counted",
        "attention.py",
        "total = tl.fma(total, keep, tl.exp2(tl.fma(sink, unit, -top)))",
        "total = total * keep",
        "test_attention.py::test_softcap_and_sinks",
    ),
    Mutation(
        "the codes of the neighbouring chunk",
        "grouped.py",
        "code = (low >> (chunk * LOW))",
        "code = (low >> ((chunk ^ 1) * LOW))",
        "test_grouped.py::test_products_match_the_specification",
    ),
    Mutation(
        "the second plane by the shift of the first",
        "grouped.py",
        "((high >> (chunk * HIGH))",
        "((high >> (chunk * LOW))",
        "test_grouped.py::test_products_match_the_specification",
    ),
    Mutation(
        "the scale of the neighbouring group",
        "grouped.py",
        "group = start // GROUP if GROUP else 0",
        "group = (start + 16) // GROUP if GROUP else 0",
        "test_grouped.py::test_products_match_the_specification",
    ),
    Mutation(
        "rotary turns the wrong way",
        "rotary.py",
        "(first * c - second * s)",
        "(first * c + second * s)",
        "test_rotary.py::test_rotary",
    ),
    Mutation(
        "e4m3 rounds halves up",
        "fp8.py",
        "rounded = (word + 0x7FFFF + ((word >> 20) & 1)) >> 20",
        "rounded = (word + 0x80000) >> 20",
        "test_rotary.py::test_e4m3_rounds_as_torch_does",
    ),
    Mutation(
        "a filter takes one token too many",
        "sampling.py",
        "short = sums < goal",
        "short = sums <= goal",
        "test_sampling.py::test_a_filter_keeps_no_more_and_no_less",
    ),
    Mutation(
        "a grammar's mask read in words of 31",
        "sampling.py",
        "(word >> (token % 32)) & 1",
        "(word >> (token % 31)) & 1",
        "test_sampling.py::test_a_row_without_an_allowed_token",
    ),
    Mutation(
        "a token's penalty kept from whoever had its place before",
        "sampling.py",
        "if is_new:",
        "if False:",
        "test_sampling.py::test_what_was_seen_is_kept_from_step_to_step",
    ),
    Mutation(
        "an expert's rows begin behind its own",
        "routing.py",
        "place = tl.sum(tl.where(expert < mine, counts, 0), 0)",
        "place = tl.sum(tl.where(expert <= mine, counts, 0), 0)",
        "test_experts.py::test_a_plan_is_a_stable_sort",
    ),
    Mutation(
        "the epsilon of a norm outside of the root",
        "norms.py",
        "tl.sqrt(tl.sum(value * value, axis=0) / width + eps)",
        "(tl.sqrt(tl.sum(value * value, axis=0) / width) + eps)",
        "test_norms.py::test_rms_norm",
    ),
    Mutation(
        "the gate in the place of what it gates",
        "activation.py",
        "value *= tl.load(start + width + column",
        "value *= tl.load(start + column",
        "test_activation.py::test_act_and_mul",
    ),
    Mutation(
        "zeros of two signs are not alike in routing",
        "routing.py",
        "plain = tl.where(logit == 0, 0.0, logit)",
        "plain = logit",
        "test_experts.py::test_routes_as_the_specification",
    ),
    Mutation(
        "activations are cut off where they are to be rounded",
        "w8a8.py",
        "scaled = (scaled + rounder) - rounder",
        "scaled = scaled",
        "test_w8a8.py::test_rounds_halves_to_even",
    ),
)
ORDER = (
    Mutation(
        "copies of blocks from the last to the first",
        "copies.py",
        "for i in range(num_copies):",
        "for i in range(num_copies - 1, -1, -1):",
        "test_copies.py::test_copies_follow_one_another",
    ),
    Mutation(
        "spans are added from the last to the first by one program and by many not",
        "grouped.py",
        "for span in range(first_span, last_span):",
        "for span in range(last_span - 1, first_span - 1, -1):",
        "test_grouped.py::test_spans_are_added_in_one_order_however_many_programs_do",
    ),
    Mutation(
        "no barrier between rotating and storing",
        "rotary.py",
        "            tl.debug_barrier()\n",
        "",
        "rotary writes bf16 32 sm_80",
        _NO_INSTRUCTION,
    ),
)
RESOURCES = (
    Mutation(
        "four times as many columns of a tile",
        "w8a8.py",
        "_BLOCK_K = 128",
        "_BLOCK_K = 512",
        "w8a8 i8 bf16 rows 512 sm_80",
        _SHARED,
    ),
    Mutation(
        "twice as many keys of a tile",
        "attention.py",
        "keys = 64 if dim",
        "keys = 128 if dim",
        "attention bf16 128/4 sm_80",
        _SPILLED,
    ),
    Mutation(
        "a product without tensor cores",
        "grouped.py",
        "weight.to(DTYPE), read.to(DTYPE), sum_",
        "weight, read.to(tl.float32), sum_",
        "grouped bf16 4 bits center of 128 rows 1 sm_80",
        _PLAIN,
    ),
    Mutation(
        "one of two products without tensor cores",
        "attention.py",
        "score = tl.dot(query, tl.trans(keys), ",
        "score = tl.dot(query.to(tl.float32), tl.trans(keys).to(tl.float32), ",
        "attention bf16 64/4 sm_80",
        _PLAIN,
    ),
    Mutation(
        "a row's address in 32 bits",
        "norms.py",
        "row = tl.program_id(0).to(tl.int64)",
        "row = tl.program_id(0)",
        "rms_norm bf16 4096 sm_80",
        _NARROW,
    ),
    Mutation(
        "a tile's address in 32 bits",
        "w8a8.py",
        "m = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)",
        "m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)",
        "w8a8 i8 bf16 rows 1 sm_80",
        _NARROW,
    ),
)
MUTATIONS = ARITHMETIC + ORDER + RESOURCES


def _copy(folder: Path) -> Path:
    """The package with kernels of its own; the rest are links. Returns its kernels/triton."""
    package = folder / "quantd"
    package.mkdir()
    for room in ("daemon", "plugins"):
        (package / room).symlink_to(ROOT / room)
    shutil.copytree(
        ROOT / "kernels", package / "kernels", ignore=shutil.ignore_patterns("__pycache__")
    )
    return package / "kernels/triton"


def _run(tests: list[str], folder: Path, *, interpreted: bool) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ, PYTHONPATH=str(folder), PYTHONDONTWRITEBYTECODE="1")
    environment.pop("TRITON_INTERPRET", None)
    if interpreted:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    command += ["-p", "no:xdist", *tests]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def _where(mutation: Mutation) -> str:
    if mutation.interpreted:
        return f"tests/triton/{mutation.test}"
    return f"tests/kernels/test_triton_ahead_of_time.py::test_compiles[{mutation.test}]"


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_is_noticed(mutation: Mutation, tmp_path: Path) -> None:
    path = _copy(tmp_path) / mutation.file
    source = path.read_text()
    assert source.count(mutation.old) == 1, f"{mutation.old!r} is not once in {mutation.file}"
    path.write_text(source.replace(mutation.old, mutation.new))
    done = _run([_where(mutation)], tmp_path, interpreted=mutation.interpreted)
    # 1: tests failed; others: they could not be collected, or there are none.
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(mutation.shows, done.stdout, re.MULTILINE), done.stdout


def test_a_copy_without_a_mutation_passes(tmp_path: Path) -> None:
    _copy(tmp_path)
    done = _run(["tests/triton/test_copies.py"], tmp_path, interpreted=True)
    assert done.returncode == 0, done.stdout + done.stderr

"""Every quantized type of GGUF against the gguf package's own dequantizer, bit for bit."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from gguf.constants import GGML_QUANT_SIZES

from quantd.daemon.gguf.types import BLOCKS as FILE_BLOCKS
from quantd.daemon.gguf.types import TYPE_NAMES
from quantd.kernels import ops
from quantd.plugins.api import LinearSpec
from quantd.plugins.gguf.format import BLOCKS, unpack
from quantd.plugins.gguf.plugin import GgufQuantizer

ROWS, BLOCKS_PER_ROW = 48, 3
_HALVES = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ1_S": (0,),
    "IQ2_XXS": (0,),
    "IQ2_XS": (0,),
    "IQ2_S": (0,),
    "IQ3_XXS": (0,),
    "IQ3_S": (0,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
    "TQ1_0": (52,),
    "TQ2_0": (64,),
}
"""Where the fp16 numbers of a block are. IQ1_M has its own in parts; MXFP4 and NVFP4 have none."""
_SANE = (0.01, -0.003, 0.5, 1.0)
_EXTREME = (0.0, -0.0, 65504.0, -65504.0, 2.0**-24, -(2.0**-14), 6.0e-5)


def random_blocks(name: str, scales: tuple[float, ...], seed: int) -> np.ndarray:
    """uint8 [ROWS, bytes of a row]: every bit random but those of the fp16 scales."""
    rng = np.random.default_rng(seed)
    nbytes = BLOCKS[name][1]
    blocks = rng.integers(0, 256, (ROWS * BLOCKS_PER_ROW, nbytes), dtype=np.uint8)
    chosen = np.array(scales, np.float16)
    for at in _HALVES.get(name, ()):
        values = rng.choice(chosen, len(blocks))
        blocks[:, at : at + 2] = values.view(np.uint8).reshape(-1, 2)
    if name == "IQ1_M":
        bits = rng.choice(chosen, len(blocks)).view(np.uint16)
        packed = blocks[:, 48:].copy().view(np.uint16)
        for i in range(4):
            packed[:, i] = packed[:, i] & 0x0FFF | ((bits >> (4 * i)) & 0xF) << 12
        blocks[:, 48:] = packed.view(np.uint8)
    return blocks.reshape(ROWS, -1)


def test_all_types_that_the_package_dequantizes_are_read() -> None:
    known = {kind.name for kind in quants._type_traits} - {"BF16"}
    assert known - {"Q1_0"} == set(BLOCKS)


@pytest.mark.parametrize("name", BLOCKS)
def test_sizes_are_those_of_the_package(name: str) -> None:
    assert GGML_QUANT_SIZES[GGMLQuantizationType[name]] == BLOCKS[name] == FILE_BLOCKS[name]


def test_numbers_of_types_are_those_of_the_package() -> None:
    for number, name in TYPE_NAMES.items():
        assert GGMLQuantizationType[name] == number
        assert GGML_QUANT_SIZES[GGMLQuantizationType[name]] == FILE_BLOCKS[name]


@pytest.mark.parametrize("scales", [_SANE, _EXTREME], ids=["sane", "extreme"])
@pytest.mark.parametrize("name", BLOCKS)
def test_a_type_is_read_bit_for_bit(name: str, scales: tuple[float, ...]) -> None:
    raw = random_blocks(name, scales, seed=len(name))
    with np.errstate(over="ignore"):  # MXFP4's greatest scale
        expected = quants.dequantize(raw, GGMLQuantizationType[name])
    codes = unpack(name, torch.from_numpy(raw))
    assert int(codes.codes.max()) < 1 << codes.bits
    actual = ops.dequantize_grouped(codes).numpy()
    # As integers, so that a wrong sign of a zero does not pass.
    np.testing.assert_array_equal(actual.view(np.int32), expected.view(np.int32))


@pytest.mark.parametrize("name", BLOCKS)
def test_a_view_of_some_rows_is_read_as_those_rows(name: str) -> None:
    raw = torch.from_numpy(random_blocks(name, _SANE, seed=5))
    whole, some = unpack(name, raw), unpack(name, raw[16:32])
    assert torch.equal(some.codes, whole.codes[16:32])
    assert torch.equal(some.scale, whole.scale[16:32])


class Typed:
    """A TensorSource whose tensors have a type and nothing else."""

    config: Mapping[str, Any] = {}

    def __init__(self, kind: str) -> None:
        self._kind = kind

    def names(self) -> Collection[str]:
        raise NotImplementedError

    def shape(self, name: str) -> tuple[int, ...]:
        raise NotImplementedError

    def dtype(self, name: str) -> str:
        return self._kind

    def read(self, name: str) -> torch.Tensor:
        raise NotImplementedError

    def release(self, name: str) -> None:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("Q4_K", "Q4_K: 4 bits, groups of 32"),
        ("IQ2_XXS", "IQ2_XXS: 4 bits of a table, groups of 32"),
        ("Q6_K", "Q6_K: 6 bits, groups of 16"),
    ],
)
def test_describes_what_a_type_becomes(kind: str, text: str) -> None:
    spec = LinearSpec("lm_head", 512, (3,), ("lm_head",), torch.float32)
    described = GgufQuantizer().describe(spec, Typed(kind), torch.device("cpu"))
    assert described.text == text
    assert 3 * 512 / 8 < described.nbytes < 3 * 512

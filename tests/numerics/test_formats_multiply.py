"""Every format as a loaded layer: the weight it multiplies by, and its products with any number of
rows of activations."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import gguf
import pytest
import torch
from numerics import test_awq, test_gptq
from numerics.formats import Tensors, layer
from numerics.packed import CPU, Source, spec_of
from numerics.test_gguf_format import ROWS, random_blocks
from torch import Tensor

from quantd.plugins.api import LinearSpec, QuantLinear, TensorSource
from quantd.plugins.awq.plugin import AwqQuantizer
from quantd.plugins.gguf.format import BLOCKS
from quantd.plugins.gguf.plugin import GgufQuantizer
from quantd.plugins.gptq.plugin import GptqQuantizer
from quantd.plugins.rtn.plugin import Int4Quantizer, Int8Quantizer, W8A8Quantizer

torch.set_num_threads(1)

NUM_TOKENS = (1, 2, 7, 8, 16, 33, 512)
GPTQ = tuple(f"gptq-{bits}" for bits in (2, 3, 4, 8))
AWQ = tuple(f"awq-{version}" for version in ("gemm", "gemv", "gemv_fast"))
MADE = {"int8": Int8Quantizer, "int4": Int4Quantizer, "w8a8": W8A8Quantizer}
FORMATS = (*BLOCKS, *GPTQ, *AWQ, *MADE)


class Blocks:
    """A TensorSource of one GGUF tensor, "m.weight"."""

    config: Mapping[str, Any] = {}

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._data = torch.from_numpy(random_blocks(kind, (0.01, -0.003, 0.02), len(kind)))
        size, nbytes = BLOCKS[kind]
        if kind == "MXFP4":
            # Its scale is the exponent in the first byte: of any size at random.
            self._data[:, ::nbytes] = self._data[:, ::nbytes] % 5 + 118
        self.columns = self._data.shape[1] // nbytes * size

    def names(self) -> Collection[str]:
        return ("m.weight",)

    def shape(self, name: str) -> tuple[int, ...]:
        return ROWS, self.columns

    def dtype(self, name: str) -> str:
        return self._kind

    def read(self, name: str) -> Tensor:
        return self._data

    def release(self, name: str) -> None: ...

    def reference(self) -> Tensor:
        kind = gguf.GGMLQuantizationType[self._kind]
        return torch.from_numpy(gguf.quants.dequantize(self._data.numpy(), kind))


def gptq(bits: int) -> tuple[Source, LinearSpec]:
    """Columns of any group beside each other, a number of them that no tile divides."""
    tensors = test_gptq.packed(*test_gptq.make(bits, 64, 96, 3), bits)
    order = torch.randperm(96, generator=torch.Generator().manual_seed(bits))
    tensors["m.g_idx"] = (torch.arange(96, dtype=torch.int32) // 32)[order]
    said = {"bits": bits, "group_size": 32, "desc_act": True}
    return Source(tensors, quant_method="gptq", **said), spec_of(96, 64)


def case(name: str) -> tuple[Any, TensorSource, LinearSpec]:
    """(quantizer, source, a spec that is exact)"""
    if name in BLOCKS:
        blocks = Blocks(name)
        return GgufQuantizer(), blocks, layer(ROWS, blocks.columns, exact=True)
    if name in MADE:
        weight = torch.randn(50, 90, generator=torch.Generator().manual_seed(1))
        return MADE[name](), Tensors({"m.weight": weight}), layer(50, 90, exact=True)
    method, _, rest = name.partition("-")
    if method == "gptq":
        return GptqQuantizer(), *gptq(int(rest))
    tensors, _ = test_awq.make(rest, 40, 192, 64)
    return AwqQuantizer(), test_awq.source_of(tensors, rest, 64), spec_of(192, 40)


def worst(got: Tensor, want: Tensor) -> float:
    """The error of the worst output, relative to all of its values."""
    return float(((got.double() - want).norm(dim=0) / want.norm(dim=0)).max())


def load(name: str, *, exact: bool) -> tuple[QuantLinear, LinearSpec]:
    quantizer, source, spec = case(name)
    spec = LinearSpec("m", spec.in_features, spec.out_splits, spec.parts, spec.dtype, exact=exact)
    return quantizer.load(spec, source, CPU), spec


@pytest.mark.parametrize("name", BLOCKS)
def test_a_layer_holds_what_the_gguf_package_reads(name: str) -> None:
    """Bit for bit, from the file's blocks through packing and back."""
    loaded, _ = load(name, exact=True)
    assert torch.equal(loaded.dequantize(), Blocks(name).reference())


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "w8a8"])
def test_products_are_those_of_the_dequantized_weight(name: str) -> None:
    """w8a8 rounds tokens also where all else is exact: tests of its own."""
    loaded, spec = load(name, exact=True)
    weight = loaded.dequantize().double()
    rounded, _ = load(name, exact=False)
    for num_tokens in NUM_TOKENS:
        generator = torch.Generator().manual_seed(num_tokens)
        x = torch.randn(num_tokens, spec.in_features, generator=generator)
        want = x.double() @ weight.T
        assert worst(loaded(x).T, want.T) < 2.0**-17
        # Activations in eight bits, scales in eleven.
        assert worst(rounded(x).T, want.T) < 2.0**-5

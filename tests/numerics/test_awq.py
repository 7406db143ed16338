"""AWQ: fixtures of the tools against their own kernels, and independent packers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics.packed import (
    CPU,
    FIXTURES,
    K_PROJ,
    Source,
    load_float32,
    logits_of,
    multiply_rounded,
    quantization_of,
    spec_of,
)
from safetensors.torch import load_file
from torch import Tensor

from quantd.plugins.api import Refused
from quantd.plugins.awq.plugin import AwqQuantizer
from quantd.plugins.grouped import GroupedLinear

torch.set_num_threads(1)

FOLDERS = sorted(path.name for path in FIXTURES.glob("awq-*"))
WHOLE = [name for name in FOLDERS if (FIXTURES / name / "model.safetensors").exists()]
AWQ = AwqQuantizer()


def words_of(nibbles: np.ndarray, order: tuple[int, ...]) -> np.ndarray:
    """[R, C] -> int32 [R, C / 8]; number order[i] of eight is at bits 4 * i."""
    out = np.zeros((len(nibbles), nibbles.shape[1] // 8), dtype=np.uint32)
    for i, which in enumerate(order):
        out |= nibbles[:, which::8].astype(np.uint32) << np.uint32(4 * i)
    return out.view(np.int32)


def fast_words_of(codes: np.ndarray) -> np.ndarray:
    """[N, K] -> int16 [N / 4, K], one code after the other."""
    rows, columns = codes.shape
    out = np.zeros((rows // 4, columns), dtype=np.uint16)
    for n in range(rows):
        for k in range(columns):
            i, j, t = k % 32 // 8, k % 8 // 2, k % 2
            nibble = n % 4 * 64 + k % 64 // 32 * 32 + j * 8 + t * 4 + i
            out[n // 4, k // 64 * 64 + nibble // 4] |= int(codes[n, k]) << nibble % 4 * 4
    return out.view(np.int16)


def make(version: str, rows: int, columns: int, group: int, seed: int = 0) -> tuple[Any, Any]:
    """(tensors as a checkpoint has them, the weight in fp32)"""
    rng = np.random.default_rng(seed)
    groups = columns // group
    codes = rng.integers(0, 16, (rows, columns))
    zeros = rng.integers(0, 16, (rows, groups))
    scales = rng.uniform(0.01, 2, (rows, groups)).astype(np.float16)
    at = np.arange(columns) // group
    offsets = -(zeros * scales.astype(np.float64))
    if version == "gemm":
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        arrays = words_of(codes.T, order), words_of(zeros.T, order), scales.T.copy()
    else:
        # Four of 32 columns, two of 64 or one of 128 make a word's worth of groups.
        unit = 8 * max(1, 128 // group)
        padding = ((0, 0), (0, -groups % unit))
        wide, many = np.pad(scales, padding), np.pad(zeros, padding)
        if version == "gemv":
            arrays = words_of(codes, tuple(range(8))), words_of(many, tuple(range(8))), wide
        else:
            minus = np.pad(offsets.astype(np.float16), padding)
            offsets = offsets.astype(np.float16).astype(np.float64)
            arrays = fast_words_of(codes), minus.T.copy(), wide.T.copy()
    leaves = ("m.qweight", "m.qzeros", "m.scales")
    tensors = {name: torch.from_numpy(array) for name, array in zip(leaves, arrays, strict=True)}
    # One product that is exact in fp32 and one rounded sum.
    weight = (codes * scales[:, at].astype(np.float64) + offsets[:, at]).astype(np.float32)
    return tensors, torch.from_numpy(weight)


def source_of(tensors: dict[str, Tensor], version: str, group: int, **said: Any) -> Source:
    return Source(tensors, quant_method="awq", bits=4, version=version, group_size=group, **said)


def refusal(columns: int = 128, rows: int = 32, **said: Any) -> str:
    tensors, _ = make("gemm", 32, 128, 64)
    config = {"quant_method": "awq", "bits": 4, "version": "gemm", "group_size": 64} | said
    with pytest.raises(Refused) as refused:
        AWQ.tensors(spec_of(columns, rows), Source(tensors, **config))
    return str(refused.value)


@pytest.mark.parametrize("name", FOLDERS)
def test_headers_are_as_expected(name: str) -> None:
    stored = load_file(FIXTURES / name / "oracle" / "oracle.safetensors")
    source = Source(stored, **quantization_of(FIXTURES / name))
    spec = spec_of(256, 128, K_PROJ)
    assert AWQ.claims(spec, source)
    shapes = AWQ.tensors(spec, source)
    assert len(shapes) == 3
    for tensor, shape in shapes.items():
        assert source.shape(tensor) == shape


@pytest.mark.parametrize("name", [name for name in FOLDERS if "gemv" not in name])
def test_weights_are_those_of_the_tools_kernel(name: str) -> None:
    """The tools multiply in fp16, so theirs are ours rounded to fp16, bit for bit."""
    stored = load_file(FIXTURES / name / "oracle" / "oracle.safetensors")
    source = Source(stored, **quantization_of(FIXTURES / name))
    got = AWQ.load(spec_of(256, 128, K_PROJ), source, CPU).dequantize()
    assert torch.equal(got.half(), stored["oracle"])


def test_gemv_of_a_tool_is_near_the_weight_that_it_quantized() -> None:
    """The tool has no kernel for a CPU. AWQ scales columns before it quantizes: directions are
    what stays; a column whose scale is small loses more of it than the others."""
    folder = FIXTURES / "awq-autoawq-w4-g64-gemv"
    stored = load_file(folder / "oracle" / "oracle.safetensors")
    source = Source(stored, **quantization_of(folder))
    got = AWQ.load(spec_of(256, 128, K_PROJ), source, CPU).dequantize()
    cosine = torch.nn.functional.cosine_similarity(got, stored["unquantized"].float(), dim=0)
    assert cosine.median() > 0.97
    # Two columns of a word exchanged, and the likeness is gone.
    swapped = got.view(128, -1, 2).flip(2).flatten(1)
    wrong = torch.nn.functional.cosine_similarity(swapped, stored["unquantized"].float(), dim=0)
    assert wrong.median().abs() < 0.5


@pytest.mark.parametrize("name", WHOLE)
def test_logits_are_those_of_transformers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference has weights rounded to fp16, which alone moves its logits by up to 4e-3."""
    stored = load_file(FIXTURES / name / "oracle" / "oracle.safetensors")
    model = load_float32(FIXTURES / name)
    assert model.info.quantizers == (("awq", 8), ("dense", 1))
    logits = logits_of(model, stored["tokens"])
    torch.testing.assert_close(logits, stored["logits"], rtol=0.0, atol=5e-3)
    monkeypatch.setattr(GroupedLinear, "__call__", multiply_rounded)
    logits = logits_of(model, stored["tokens"])
    torch.testing.assert_close(logits, stored["logits"], rtol=0.0, atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(
    version=st.sampled_from(["gemm", "gemv", "gemv_fast"]),
    group=st.sampled_from([32, 64, 128]),
    groups=st.integers(1, 5),
    rows=st.sampled_from([8, 32, 40]),
    seed=st.integers(0, 2**31),
)
def test_packed_by_another_hand(
    version: str, group: int, groups: int, rows: int, seed: int
) -> None:
    columns = group * groups
    if version == "gemv_fast" and columns % 64:
        columns *= 2
    tensors, weight = make(version, rows, columns, group, seed)
    source, spec = source_of(tensors, version, group), spec_of(columns, rows)
    for name, shape in AWQ.tensors(spec, source).items():
        assert source.shape(name) == shape
    assert torch.equal(AWQ.load(spec, source, CPU).dequantize(), weight)


@pytest.mark.parametrize("version", ["gemm", "gemv", "gemv_fast"])
def test_more_rows_than_are_unpacked_at_once(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantd.plugins.parts._CHUNK_VALUES", 1)
    tensors, weight = make(version, 104, 128, 64)
    layer = AWQ.load(spec_of(128, 104), source_of(tensors, version, 64), CPU)
    assert torch.equal(layer.dequantize(), weight)


def test_one_group_per_row() -> None:
    tensors, weight = make("gemm", 32, 128, 128)
    layer = AWQ.load(spec_of(128, 32), source_of(tensors, "GEMM", -1), CPU)
    assert torch.equal(layer.dequantize(), weight)


def test_without_zero_points_the_middle_is_zero() -> None:
    tensors, _ = make("gemv", 32, 128, 128)
    tensors["m.qzeros"].fill_(-0x77777778)
    with_eights = AWQ.load(spec_of(128, 32), source_of(tensors, "gemv", 128), CPU).dequantize()
    del tensors["m.qzeros"]
    source = source_of(tensors, "gemv", 128, zero_point=False)
    assert set(AWQ.tensors(spec_of(128, 32), source)) == {"m.qweight", "m.scales"}
    assert torch.equal(AWQ.load(spec_of(128, 32), source, CPU).dequantize(), with_eights)


def test_modules_that_were_not_converted_are_plain() -> None:
    tensors, weight = make("gemm", 32, 128, 64)
    tensors["n.weight"] = torch.randn(32, 128).to(torch.bfloat16)
    source, spec = source_of(tensors, "gemm", 64), spec_of(128, 32, "m", "n")
    assert AWQ.claims(spec, source)
    layer = AWQ.load(spec, source, CPU)
    assert torch.equal(layer.dequantize(), torch.cat([weight, tensors["n.weight"].float()]))
    assert source.released == tensors.keys()


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"bits": 8}, "quantization_config.bits is 8, must be 4 for AWQ"),
        ({"version": "exllama"}, "version is 'exllama', must be one of gemm, gemv, gemv_fast"),
        ({"group_size": 0}, "group_size is 0, must be -1 or a positive number"),
        ({"group_size": None}, "group_size is None, must be -1 or a positive number"),
        ({"group_size": 96}, "m: in_features is 128, must be a multiple of 96 (group_size)"),
        ({"group_size": 8}, "group_size is 8, must be a multiple of 16 (awq)"),
        ({"rows": 30}, "m: out_features is 30, must be a multiple of 8 (gemm)"),
        ({"version": "gemv_fast", "columns": 96, "group_size": 32}, "must be a multiple of 64"),
    ],
)
def test_refuses_what_does_not_fit(said: dict[str, Any], message: str) -> None:
    assert message in refusal(**said)


def test_refuses_other_types() -> None:
    tensors, _ = make("gemm", 32, 128, 64)
    tensors["m.qweight"] = tensors["m.qweight"].float()
    with pytest.raises(Refused, match=r"m\.qweight is of the type F32, must be I32"):
        AWQ.load(spec_of(128, 32), source_of(tensors, "gemm", 64), CPU)


def test_claims_by_method_only() -> None:
    tensors, _ = make("gemm", 32, 128, 64)
    assert AWQ.claims(spec_of(128, 32), Source(tensors, quant_method="awq"))
    assert not AWQ.claims(spec_of(128, 32), Source(tensors))
    assert not AWQ.claims(spec_of(128, 32), Source(tensors, quant_method="gptq"))


def test_says_what_it_is() -> None:
    tensors, _ = make("gemm", 32, 128, 64)
    about = AWQ.describe(spec_of(128, 32), source_of(tensors, "gemm", 64), CPU)
    assert about.text == "4 bits, groups of 64, asymmetric, gemm"
    assert about.nbytes == 32 * (128 // 2 + 2 * 4)


def test_a_table_of_embeddings_is_refused() -> None:
    with pytest.raises(Refused, match="cannot be looked up by rows"):
        AWQ.dequantize_rows("m.qweight", Source({}), torch.zeros(1, dtype=torch.int64))

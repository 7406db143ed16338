"""GPTQ: fixtures of the tools against their own kernels, and an independent packer."""

from __future__ import annotations

import json
from pathlib import Path
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
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantd.daemon.worker.inspect import inspect
from quantd.plugins.api import Refused
from quantd.plugins.gptq.plugin import GptqQuantizer
from quantd.plugins.grouped import GroupedLinear

torch.set_num_threads(1)

FOLDERS = sorted(path.name for path in FIXTURES.glob("gptq-*"))
WHOLE = [name for name in FOLDERS if (FIXTURES / name / "model.safetensors").exists()]
GPTQ = GptqQuantizer()


def pack_stream(codes: np.ndarray, bits: int) -> np.ndarray:
    """[R, C] -> int32 [R, C * bits / 32]: a code's bits lowest first, one after another."""
    every = codes[:, :, None] >> np.arange(bits) & 1
    octets = np.packbits(every.reshape(len(codes), -1).astype(np.uint8), axis=1, bitorder="little")
    return octets.view(np.int32)


def packed(
    codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray, bits: int, name: str = "m"
) -> dict[str, Tensor]:
    """codes [N, K], stored zeros [G, N] and scales [G, N] as a checkpoint has them."""
    return {
        f"{name}.qweight": torch.from_numpy(pack_stream(codes, bits).T.copy()),
        f"{name}.qzeros": torch.from_numpy(pack_stream(zeros, bits).copy()),
        f"{name}.scales": torch.from_numpy(scales),
    }


def make(
    bits: int, rows: int, columns: int, groups: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random codes, stored zeros (none at an end, so that neither version wraps) and scales."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 1 << bits, (rows, columns))
    zeros = rng.integers(0, (1 << bits) - 1, (groups, rows))
    return codes, zeros, rng.uniform(0.01, 2, (groups, rows)).astype(np.float16)


def load(source: Source, columns: int, rows: int) -> Tensor:
    return GPTQ.load(spec_of(columns, rows), source, CPU).dequantize()


def refusal(tensors: dict[str, Tensor], columns: int = 64, rows: int = 32, **said: Any) -> str:
    source, spec = Source(tensors, quant_method="gptq", **said), spec_of(columns, rows)
    with pytest.raises(Refused) as refused:
        GPTQ.tensors(spec, source)
        GPTQ.load(spec, source, CPU)
    return str(refused.value)


@pytest.mark.parametrize("name", FOLDERS)
def test_weights_are_those_of_the_tools_kernel(name: str) -> None:
    """The tools multiply in fp16, so theirs are ours rounded to fp16, bit for bit."""
    stored = load_file(FIXTURES / name / "oracle" / "oracle.safetensors")
    source = Source(stored, **quantization_of(FIXTURES / name))
    rows, columns = stored["oracle"].shape
    spec = spec_of(columns, rows, K_PROJ)
    assert GPTQ.claims(spec, source)
    for tensor, shape in GPTQ.tensors(spec, source).items():
        assert source.shape(tensor) == shape
    assert torch.equal(GPTQ.load(spec, source, CPU).dequantize().half(), stored["oracle"])


@pytest.mark.parametrize("name", WHOLE)
def test_logits_are_those_of_transformers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference has weights rounded to fp16, which alone moves its logits by up to 4e-3."""
    stored = load_file(FIXTURES / name / "oracle" / "oracle.safetensors")
    model = load_float32(FIXTURES / name)
    assert model.info.quantizers == (("gptq", 8), ("dense", 1))
    logits = logits_of(model, stored["tokens"])
    torch.testing.assert_close(logits, stored["logits"], rtol=0.0, atol=5e-3)
    monkeypatch.setattr(GroupedLinear, "__call__", multiply_rounded)
    logits = logits_of(model, stored["tokens"])
    torch.testing.assert_close(logits, stored["logits"], rtol=0.0, atol=1e-4)


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    group=st.sampled_from([-1, 8, 16, 24, 32, 48, 64]),
    blocks=st.integers(1, 4),
    version=st.sampled_from([1, 2]),
    seed=st.integers(0, 2**31),
)
def test_any_g_idx_gives_the_formulas_weight(
    bits: int, group: int, blocks: int, version: int, seed: int
) -> None:
    """Groups of any size, also none, in any order."""
    rows, columns = 32, 32 * blocks
    groups = 1 if group == -1 else -(-columns // group)
    codes, zeros, scales = make(bits, rows, columns, groups, seed)
    g_idx = np.random.default_rng(seed).integers(0, groups, columns)
    tensors = packed(codes, zeros, scales, bits)
    tensors["m.g_idx"] = torch.from_numpy(g_idx.astype(np.int32))
    source = Source(
        tensors,
        quant_method="gptq",
        bits=bits,
        group_size=group,
        desc_act=True,
        checkpoint_format={1: "gptq", 2: "gptq_v2"}[version],
    )
    zero = zeros + 1 if version == 1 else zeros
    expected = (codes - zero[g_idx].T) * scales[g_idx].T.astype(np.float64)
    assert torch.equal(load(source, columns, rows), torch.from_numpy(expected).float())


@pytest.mark.parametrize(("group", "columns"), [(16, 64), (32, 96), (-1, 64), (24, 96), (64, 96)])
def test_groups_in_order_need_no_g_idx(group: int, columns: int) -> None:
    """The last group may be shorter."""
    size = columns if group == -1 else group
    groups = -(-columns // size)
    codes, zeros, scales = make(4, 32, columns, groups)
    source = Source(packed(codes, zeros, scales, 4), bits=4, group_size=group)
    at = np.arange(columns) // size
    expected = (codes - zeros[at].T - 1) * scales[at].T.astype(np.float64)
    assert torch.equal(load(source, columns, 32), torch.from_numpy(expected).float())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("label", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("stored", [1, 2])
def test_symmetric_zeros_say_which_version_they_are(bits: int, label: str, stored: int) -> None:
    """Whatever the label."""
    codes, zeros, scales = make(bits, 32, 64, 2)
    zeros[:] = (1 << bits - 1) - (stored == 1)
    source = Source(
        packed(codes, zeros, scales, bits),
        sym=True,
        bits=bits,
        group_size=32,
        checkpoint_format=label,
    )
    at = np.arange(64) // 32
    expected = (codes - (1 << bits - 1)) * scales[at].T.astype(np.float64)
    assert torch.equal(load(source, 64, 32), torch.from_numpy(expected).float())
    held = {1: "gptq", 2: "gptq_v2"}[stored]
    notes = GPTQ.notes(spec_of(64, 32), source)
    assert len(notes) == (label != held)
    for note in notes:
        assert f"quantization_config the zero points are those of {label}, by their" in note
        assert f"values those of {held}, as which they are read" in note


@pytest.mark.parametrize(
    ("sym", "label", "held"),
    [
        (True, "gptq", "gptq_v2"),
        (True, "gptq_v2", "gptq"),
        (True, "gptq", "gptq"),
        (True, None, "gptq"),
        (False, "gptq", "gptq_v2"),
    ],
)
def test_a_label_that_the_zero_points_contradict_is_one_note(
    sym: bool, label: str | None, held: str, tmp_path: Path
) -> None:
    """Of the whole checkpoint, where loading it and `inspect` show it."""
    folder = FIXTURES / "gptq-gptqmodel-w4-g32-asym-actorder-v2"
    tensors = load_file(folder / "model.safetensors")
    word = {"gptq": 0x77777777, "gptq_v2": 0x88888888 - (1 << 32)}[held]
    for name, tensor in tensors.items():
        if name.endswith(".qzeros"):
            tensor.fill_(word)
    save_file(tensors, tmp_path / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    said = config["quantization_config"] | {"sym": sym, "checkpoint_format": label, "format": label}
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": said}))
    contradicts = sym and (label or "gptq") != held
    expected = [
        f"gptq: by quantization_config the zero points are those of {label}, by their values "
        f"those of {held}, as which they are read (8 of 9 layers)"
    ]
    request = {"path": str(tmp_path), "dtype": "float32", "quantization": "auto", "device": "cpu"}
    for notes in (load_float32(tmp_path).info.notes, inspect(request, print)["notes"]):
        ours = [note for note in notes if note.startswith("gptq: ")]
        assert ours == (expected if contradicts else [])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_stored_zero_of_all_ones_is_zero(bits: int) -> None:
    """As AutoGPTQ's kernels have it: one is added modulo 2 ** bits, for each number alone."""
    codes, zeros, scales = make(bits, 32, 64, 2)
    zeros[0] = (1 << bits) - 1
    source = Source(packed(codes, zeros, scales, bits), bits=bits, group_size=32)
    at = np.arange(64) // 32
    zero = (zeros + 1) % (1 << bits)
    expected = (codes - zero[at].T) * scales[at].T.astype(np.float64)
    assert torch.equal(load(source, 64, 32), torch.from_numpy(expected).float())


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gptqmodels_subtraction_from_whole_words_is_undone(bits: int) -> None:
    codes, zeros, scales = make(bits, 32, 64, 2)
    zeros[:, ::3] = 0
    tensors = packed(codes, zeros, scales, bits)
    ones = sum(1 << at for at in range(0, 32, bits))
    words = tensors["m.qzeros"].numpy().view(np.uint32)
    tensors["m.qzeros"] = torch.from_numpy((words - np.uint32(ones)).view(np.int32))
    meta = {"quantizer": ["gptqmodel:2.0.0"]}
    source = Source(tensors, bits=bits, group_size=32, checkpoint_format="gptq", meta=meta)
    at = np.arange(64) // 32
    expected = (codes - zeros[at].T) * scales[at].T.astype(np.float64)
    assert torch.equal(load(source, 64, 32), torch.from_numpy(expected).float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_scales_of_other_types(dtype: torch.dtype) -> None:
    """With fp32 scales q * s and z * s are rounded before they are subtracted."""
    codes, zeros, scales = make(4, 32, 64, 2)
    tensors = packed(codes, zeros, scales, 4)
    tensors["m.scales"] = (tensors["m.scales"].float() * 1.001).to(dtype)
    at = np.arange(64) // 32
    exact = (codes - zeros[at].T - 1) * tensors["m.scales"].double().numpy()[at].T
    got = load(Source(tensors, bits=4, group_size=32), 64, 32)
    atol = 0.0 if dtype == torch.bfloat16 else 16 * 2 * 2.0**-23
    torch.testing.assert_close(got.double(), torch.from_numpy(exact), rtol=0.0, atol=atol)


def test_fused_parts_have_orders_of_their_own_and_may_be_plain() -> None:
    rng = np.random.default_rng(5)
    tensors: dict[str, Tensor] = {"v.weight": torch.randn(32, 64)}
    expected = []
    for seed, (name, bits) in enumerate((("q", 4), ("k", 8))):
        codes, zeros, scales = make(bits, 32, 64, 2, seed)
        g_idx = rng.permutation(np.arange(64) // 32)
        tensors |= packed(codes, zeros, scales, bits, name)
        tensors[f"{name}.g_idx"] = torch.from_numpy(g_idx.astype(np.int32))
        values = (codes - zeros[g_idx].T - 1) * scales[g_idx].T.astype(np.float64)
        expected.append(torch.from_numpy(values).float())
    said = {
        "dynamic": {"-:v": {}, "+:k$": {"bits": 8}},
        "modules_in_block_to_quantize": [["q", "k"]],
    }
    source = Source(tensors, quant_method="gptq", bits=4, group_size=32, **said)
    spec = spec_of(64, 32, "q", "k", "v")
    assert GPTQ.claims(spec, source)
    assert GPTQ.tensors(spec, source)["v.weight"] == (32, 64)
    layer = GPTQ.load(spec, source, CPU)
    weight = torch.cat([*expected, tensors["v.weight"]])
    torch.testing.assert_close(layer.dequantize(), weight, rtol=0.0, atol=0.0)
    x = torch.randn(3, 64)
    torch.testing.assert_close(layer(x), x @ weight.T, rtol=1e-4, atol=1e-2)
    assert source.released == source.tensors.keys()


def test_an_output_layer_may_be_packed(tmp_path: Path) -> None:
    """With settings of its own; against the same checkpoint with that layer plain."""
    folder = FIXTURES / "gptq-autogptq-w3-g64-asym"
    tensors = load_file(folder / "model.safetensors")
    rows, columns = tensors.pop("lm_head.weight").shape
    codes, zeros, scales = make(4, rows, columns, 2)
    at = np.arange(columns) // 128
    weight = torch.from_numpy((codes - zeros[at].T - 1) * scales[at].T.astype(np.float64)).float()
    config = json.loads((folder / "config.json").read_text())
    dynamic = {"+:lm_head$": {"bits": 4, "group_size": 128}}
    config["quantization_config"] |= {"lm_head": True, "dynamic": dynamic}
    models = []
    for name, stored in (
        ("packed", packed(codes, zeros, scales, 4, "lm_head")),
        ("plain", {"lm_head.weight": weight}),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        save_file(tensors | stored, tmp_path / name / "model.safetensors")
        models.append(load_float32(tmp_path / name))
    assert models[0].info.quantizers == (("gptq", 9),)
    assert torch.equal(models[0].weights.linears["lm_head"].dequantize(), weight)
    got, want = (logits_of(model, torch.arange(40, 60)) for model in models)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3 * float(want.abs().max()))


def tensors_of(bits: int = 4) -> dict[str, Tensor]:
    """64 columns and 32 rows in groups of 32."""
    return packed(*make(bits, 32, 64, 2), bits)


def test_a_bias_of_zeros_is_accepted_and_another_is_refused() -> None:
    tensors = tensors_of() | {"m.bias": torch.zeros(32, dtype=torch.float16)}
    source = Source(tensors, bits=4, group_size=32)
    assert GPTQ.tensors(spec_of(64, 32), source)["m.bias"] == (32,)
    assert GPTQ.load(spec_of(64, 32), source, CPU)(torch.zeros(1, 64)).abs().max() == 0
    tensors["m.bias"] = torch.ones(32)
    assert "m.bias is not zero" in refusal(tensors, bits=4, group_size=32)


def test_a_bias_is_added() -> None:
    bias = torch.arange(32.0)
    source = Source(tensors_of() | {"m.bias": bias}, bits=4, group_size=32)
    layer = GPTQ.load(spec_of(64, 32, bias=True), source, CPU)
    assert torch.equal(layer(torch.zeros(2, 64)), bias.expand(2, 32))


def test_a_g_idx_left_at_zeros_is_the_natural_order() -> None:
    tensors = tensors_of()
    zeros = {"m.g_idx": torch.zeros(64, dtype=torch.int32)}
    without = load(Source(tensors, bits=4, group_size=32), 64, 32)
    assert torch.equal(load(Source(tensors | zeros, bits=4, group_size=32), 64, 32), without)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"bits": 8}, "m: by quantization_config bits is 8, by the tensors' shapes 4"),
        ({"bits": 4, "group_size": 64}, "group_size 64, groups is 1, by the tensors' shapes 2"),
        ({"group_size": 0}, "group_size is 0, must be -1 or a positive number"),
        ({"group_size": "32"}, "group_size is '32', must be -1 or a positive number"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin', must be gptq or gptq_v2"),
        ({"is_marlin_format": True}, "checkpoint_format is 'marlin'"),
        ({"sym": "yes"}, "sym is 'yes', must be true or false"),
        ({"desc_act": True}, "desc_act is true, but the tensor m.g_idx is absent"),
        ({"dynamic": {"+:(": {}}}, "dynamic has '+:('"),
        ({"dynamic": {"m": 3}}, "dynamic['m'] is 3, must be an object"),
        ({"dynamic": {"+:m": {"bits": 2}}}, "bits is 2, by the tensors' shapes 4"),
    ],
)
def test_refuses_what_config_and_tensors_disagree_in(said: dict[str, Any], message: str) -> None:
    assert message in refusal(tensors_of(), **said)


def test_refuses_tensors_that_are_not_gptq() -> None:
    tensors = tensors_of()
    index = torch.full((64,), 2, dtype=torch.int32)
    assert "numbers from 2 to 2, must be in [0, 2)" in refusal(tensors | {"m.g_idx": index})
    assert "m.scales is of the type I32" in refusal(tensors | {"m.scales": index.view(2, 32)})
    wrong = tensors | {"m.qweight": torch.zeros(10, 32, dtype=torch.int32)}
    assert "which for 64 columns is 5 bits, must be one of 2, 3, 4, 8" in refusal(wrong)
    assert "out_features is 30" in refusal(tensors, rows=30)


def test_lacking_tensors_are_named() -> None:
    tensors = tensors_of()
    del tensors["m.scales"]
    assert "m.scales" in GPTQ.tensors(spec_of(64, 32), Source(tensors, bits=4))


def test_claims_by_method_or_by_tensors() -> None:
    spec, tensors = spec_of(64, 32), tensors_of()
    g_idx = {"m.g_idx": torch.zeros(64, dtype=torch.int32)}
    assert GPTQ.claims(spec, Source(tensors, quant_method="gptq"))
    assert GPTQ.claims(spec, Source(tensors | g_idx))
    assert not GPTQ.claims(spec, Source(tensors))
    assert not GPTQ.claims(spec, Source(tensors | g_idx, quant_method="awq"))
    assert not GPTQ.claims(spec, Source({"m.weight": torch.zeros(32, 64)}, quant_method="gptq"))


def test_says_what_it_is() -> None:
    about = GPTQ.describe(spec_of(64, 32), Source(tensors_of(), sym=True, group_size=32), CPU)
    assert about.text == "4 bits, groups of 32, symmetric"
    assert about.nbytes == 32 * (64 // 2 + 2 * 4)


def test_a_table_of_embeddings_is_refused() -> None:
    with pytest.raises(Refused, match="cannot be looked up by rows"):
        GPTQ.dequantize_rows("m.qweight", Source({}), torch.zeros(1, dtype=torch.int64))

"""compressed-tensors checkpoints, packed here by a writer that follows the format's description."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from numerics.formats import CPU, Tensors, check_logits, layer
from numerics.tiny import Family, make_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantd.kernels.reference.grouped import quantize_rows
from quantd.plugins.api import Refused
from quantd.plugins.compressed.plugin import CompressedTensorsQuantizer

torch.set_num_threads(1)

PER_TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


def config(weights: dict[str, Any], **fields: Any) -> dict[str, Any]:
    packed = fields.pop("format", "pack-quantized")
    group = {"targets": fields.pop("targets", ["Linear"]), "weights": {"type": "int"} | weights}
    group["input_activations"] = fields.pop("input_activations", None)
    quantization = {
        "quant_method": "compressed-tensors",
        "format": packed,
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }
    return {"quantization_config": quantization | fields}


def pack_row(codes: list[int], bits: int) -> list[int]:
    """One number of all codes, the first in the lowest bits, cut into signed words."""
    whole = sum((code + (1 << (bits - 1))) << (i * bits) for i, code in enumerate(codes))
    words = [whole >> 32 * i & 0xFFFFFFFF for i in range(-(-len(codes) * bits // 32))]
    return [word - (1 << 32) if word >> 31 else word for word in words]


def pack(codes: Tensor, bits: int) -> Tensor:
    return torch.tensor([pack_row(row, bits) for row in codes.tolist()], dtype=torch.int32)


def module(
    shape: tuple[int, int],
    weights: dict[str, Any],
    *,
    packed: bool = True,
    act_order: bool = False,
    name: str = "m",
    seed: int = 0,
) -> tuple[dict[str, Tensor], Tensor]:
    """Random tensors as a checkpoint has them, and the weight that they stand for, in fp64."""
    rows, columns = shape
    generator = torch.Generator().manual_seed(seed)
    bits, strategy = weights["num_bits"], weights["strategy"]
    group = weights["group_size"] if strategy == "group" else columns
    groups = -(-columns // group)
    low, high = -(1 << (bits - 1)), 1 << (bits - 1)
    codes = torch.randint(low, high, shape, generator=generator)
    one = strategy == "tensor"
    per = (1,) if one else (rows, groups)
    scale = (torch.rand(per, generator=generator) + 0.5).div(2**bits).bfloat16()
    zeros = torch.zeros(per, dtype=torch.int64)
    if not weights["symmetric"]:
        zeros = torch.randint(low, high, per, generator=generator)
    index = torch.arange(columns) // group
    if act_order:
        index = index[torch.randperm(columns, generator=generator)]
    spread = index if not one else torch.zeros_like(index)
    wide_scale, wide_zeros = (t.expand(rows, groups)[:, spread].double() for t in (scale, zeros))
    weight = (codes.double() - wide_zeros) * wide_scale
    tensors = {f"{name}.weight_scale": scale}
    if packed:
        tensors[f"{name}.weight_packed"] = pack(codes, bits)
        tensors[f"{name}.weight_shape"] = torch.tensor(shape)
    else:
        tensors[f"{name}.weight"] = codes.to(torch.int8)
    if not weights["symmetric"]:
        plain = zeros.to(torch.int8)
        tensors[f"{name}.weight_zero_point"] = (
            pack(zeros.t(), bits).t().contiguous() if packed and not one else plain
        )
    if act_order:
        tensors[f"{name}.weight_g_idx"] = index.int()
    return tensors, weight


def check(tensors: dict[str, Tensor], weight: Tensor, said: dict[str, Any]) -> Any:
    rows, columns = weight.shape
    spec, source = layer(rows, columns, exact=True), Tensors(tensors, said)
    quantizer = CompressedTensorsQuantizer()
    assert quantizer.claims(spec, source)
    shapes = quantizer.tensors(spec, source)
    assert shapes == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    loaded = quantizer.load(spec, source, CPU)
    assert not source.held
    torch.testing.assert_close(loaded.dequantize().double(), weight, rtol=1e-6, atol=1e-6)
    return loaded


def args(bits: int, strategy: str, symmetric: bool = True, **more: Any) -> dict[str, Any]:
    group = 32 if strategy == "group" else None
    given = {"num_bits": bits, "strategy": strategy, "symmetric": symmetric, "group_size": group}
    return given | more


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("strategy", ["channel", "group"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_packed_weights(bits: int, strategy: str, symmetric: bool) -> None:
    weights = args(bits, strategy, symmetric)
    for shape in ((24, 96), (19, 80), (700, 64)):
        check(*module(shape, weights), config(weights))


@pytest.mark.parametrize("symmetric", [True, False])
def test_act_order(symmetric: bool) -> None:
    weights = args(4, "group", symmetric, actorder="group")
    loaded = check(*module((24, 128), weights, act_order=True), config(weights))
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(1))
    expected = x.double() @ loaded.dequantize().double().t()
    torch.testing.assert_close(loaded(x).double(), expected, rtol=1e-5, atol=1e-4)


def test_static_act_order_has_no_index() -> None:
    weights = args(4, "group", actorder="static")
    check(*module((24, 128), weights), config(weights))


@pytest.mark.parametrize("strategy", ["tensor", "channel", "group"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_eight_bits_as_they_are(strategy: str, symmetric: bool) -> None:
    weights = args(8, strategy, symmetric)
    said = config(weights, format="int-quantized")
    check(*module((24, 96), weights, packed=False), said)


def test_w8a8_rounds_each_token() -> None:
    weights = args(8, "channel")
    said = config(weights, format="int-quantized", input_activations=PER_TOKEN)
    loaded = check(*module((24, 96), weights, packed=False), said)
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(1))
    codes, scale = quantize_rows(x, None)
    expected = (codes.double() * scale) @ loaded.dequantize().double().t()
    torch.testing.assert_close(loaded(x).double(), expected, rtol=1e-3, atol=1e-2)


def test_a_fused_layer_with_a_part_that_is_plain() -> None:
    weights = args(4, "group")
    tensors, weight = module((16, 64), weights, name="m0")
    plain = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    source = Tensors(tensors | {"m1.weight": plain}, config(weights))
    quantizer, spec = CompressedTensorsQuantizer(), layer((16, 8), 64, exact=True)
    assert quantizer.claims(spec, source)
    loaded = quantizer.load(spec, source, CPU)
    expected = torch.cat((weight.float(), plain))
    torch.testing.assert_close(loaded.dequantize(), expected, rtol=1e-6, atol=1e-6)


def test_the_narrowest_target_wins() -> None:
    weights = args(4, "channel")
    said = config(args(8, "channel"))
    groups = said["quantization_config"]["config_groups"]
    groups["group_1"] = {"targets": ["re:.*nothing", "re:m$"], "weights": weights}
    check(*module((16, 32), weights), said)
    groups["group_2"] = {"targets": ["m"], "weights": args(2, "channel")}
    check(*module((16, 32), args(2, "channel")), said)


W8 = args(8, "channel")
FLOAT8 = args(8, "channel", type="float")


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (config(W8, format="marlin-24"), "format is 'marlin-24', must be one of"),
        (config(W8, format="float-quantized"), "format is 'float-quantized'"),
        (config(FLOAT8), "weights.type is 'float', must be 'int'"),
        (config(args(3, "channel")), "num_bits is 3, must be one of"),
        (config(args(8, "block")), "strategy is 'block', must be tensor"),
        (config(args(8, "group", group_size=24)), "group_size is 24, must be a multiple of 16"),
        (config(W8, input_activations=PER_TOKEN | {"dynamic": False}), "dynamic is False: static"),
        (config(W8, input_activations=PER_TOKEN | {"num_bits": 4}), "num_bits is 4, must be 8"),
        (config(W8, kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme is set"),
        (config(W8, sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config is set"),
        (config(W8, transform_config={"config_groups": {}}), "transform_config is set"),
        (config(W8, targets=["re:x"]), "config_groups matches m"),
        (config(W8, targets=["re:("]), "is no pattern"),
        (config(W8, ignore=["re:m"]), "ignores m, but its tensors are quantized"),
    ],
)
def test_what_is_not_supported_is_refused_by_its_name(said: dict[str, Any], why: str) -> None:
    source = Tensors(module((16, 32), W8)[0], said)
    quantizer, spec = CompressedTensorsQuantizer(), layer(16, 32)
    assert quantizer.claims(spec, source)
    with pytest.raises(Refused) as refused:
        quantizer.tensors(spec, source)
    assert why in str(refused.value)


def test_tensors_that_contradict_are_refused() -> None:
    quantizer, spec = CompressedTensorsQuantizer(), layer(16, 64)
    tensors, _ = module((16, 64), W8)
    wrong = tensors | {"m.weight_shape": torch.tensor([16, 63])}
    with pytest.raises(Refused, match=r"m\.weight_shape holds \[16, 63\], not \[16, 64\]"):
        quantizer.load(spec, Tensors(wrong, config(W8)), CPU)
    weights = args(4, "group", actorder="group")
    tensors, _ = module((16, 64), weights, act_order=True)
    wrong = tensors | {"m.weight_g_idx": torch.zeros(64, dtype=torch.int32)}
    with pytest.raises(Refused, match=r"m\.weight_g_idx does not give 32 columns to each group"):
        quantizer.load(spec, Tensors(wrong, config(weights)), CPU)
    wrong = tensors | {"m.weight_packed": tensors["m.weight_packed"].long()}
    with pytest.raises(Refused, match=r"m\.weight_packed is of the type I64, must be I32"):
        quantizer.tensors(spec, Tensors(wrong, config(weights)))


def test_plain_layers_and_other_methods_are_not_claimed() -> None:
    plain = {"m.weight": torch.zeros(16, 32)}
    quantizer = CompressedTensorsQuantizer()
    assert not quantizer.claims(layer(16, 32), Tensors(plain, config(W8)))
    other = {"quantization_config": {"quant_method": "gptq"}}
    assert not quantizer.claims(layer(16, 32), Tensors(module((16, 32), W8)[0], other))


def test_logits_are_those_of_transformers_on_the_dequantized_weights(tmp_path: Path) -> None:
    model = make_model(Family("llama"), tmp_path)
    weights = args(4, "group", False, actorder="group")
    path = tmp_path / "model.safetensors"
    stored, dequantized = load_file(path), {}
    for seed, name in enumerate(sorted(n for n in stored if n.endswith("_proj.weight"))):
        at = name.removesuffix(".weight")
        shape = tuple(stored.pop(name).shape)
        tensors, weight = module(shape, weights, act_order=True, name=at, seed=seed)
        # A plain size for random weights, exact because it is a power of two.
        tensors[f"{at}.weight_scale"] /= 4
        dequantized[at] = weight.float() / 4
        stored |= tensors
    save_file(stored, path)
    said = json.loads((tmp_path / "config.json").read_text()) | config(weights)
    (tmp_path / "config.json").write_text(json.dumps(said))
    driver = check_logits(model, tmp_path, lambda name, plain: dequantized.get(name, plain))
    assert dict(driver.runner.info.quantizers) == {"compressed_tensors": 12, "dense": 1}

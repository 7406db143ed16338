"""int8, w8a8 and int4, made from plain weights while they load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from numerics.formats import CPU, Tensors, check_logits, layer
from numerics.tiny import Driver, Family, make_model
from torch import Tensor

from quantd.kernels.reference.grouped import quantize_rows
from quantd.plugins.api import Describes, Refused
from quantd.plugins.rtn.plugin import Int4Quantizer, Int8Quantizer, W8A8Quantizer

torch.set_num_threads(1)

FORMATS = {"int8": Int8Quantizer, "w8a8": W8A8Quantizer, "int4": Int4Quantizer}
CEILING = {"int8": 0.008, "w8a8": 0.008, "int4": 0.08}
"""Of the weights' error, relative and root mean square, on normal weights."""


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def load(name: str, weight: Tensor, **fields: Any) -> Any:
    source = Tensors({"m.weight": weight})
    loaded = FORMATS[name]().load(layer(*weight.shape, **{"exact": True} | fields), source, CPU)
    assert not source.held
    return loaded


def relative(error: Tensor, of: Tensor) -> float:
    return float(error.norm() / of.norm())


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", [(48, 256), (33, 40), (1, 8), (700, 512)])
def test_weights_stay_within_the_ceiling(name: str, shape: tuple[int, int]) -> None:
    weight = normal(*shape)
    assert relative(load(name, weight).dequantize() - weight, weight) < CEILING[name]


@pytest.mark.parametrize("name", ["int8", "w8a8"])
def test_eight_bits_are_within_half_a_step_of_each_row(name: str) -> None:
    weight = normal(32, 96) * torch.logspace(-4, 4, 32)[:, None]
    step = weight.abs().amax(dim=1, keepdim=True) / 127
    error = (load(name, weight).dequantize() - weight).abs()
    assert (error <= step * 0.5001).all()


def test_four_bits_choose_a_clip_that_beats_the_whole_range() -> None:
    weight = normal(64, 256)
    groups = weight.view(64, -1, 32)
    low = groups.amin(dim=2, keepdim=True)
    step = (groups.amax(dim=2, keepdim=True) - low) / 15
    plain = (((groups - low) / step).round() * step + low).view(64, -1)
    ours = load("int4", weight).dequantize()
    assert (ours - weight).square().sum() < 0.96 * (plain - weight).square().sum()
    per_group = (ours - weight).view(64, -1, 32).square().sum(dim=2)
    assert (per_group <= (plain - weight).view(64, -1, 32).square().sum(dim=2) * 1.001).all()


def test_four_bits_keep_what_they_can_hold() -> None:
    """Sixteen even values, constants and zeros come back as they were."""
    even = torch.arange(16.0).repeat(2) * 0.25 - 1.5
    weight = torch.stack((even, torch.full((32,), 0.75), torch.zeros(32)))
    torch.testing.assert_close(load("int4", weight).dequantize(), weight, rtol=0.0, atol=1e-6)


def test_the_range_of_a_short_last_group_is_its_own() -> None:
    weight = torch.cat((normal(4, 32), 100 + normal(4, 8)), dim=1)
    error = load("int4", weight).dequantize() - weight
    assert error.abs().max() < 0.3


@pytest.mark.parametrize("name", FORMATS)
def test_rows_of_zeros_stay_zeros(name: str) -> None:
    weight = normal(16, 32)
    weight[3] = 0
    assert (load(name, weight).dequantize()[3] == 0).all()


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_exact_layers_multiply_by_what_they_dequantize_to(name: str) -> None:
    loaded, x = load(name, normal(40, 96)), normal(5, 96, seed=1)
    expected = x.double() @ loaded.dequantize().double().t()
    torch.testing.assert_close(loaded(x).double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("exact", [True, False])
def test_w8a8_rounds_each_token_even_where_all_else_is_exact(exact: bool) -> None:
    loaded, x = load("w8a8", normal(40, 96), exact=exact), normal(5, 96, seed=1)
    codes, scale = quantize_rows(x, None)
    expected = (codes.double() * scale) @ loaded.dequantize().double().t()
    torch.testing.assert_close(loaded(x).double(), expected, rtol=1e-3, atol=1e-2)
    plain = x.double() @ loaded.dequantize().double().t()
    assert 1e-3 < relative(loaded(x).double() - plain, plain) < 0.012


@pytest.mark.parametrize("name", FORMATS)
def test_the_fast_default_costs_less_than_the_rounding(name: str) -> None:
    weight, x = normal(64, 256), normal(9, 256, seed=1)
    plain = x @ weight.t()
    assert relative(load(name, weight, exact=False)(x) - plain, plain) < CEILING[name] * 1.6


@pytest.mark.parametrize("name", FORMATS)
def test_parts_and_biases_of_a_fused_layer(name: str) -> None:
    weights, biases = [normal(n, 64, seed=n) for n in (20, 8, 4)], [normal(n) for n in (20, 8, 4)]
    tensors = {f"m{i}.weight": weight for i, weight in enumerate(weights)}
    tensors |= {f"m{i}.bias": bias for i, bias in enumerate(biases)}
    spec, source = layer((20, 8, 4), 64, bias=True, exact=True), Tensors(tensors)
    quantizer = FORMATS[name]()
    assert set(quantizer.tensors(spec, source)) == set(tensors)
    fused = quantizer.load(spec, source, CPU)
    apart = torch.cat([load(name, weight).dequantize() for weight in weights])
    assert torch.equal(fused.dequantize(), apart)
    got = fused(torch.zeros(2, 64))
    torch.testing.assert_close(got, torch.cat(biases).expand(2, -1))
    assert not source.held


@pytest.mark.parametrize("name", FORMATS)
def test_bad_weights_are_refused_by_their_name(name: str) -> None:
    weight = normal(20, 32)
    weight[17, 5] = float("nan")
    with pytest.raises(Refused, match=r"m\.weight: rows 0 to 19 hold a NaN or an infinity"):
        load(name, weight)
    source = Tensors({"m.weight": torch.zeros(20, 32, dtype=torch.int8)})
    with pytest.raises(Refused, match=r"tensor m\.weight is of the type I8"):
        FORMATS[name]().tensors(layer(20, 32), source)


@pytest.mark.parametrize("name", FORMATS)
def test_they_claim_nothing_and_describe_themselves(name: str) -> None:
    quantizer, source = FORMATS[name](), Tensors({"m.weight": normal(32, 64)})
    assert not quantizer.claims(layer(32, 64), source)
    assert "float" not in (quantizer.refuses(layer(32, 64), CPU) or "")
    assert isinstance(quantizer, Describes)
    about = quantizer.describe(layer(32, 64), source, CPU)
    assert about.nbytes == {"int4": 32 * (32 + 2 * 2 * 2)}.get(name, 32 * (64 + 2))


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_logits_are_those_of_transformers_on_the_rounded_weights(name: str, tmp_path: Path) -> None:
    model = make_model(Family("llama"), tmp_path)

    def quantize(module: str, weight: Tensor) -> Tensor:
        return load(name, weight).dequantize()

    driver = check_logits(model, tmp_path, quantize, quantization=name)
    assert driver.runner.info.quantizers == ((name, 13),)


def test_routers_of_experts_stay_plain(tmp_path: Path) -> None:
    make_model(Family("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}), tmp_path)
    counts = dict(Driver(tmp_path, quantization="int8").runner.info.quantizers)
    assert counts["dense"] == 3

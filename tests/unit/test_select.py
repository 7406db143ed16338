"""Which quantizer takes a layer, and what is said when none does."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from importlib.metadata import EntryPoint
from typing import Any

import pytest
import torch

from quantd.plugins.api import LinearSpec, QuantLinear, Refused, TensorSource, api_version
from quantd.plugins.select import (
    GROUP,
    Choice,
    Registry,
    Rule,
    check_rules,
    notes,
    parse_rules,
    select,
)

CPU = torch.device("cpu")
SPEC = LinearSpec(
    "model.layers.0.self_attn.qkv_proj",
    8,
    (8, 4, 4),
    ("layers.0.q_proj", "layers.0.k_proj", "layers.0.v_proj"),
    torch.float32,
)


class Headers:
    """A TensorSource that has names and types only."""

    def __init__(self, leaf: str, dtype: str = "F32", config: Mapping[str, Any] | None = None):
        self.config: Mapping[str, Any] = config or {}
        self._dtypes = {f"{part}.{leaf}": dtype for part in SPEC.parts}

    def names(self) -> Collection[str]:
        return self._dtypes.keys()

    def dtype(self, name: str) -> str:
        return self._dtypes[name]

    def shape(self, name: str) -> tuple[int, ...]:
        raise NotImplementedError

    def read(self, name: str) -> torch.Tensor:
        raise NotImplementedError

    def release(self, name: str) -> None:
        raise NotImplementedError


class Packed:
    """Claims layers with a qweight and is made from plain ones; takes multiples of its group."""

    name = "packed"
    from_plain = True
    api_version = api_version
    made = 0

    def __init__(self) -> None:
        Packed.made += 1

    def claims(self, spec: LinearSpec, source: TensorSource) -> bool:
        return f"{spec.parts[0]}.qweight" in source.names()

    def refuses(self, spec: LinearSpec, device: torch.device) -> str | None:
        if spec.in_features % 8:
            return f"in_features is {spec.in_features}, must be a multiple of 8"
        return None

    def tensors(self, spec: LinearSpec, source: TensorSource) -> Mapping[str, tuple[int, ...]]:
        return {}

    def load(self, spec: LinearSpec, source: TensorSource, device: torch.device) -> QuantLinear:
        raise NotImplementedError


class Stored:
    """Claims layers with a qweight, and cannot be made from plain ones."""

    name = "stored"
    api_version = api_version

    def claims(self, spec: LinearSpec, source: TensorSource) -> bool:
        return f"{spec.parts[0]}.qweight" in source.names()

    def refuses(self, spec: LinearSpec, device: torch.device) -> str | None:
        return None


class Talks(Packed):
    name = "talks"

    def notes(self, spec: LinearSpec, source: TensorSource) -> Collection[str]:
        return ("the label is wrong", f"{spec.in_features} columns")


class OldVersion(Packed):
    name = "old"
    api_version = api_version - 1


def broken() -> None:
    raise RuntimeError("its library is missing")


def registry(**others: str) -> Registry:
    dense = {"dense": "quantd.plugins.dense.plugin:DenseQuantizer"}
    points = [EntryPoint(name, value, GROUP) for name, value in (dense | others).items()]
    return Registry(points)


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Entry points name modules, and this one has no name that can be imported."""
    import sys
    import types

    module = types.ModuleType("formats_of_a_test")
    for item in (Packed, Stored, Talks, OldVersion, broken):
        setattr(module, item.__name__, item)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    Packed.made = 0


def test_installed_formats_are_found() -> None:
    assert "dense" in Registry().names


def test_plain_weights_are_dense_and_import_nothing_else() -> None:
    formats = registry(packed="formats_of_a_test:Packed")
    choice = select(SPEC, Headers("weight", "BF16"), CPU, formats)
    assert choice.quantizer.name == "dense"
    assert Packed.made == 0


def test_the_checkpoints_tensors_decide() -> None:
    formats = registry(packed="formats_of_a_test:Packed")
    choice = select(SPEC, Headers("qweight", "I32"), CPU, formats)
    assert choice.quantizer.name == "packed"
    assert choice.refusals == (("dense", "the layer's tensors are not of this format"),)
    assert Packed.made == 1


def test_integers_under_the_name_of_weights_are_not_dense() -> None:
    with pytest.raises(Refused, match="no quantizer takes the layer"):
        select(SPEC, Headers("weight", "I8"), CPU, registry())


def test_a_rule_comes_first() -> None:
    formats = registry(packed="formats_of_a_test:Packed")
    rules = (Rule("*.o_proj", "dense"), Rule("model.layers.?.*", "packed"), Rule("*", "dense"))
    choice = select(SPEC, Headers("weight"), CPU, formats, rules)
    assert choice.quantizer.name == "packed"
    assert choice.reason == "the rule model.layers.?.*=packed"


def test_a_rule_that_cannot_hold_is_refused() -> None:
    formats = registry(packed="formats_of_a_test:Packed")
    spec = LinearSpec("lm_head", 12, (4,), SPEC.parts[:1], torch.float32)
    with pytest.raises(Refused, match=r"lm_head: in_features is 12, must be a multiple of 8"):
        select(spec, Headers("weight"), CPU, formats, (Rule("lm_head", "packed"),))
    with pytest.raises(Refused, match=r"no quantizer 'gptq' is installed \(installed: dense, pack"):
        select(spec, Headers("weight"), CPU, formats, (Rule("*", "gptq"),))


def test_every_other_quantizer_has_a_reason_and_is_not_imported_for_it() -> None:
    formats = registry(packed="formats_of_a_test:Packed", broken="formats_of_a_test:broken")
    plain = select(SPEC, Headers("weight"), CPU, formats)
    why = "not asked, the layer's tensors are dense"
    assert plain.refusals == (("broken", why), ("packed", why))
    ruled = select(SPEC, Headers("weight"), CPU, formats, (Rule("*", "dense"),))
    why = "not asked, the rule *=dense comes first"
    assert ruled.refusals == (("broken", why), ("packed", why))
    assert (Packed.made, formats.warnings) == (0, ())


def test_a_rule_cannot_turn_one_format_into_another() -> None:
    formats = registry(packed="formats_of_a_test:Packed")
    with pytest.raises(Refused) as refused:
        select(SPEC, Headers("qweight", "I32"), CPU, formats, (Rule("*", "dense"),))
    assert str(refused.value) == (
        "quantization: the rule *=dense cannot hold for the layer "
        f"{SPEC.name}: it is already packed"
    )
    kept = select(SPEC, Headers("qweight", "I32"), CPU, formats, (Rule("*", "packed"),))
    assert (kept.quantizer.name, kept.stored) == ("packed", "packed")
    with pytest.raises(Refused, match="no installed format knows .* of the types I8"):
        select(SPEC, Headers("weight", "I8"), CPU, formats, (Rule("*", "dense"),))


def test_auto_in_a_rule_asks_the_tensors() -> None:
    formats = registry(packed="formats_of_a_test:Packed")
    rules = (Rule("*.qkv_proj", "auto"), Rule("*", "packed"))
    choice = select(SPEC, Headers("weight"), CPU, formats, rules)
    assert (choice.quantizer.name, choice.reason) == ("dense", "the checkpoint's tensors")


def test_a_bare_name_leaves_routers_as_they_are() -> None:
    formats = registry(packed="formats_of_a_test:Packed")
    router = LinearSpec("model.layers.0.mlp.gate", 8, (8, 4, 4), SPEC.parts, torch.float32)
    source = Headers("weight")
    assert select(router, source, CPU, formats, parse_rules("packed")).quantizer.name == "dense"
    assert select(SPEC, source, CPU, formats, parse_rules("packed")).quantizer.name == "packed"
    assert select(router, source, CPU, formats, parse_rules("*=packed")).quantizer.name == "packed"


def test_plain_tensors_under_a_quantized_config_are_a_note() -> None:
    formats = registry(packed="formats_of_a_test:Packed")
    config = {"quantization_config": {"quant_method": "gptq"}}
    plain = select(SPEC, Headers("weight", config=config), CPU, formats)
    ruled = select(SPEC, Headers("weight"), CPU, formats, (Rule("*", "packed"),))
    source = Headers("weight", config=config)
    assert notes(source, [SPEC, SPEC], [plain, ruled]) == (
        "config.json says quant_method 'gptq' but the tensors of all 2 layers are plain",
    )
    packed: Choice = select(SPEC, Headers("qweight", "I32"), CPU, formats)
    assert notes(source, [SPEC, SPEC], [plain, packed]) == ()
    assert notes(Headers("weight"), [SPEC], [plain]) == ()


def test_what_formats_note_of_their_layers_is_counted() -> None:
    formats = registry(talks="formats_of_a_test:Talks", packed="formats_of_a_test:Packed")
    source = Headers("qweight", "I32")
    talks = select(SPEC, source, CPU, formats, (Rule("*", "talks"),))
    silent = select(SPEC, source, CPU, formats)
    assert silent.quantizer.name == "packed"
    assert notes(source, [SPEC] * 3, [talks, silent, talks]) == (
        "talks: the label is wrong (2 of 3 layers)",
        f"talks: {SPEC.in_features} columns (2 of 3 layers)",
    )


def test_a_broken_format_is_a_warning_that_names_it() -> None:
    formats = registry(broken="formats_of_a_test:broken", absent="no_such_module:X")
    choice = select(SPEC, Headers("weight"), CPU, formats)
    assert choice.quantizer.name == "dense"
    assert formats.warnings == (), "nobody asked it yet"
    with pytest.raises(Refused) as refusal:
        config = {"quantization_config": {"quant_method": "awq"}}
        select(SPEC, Headers("qweight", "I32", config), CPU, formats)
    said = str(refusal.value)
    assert "quant_method 'awq' by config.json" in said
    assert "quantizer 'broken' (formats_of_a_test:broken) could not be loaded" in said
    assert "RuntimeError: its library is missing" in said
    assert "ModuleNotFoundError" in said
    assert len(formats.warnings) == 2


def test_another_version_of_the_api_is_broken() -> None:
    formats = registry(old="formats_of_a_test:OldVersion", other="formats_of_a_test:Packed")
    assert formats.get("old") is None
    assert "api_version 0, this is 1" in formats.why_not("old")
    assert formats.get("other") is None
    assert "calls itself 'packed'" in formats.why_not("other")


def test_rules_as_text() -> None:
    assert parse_rules("auto") == ()
    routers_are_spared = Rule("*.mlp.gate", "auto")
    assert parse_rules("dense") == (routers_are_spared, Rule("*", "dense"))
    assert parse_rules("lm_head=dense, *.mlp.*=int8") == (
        Rule("lm_head", "dense"),
        Rule("*.mlp.*", "int8"),
    )
    for text in ("=dense", "a=", "a=b,"):
        with pytest.raises(Refused, match="neither a name nor glob=name"):
            parse_rules(text)


STORED = Rule("*", "stored")


def test_a_rule_leaves_plain_what_its_format_cannot_be_made_from() -> None:
    """As the output layer of a quantized checkpoint, under the rule that names its format."""
    formats = registry(stored="formats_of_a_test:Stored")
    plain = select(SPEC, Headers("weight"), CPU, formats, (STORED,))
    assert (plain.quantizer.name, plain.stored) == ("dense", "dense")
    assert plain.reason == "the rule *=stored, but the layer's tensors are plain"
    packed = select(SPEC, Headers("qweight", "I32"), CPU, formats, (STORED,))
    assert packed.quantizer.name == "stored"
    check_rules((STORED,), [SPEC, SPEC], [plain, packed])
    with pytest.raises(Refused) as refused:
        check_rules((STORED,), [SPEC, SPEC], [plain, plain])
    assert str(refused.value) == (
        "quantization: no layer that the rule *=stored is for has tensors of stored, which cannot "
        "be made from plain ones"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("packed", None),
        ("lm_head=auto,*.layers.*=packed", None),
        ("*_head=dense,packed", None),
        ("lm_heed=packed", "lm_heed=packed matches no layer; the layers are lm_head, model.layers"),
        ("*.q_proj=packed", "matches no layer; .* lm_head, model.layers.N.self_attn.qkv_proj"),
        ("lm_heed=auto,packed", "the rule lm_heed=auto matches no layer"),
        ("packed,lm_head=dense", "the rule lm_head=dense is for no layer: rules before it match"),
    ],
)
def test_a_rule_without_effect_is_refused(text: str, message: str | None) -> None:
    formats = registry(packed="formats_of_a_test:Packed")
    source, rules = Headers("weight"), parse_rules(text)
    other = replace(SPEC, name="model.layers.11.self_attn.qkv_proj")
    specs = [SPEC, other, replace(SPEC, name="lm_head")]
    choices = [select(spec, source, CPU, formats, rules) for spec in specs]
    if message is None:
        check_rules(rules, specs, choices)
        return
    with pytest.raises(Refused, match=f"quantization: .*{message}"):
        check_rules(rules, specs, choices)

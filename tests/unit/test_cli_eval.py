"""How `quantd eval` and `quantd inspect` show what their tools found."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

import pytest

from quantd.daemon.cli import child
from quantd.daemon.cli import eval as command
from quantd.daemon.cli.inspect import show as show_report
from quantd.daemon.cli.plot import draw

TEXT = "{http://www.w3.org/2000/svg}text"
LINE = "{http://www.w3.org/2000/svg}polyline"
SIDE = {
    "path": "/models/<a & b>",
    "dtype": "float32",
    "quantizers": [["int4", 32], ["dense", 1]],
    "weight_bytes": 3 << 20,
}


def mean(value: float, half: float | None = None) -> dict[str, float | None]:
    if half is None:
        return {"value": value, "low": None, "high": None}
    return {"value": value, "low": value - half, "high": value + half}


def result(**changed: Any) -> dict[str, Any]:
    """One window, no layers."""
    kl = mean(0.25) | {"median": 0.125, "p90": 0.5, "p99": 1.0, "max": 2.0}
    base = {
        "text": "t.txt",
        "notes": [],
        "a": SIDE,
        "b": SIDE,
        "windows": 1,
        "context": 1024,
        "tokens": 1023,
        "tokens_left_out": 0,
        "perplexity_a": mean(8.0),
        "perplexity_b": mean(9.0),
        "perplexity_ratio": mean(1.125),
        "kl": kl,
        "kl_quantiles": [0.0, 0.125, 2.0],
        "same_first": mean(0.9),
        "shared_five": mean(0.75),
    }
    return base | changed


def test_one_window_has_no_intervals() -> None:
    lines = list(command.show(result()))
    assert "perplexity of A     8.0000" in lines
    assert "same first choice   90.00 %" in lines
    assert "KL(A||B), nats      mean 2.500e-01" in lines
    assert "text                t.txt: 1 window of 1,024 tokens, 1,023 predicted" in lines
    assert not any("[" in line or "left out" in line for line in lines)


def test_more_windows_have_them() -> None:
    changed = {"windows": 4, "tokens_left_out": 7, "same_first": mean(0.5, 0.125)}
    text = "\n".join(command.show(result(**changed)))
    assert "same first choice   50.00 [37.50, 62.50] %" in text
    assert "; 7 tokens at its end left out" in text
    assert "95 % intervals" in text


def test_an_expert_that_no_token_met_has_no_output_error() -> None:
    layers = [{"name": "model.layers.0.mlp.experts.3.down_proj", "weight": 0.5, "output": None}]
    hidden = [{"name": "model.norm", "error": 0.25}]
    lines = "\n".join(command.show(result(layers=layers, hidden=hidden))).splitlines()
    assert "model.layers.0.mlp.experts.3.down_proj  5.00e-01      -" in lines
    assert "model.norm            2.50e-01" in lines
    tree = ElementTree.fromstring(draw(result(layers=layers, hidden=hidden)))
    assert [len(line.attrib["points"].split()) for line in tree.iter(LINE)] == [3, 2, 0, 1, 1]


def test_a_drawing_has_its_names_numbers_and_units() -> None:
    tree = ElementTree.fromstring(draw(result()))
    texts = [node.text for node in tree.iter(TEXT)]
    assert "A: <a & b>, int4, dense, float32" in texts
    assert "KL, nats" in texts and "mean 2.50e-01" in texts
    assert {"0", "50", "100", "1e-8", "1e0", "1e1"} <= {*texts}


def test_a_drawing_of_nothing_but_zeros_is_drawn() -> None:
    tree = ElementTree.fromstring(draw(result(kl=mean(0.0), kl_quantiles=[0.0, 0.0])))
    curve, _ = tree.iter(LINE)
    ys = {point.split(",")[1] for point in curve.attrib["points"].split()}
    assert ys == {"340.0"}, "the bottom of the panel"


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([1, 2, 3], [1, 5, 3], "from token 1 on (2 by A, 5 by B)"),
        ([1, 2, 3], [1, 2], "from token 2 on (A has 3 tokens, B 2)"),
    ],
)
def test_the_first_difference_of_tokens_is_named(a: list[int], b: list[int], expected: str) -> None:
    assert command._difference(a, b).endswith(expected)


def test_a_tool_that_breaks_is_an_error_after_its_own_words(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(child.ToolError, match=r"^absent failed \(status 1\)"):
        child.run("absent", {}, lambda progress: None)
    assert "No module named quantd.daemon.worker.absent" in capfd.readouterr().err


LAYER: dict[str, Any] = {
    "name": "model.layers.0.mlp.down_proj",
    "shape": [64, 32],
    "quantizer": "gptq",
    "format": "4 bits, groups of 32",
    "route": None,
    "stored_bytes": 1024,
    "weights": 2048,
    "loaded_bytes": 1024,
    "described": False,
    "reason": "the checkpoint's tensors",
    "others": [[name, "the layer's tensors are not of this format"] for name in ("dense", "awq")],
}
REPORT: dict[str, Any] = {
    "path": "/m",
    "refused": None,
    "notes": ["a fast route is missing"],
    "tokenizer": {"problem": "/m has no tokenizer.json"},
}


def test_layers_that_are_alike_are_one_row() -> None:
    taken = [LAYER | {"name": f"model.layers.{i}.mlp.down_proj"} for i in range(3)]
    nobody = [
        LAYER | {"quantizer": None, "reason": f"nobody takes {i}", "stored_bytes": 0}
        for i in range(2)
    ]
    text = "\n".join(show_report(REPORT | {"layers": taken + nobody}, False))
    rows = [[cell.strip() for cell in line.split("  ") if cell] for line in text.splitlines()]
    assert ["3", "gptq", "4 bits, groups of 32", "3.0 KiB (4.00 bits each)",
            "about 3.0 KiB (4.00 bits each)", "not said",
            "the checkpoint's tensors"] in rows  # fmt: skip
    assert ["2", "none", "-", "-", "-", "-", "see below"] in rows
    assert ["5", "dense, awq", "the layer's tensors are not of this format"] in rows


def test_a_report_of_almost_nothing() -> None:
    lines = list(show_report(REPORT | {"refused": "/m has no config.json"}, True))
    assert lines == [
        "path          /m",
        "tokenizer     none: /m has no tokenizer.json",
        "",
        "note: a fast route is missing",
    ]

"""An evaluation as a drawing: SVG, made of lines and text only."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any
from xml.sax.saxutils import escape

_WIDTH, _HEIGHT = 720, 400
"""Of one panel."""
_LEFT, _RIGHT, _TOP, _BOTTOM = 90, 30, 80, 60
_COLORS = ("#1f5fa8", "#c0561f")
_FLOOR = 1e-8
"""On the logarithmic axes, what is less is drawn here."""


@dataclass(frozen=True, slots=True)
class Panel:
    """Curves over one logarithmic y axis."""

    title: str
    x_label: str
    y_label: str
    x_range: tuple[float, float]
    x_ticks: Sequence[float]
    curves: Sequence[tuple[str, Sequence[tuple[float, float]]]]
    """(legend, points (x, y))"""
    subtitles: tuple[str, ...] = ()
    """At most two."""


def draw(result: dict[str, Any]) -> str:
    """The quantiles of KL, and with `layers` the errors from layer to layer."""
    panels = [_quantiles(result)]
    if "layers" in result:
        panels += [_linears(result["layers"]), _hidden(result["hidden"])]
    height = _HEIGHT * len(panels)
    body = "\n".join(
        f'<g transform="translate(0 {i * _HEIGHT})">\n' + "\n".join(_panel(panel)) + "\n</g>"
        for i, panel in enumerate(panels)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" '
        f'viewBox="0 0 {_WIDTH} {height}" font-family="sans-serif" font-size="13">\n'
        f'<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
    )


def _quantiles(result: dict[str, Any]) -> Panel:
    values = result["kl_quantiles"]
    last = len(values) - 1
    points = [(100 * i / last, value) for i, value in enumerate(values)]
    mean = result["kl"]["value"]
    return Panel(
        f"KL(A||B) per token, {result['tokens']:,} tokens",
        "tokens with at most this KL, %",
        "KL, nats",
        (0, 100),
        range(0, 101, 10),
        [("quantiles", points), (f"mean {mean:.2e}", [(0, mean), (100, mean)])],
        (f"A: {_named(result['a'])}", f"B: {_named(result['b'])}"),
    )


def _named(side: dict[str, Any]) -> str:
    formats = ", ".join(name for name, _ in side["quantizers"])
    return f"{PurePath(side['path']).name}, {formats}, {side['dtype']}"


def _linears(layers: Sequence[dict[str, Any]]) -> Panel:
    def points(key: str) -> list[tuple[float, float]]:
        return [(i, row[key]) for i, row in enumerate(layers) if row[key] is not None]

    return Panel(
        "Relative error of each linear layer",
        "linear layer, in the order of the table",
        "|B - A| / |A|",
        (0, max(1, len(layers) - 1)),
        _counts(len(layers)),
        [("output", points("output")), ("weight", points("weight"))],
    )


def _hidden(states: Sequence[dict[str, Any]]) -> Panel:
    points = [(i, row["error"]) for i, row in enumerate(states) if row["error"] is not None]
    return Panel(
        "Relative error of the hidden states",
        "before this decoder layer; the last: after all",
        "|B - A| / |A|",
        (0, max(1, len(states) - 1)),
        _counts(len(states)),
        [("hidden states", points)],
    )


def _counts(count: int) -> range:
    return range(0, max(2, count), max(1, math.ceil(count / 12)))


def _panel(panel: Panel) -> Iterator[str]:
    low, high = _decades([y for _, points in panel.curves for _, y in points])
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM

    def x_of(x: float) -> float:
        start, stop = panel.x_range
        return _LEFT + (x - start) / (stop - start) * (right - _LEFT)

    def y_of(y: float) -> float:
        return bottom - (math.log10(max(y, _FLOOR)) - low) / (high - low) * (bottom - _TOP)

    yield _text(_LEFT, 30, panel.title, "start", 'font-size="16" font-weight="bold"')
    for i, subtitle in enumerate(panel.subtitles):
        yield _text(_LEFT, 49 + 17 * i, subtitle, "start")
    for power in range(low, high + 1):
        y = y_of(10.0**power)
        yield _line(_LEFT, y, right, y, "#ddd")
        yield _text(_LEFT - 8, y + 4, f"1e{power}", "end")
    for tick in panel.x_ticks:
        yield _line(x_of(tick), bottom, x_of(tick), bottom + 5, "#444")
        yield _text(x_of(tick), bottom + 20, f"{tick:g}", "middle")
    yield _line(_LEFT, bottom, right, bottom, "#444")
    yield _line(_LEFT, _TOP, _LEFT, bottom, "#444")
    yield _text((_LEFT + right) / 2, bottom + 42, panel.x_label, "middle")
    middle = (_TOP + bottom) / 2
    yield _text(22, middle, panel.y_label, "middle", f'transform="rotate(-90 22 {middle:g})"')
    for i, (legend, points) in enumerate(panel.curves):
        color = _COLORS[i]
        path = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in points)
        yield f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>'
        yield _text(right, 30 + 17 * i, legend, "end", f'fill="{color}"')


def _decades(values: Sequence[float]) -> tuple[int, int]:
    """Powers of ten around all values, at least one decade apart."""
    logs = [math.log10(max(value, _FLOOR)) for value in values] or [0.0]
    low, high = math.floor(min(logs)), math.ceil(max(logs))
    return low, max(high, low + 1)


def _line(x1: float, y1: float, x2: float, y2: float, color: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{color}"/>'


def _text(x: float, y: float, text: str, anchor: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {more}>{escape(text)}</text>'

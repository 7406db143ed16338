"""Curves over one linear x axis and one logarithmic y axis, as SVG made of lines and text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 640, 360
"""Of one panel, pixels."""
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 20, 50, 50
_COLORS = ("#1f5fa8", "#c0561f", "#3a8a3a", "#7a4fa0")

Curves = Mapping[str, Sequence[tuple[float, float]]]
"""Legend -> points (x, y), y > 0."""


def draw(panels: Sequence[tuple[str, Curves]], x_label: str, y_label: str) -> str:
    """One panel under the other; each is (title, curves)."""
    body = "\n".join(
        f'<g transform="translate(0 {i * HEIGHT})">\n'
        + "\n".join(_panel(title, curves, x_label, y_label))
        + "\n</g>"
        for i, (title, curves) in enumerate(panels)
    )
    height = HEIGHT * len(panels)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        f'viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="12">\n'
        f'<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
    )


def _panel(title: str, curves: Curves, x_label: str, y_label: str) -> Iterator[str]:
    xs = sorted({x for points in curves.values() for x, _ in points})
    ys = [y for points in curves.values() for _, y in points]
    low = math.floor(math.log10(min(ys)))
    high = max(low + 1, math.ceil(math.log10(max(ys))))
    right, bottom = WIDTH - _RIGHT, HEIGHT - _BOTTOM
    width = (xs[-1] - xs[0]) or 1.0

    def x_of(x: float) -> float:
        return _LEFT + (x - xs[0]) / width * (right - _LEFT)

    def y_of(y: float) -> float:
        return bottom - (math.log10(y) - low) / (high - low) * (bottom - _TOP)

    yield _text(_LEFT, 24, title, "start", 'font-size="15" font-weight="bold"')
    for power in range(low, high + 1):
        y = y_of(10.0**power)
        yield _line(_LEFT, y, right, y, "#ddd")
        yield _text(_LEFT - 6, y + 4, f"{10.0**power:g}", "end")
    for x in xs:
        yield _line(x_of(x), bottom, x_of(x), bottom + 4, "#444")
        yield _text(x_of(x), bottom + 18, f"{x:g}", "middle")
    yield _line(_LEFT, bottom, right, bottom, "#444")
    yield _line(_LEFT, _TOP, _LEFT, bottom, "#444")
    yield _text((_LEFT + right) / 2, bottom + 38, x_label, "middle")
    middle = (_TOP + bottom) / 2
    yield _text(18, middle, y_label, "middle", f'transform="rotate(-90 18 {middle:g})"')
    for i, (legend, points) in enumerate(curves.items()):
        color = _COLORS[i % len(_COLORS)]
        path = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in points)
        yield f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>'
        yield _text(_LEFT + 12 + 90 * i, 42, legend, "start", f'fill="{color}"')


def _line(x1: float, y1: float, x2: float, y2: float, color: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{color}"/>'


def _text(x: float, y: float, text: str, anchor: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {more}>{escape(text)}</text>'

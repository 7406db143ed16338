"""`quantd bench kernels`: which route multiplies fastest here, by layout and rows."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from typing import Any

from quantd.daemon.cli import child
from quantd.daemon.cli.checkpoint import read_model
from quantd.daemon.cli.screen import LastLine, bar, size, table
from quantd.daemon.errors import ConfigError

_ROWS = (1, 2, 4, 8, 16, 33, 64, 128, 512)
_SHAPE = "2048x2048"
_MOST = 1 << 20
"""Of either side of a shape."""

_SECONDS = 0.1
_WINS = 1.05
"""By less a route has not won: two runs differ by as much."""


def run(arguments: argparse.Namespace) -> int:
    request = _request(arguments)
    result = _run(request)
    print(json.dumps(result, indent=2) if arguments.json else "\n".join(show(result)))
    return 0


def _request(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.model is not None and arguments.shape is not None:
        raise ConfigError("--model and --shape: one of them says the shapes")
    flags = {"threads": ("--threads", arguments.threads)}
    model = read_model(arguments.model or "demo", flags)
    return {
        "shapes": [_shape(text) for text in arguments.shape or (_SHAPE,)],
        "path": None if arguments.model is None else str(model.path),
        "rows": _ROWS,
        "threads": model.threads,
        "seconds": _SECONDS,
    }


def _shape(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,8})x(\d{1,8})", text)
    shape = (int(found[1]), int(found[2])) if found else (0, 0)
    if not all(1 <= side <= _MOST for side in shape):
        raise ConfigError(f"--shape = {text}: must be OUTxIN, each from 1 to {_MOST}")
    return shape


def _run(request: dict[str, Any]) -> dict[str, Any]:
    """Shows progress on stderr if that is a terminal."""
    if not sys.stderr.isatty():
        return child.run("bench_kernels", request, lambda progress: None)
    screen = LastLine(sys.stderr)

    def show_one(progress: dict[str, Any]) -> None:
        screen.show(f"{bar(progress['done'] / progress['total'])} {progress['stage']}")

    try:
        return child.run("bench_kernels", request, show_one)
    finally:
        screen.show("")


def show(result: dict[str, Any]) -> Iterator[str]:
    """Lines for people."""
    threads = result["threads"]
    integers = result["int8_gop_s"]
    peaks = f"{result['float_gop_s']:.0f} GOP/s in fp32"
    if integers is not None:
        peaks += f", {integers:.0f} in int8"
    yield (
        f"{threads} thread{'' if threads == 1 else 's'}, {result['level']}; "
        f"memory {result['read_gb_s']:.1f} GB/s, {peaks}, measured now"
    )
    yield "cells: GB/s of weights, GOP/s, % of what memory or arithmetic would allow"
    lost: list[str] = []
    for one in result["shapes"]:
        yield ""
        yield from _shape_lines(one, lost)
    yield ""
    if lost:
        yield f"faster than the route in use by more than {_WINS - 1:.0%}:"
        yield from lost
    else:
        yield f"No route is faster than the one in use by more than {_WINS - 1:.0%}."
    for note in result["notes"]:
        yield f"note: {note}"


def _shape_lines(one: dict[str, Any], lost: list[str]) -> Iterator[str]:
    """Adds to `lost` where the route in use does not win."""
    name = "x".join(map(str, one["shape"]))
    rows = [cell["rows"] for cell in one["layouts"][0]["fastest"]]
    lines = [[name, "route (* in use)", *(f"{n} rows" for n in rows)]]
    problems = []
    for layout in one["layouts"]:
        about = f"{layout['layout']}, {size(layout['bytes'])}"
        for route in layout["routes"]:
            if route["problem"] is not None:
                problems.append(f"{layout['layout']}, {route['name']}: {route['problem']}")
                continue
            mark = "*" if route["used"] else ""
            lines.append([about, route["name"] + mark, *map(_cell, route["cells"])])
            about = ""
        for best in layout["fastest"]:
            if best["gain"] > _WINS:
                lost.append(
                    f"  {name} {layout['layout']}, {best['rows']} rows: {best['route']}, "
                    f"{best['gain']:.2f} times as fast"
                )
    yield table(lines)
    yield from problems


def _cell(cell: dict[str, Any]) -> str:
    return f"{cell['gb_s']:.1f} {cell['gop_s']:.0f} {cell['roofline']:.0%}"

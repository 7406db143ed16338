"""Every route of every layout, timed: the torch half of `quantd bench kernels`.

`python -m quantd.daemon.worker.bench_kernels`, by the protocol of `child.py`. The request has
`shapes` ([out, in] each), `path` (None, or a checkpoint whose layers' shapes are measured instead),
`rows`, `threads` (0: all cores) and `seconds`, the time that is spent on one figure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from quantd.daemon.worker import child
from quantd.daemon.worker.checkpoint import open_checkpoint
from quantd.daemon.worker.load import choose_dtype, stored_dtype
from quantd.daemon.worker.machine import available_memory, physical_cores
from quantd.daemon.worker.models.families import read_config
from quantd.daemon.worker.models.names import model_tensors
from quantd.kernels import ops
from quantd.kernels.bench.roofline import Roofline, measure_roofline, seconds
from quantd.kernels.bench.routes import LAYOUTS, Layout, Multiply, Route, Weight
from quantd.plugins.api import Refused

_CACHE_BYTES = 96 << 20
"""Copies of a weight together are at least so large, and taken in turn: in a model, too, weights
come from memory and not from a cache."""

_MOST_COPIES = 64
_CHECK_ROWS = 4
_WRONG = 2.0**-6
"""Relative error beyond which a route is wrong. Eight bits with one scale per row cost 2^-7."""

_FLOATS = 5
"""Memory of one measurement, in fp32 copies of the weight beside those of the rotation."""

Report = dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Measuring:
    roofline: Roofline
    rows: Sequence[int]
    seconds: float


def bench(request: dict[str, Any], send: child.Send) -> Report:
    ops.set_num_threads(request["threads"] or physical_cores())
    torch.manual_seed(0)
    path = request["path"]
    shapes = [tuple(shape) for shape in request["shapes"]] if path is None else _shapes(Path(path))
    for shape in shapes:
        _check_memory(shape)
    send({"done": 0, "total": 1, "stage": "roofline"})
    measuring = _Measuring(measure_roofline(), request["rows"], request["seconds"])
    report: Report = {
        "threads": ops.num_threads(),
        "level": ops.identity()[0],
        "notes": list(ops.notes()),
        "read_gb_s": measuring.roofline.read / 1e9,
        "float_gop_s": measuring.roofline.floats / 1e9,
        "int8_gop_s": _billions(measuring.roofline.integers),
        "shapes": [],
    }
    total = len(shapes) * len(LAYOUTS)
    for i, shape in enumerate(shapes):
        layouts = []
        for j, layout in enumerate(LAYOUTS):
            stage = f"{shape[0]}x{shape[1]} {layout.name}"
            send({"done": i * len(LAYOUTS) + j, "total": total, "stage": stage})
            layouts.append(_layout(layout, shape, measuring))
        report["shapes"].append({"shape": list(shape), "layouts": layouts})
    return report


def _shapes(path: Path) -> list[tuple[int, int]]:
    """Of a checkpoint's linear layers, each once. Raises Refused."""
    checkpoint = open_checkpoint(path)
    source = checkpoint.source()
    config = read_config(checkpoint.config)
    dtype = choose_dtype("auto", config.dtype or stored_dtype(source), torch.device("cpu"))
    specs = model_tensors(config, dtype, source.names(), exact=False).linears.values()
    return sorted({(spec.out_features, spec.in_features) for spec in specs})


def _check_memory(shape: tuple[int, int]) -> None:
    need, have = _FLOATS * 4 * shape[0] * shape[1] + 2 * _CACHE_BYTES, available_memory()
    if need > have:
        raise Refused(
            f"a weight of {shape[0]}x{shape[1]} takes {need >> 20} MiB to measure, "
            f"{have >> 20} MiB are available"
        )


def _layout(layout: Layout, shape: tuple[int, int], measuring: _Measuring) -> Report:
    """`fastest` by rows: the route with the least time, and how much less than the used one's."""
    weight = Weight(layout, shape)
    routes = [_route(route, weight, measuring) for route in weight.routes()]
    used = next(route for route in routes if route["used"])
    timed = [route for route in routes if route["problem"] is None]
    fastest = []
    for i, rows in enumerate(measuring.rows):
        best = min(timed, key=lambda route: route["cells"][i]["seconds"])
        gain = used["cells"][i]["seconds"] / best["cells"][i]["seconds"]
        fastest.append({"rows": rows, "route": best["name"], "gain": gain})
    return {
        "layout": layout.name,
        "bytes": weight.num_bytes,
        "routes": routes,
        "fastest": fastest,
    }


def _route(route: Route, weight: Weight, measuring: _Measuring) -> Report:
    report: Report = {"name": route.name, "used": route.used, "problem": None, "cells": []}
    try:
        first = route.make()
        error = _error(first, weight)
    except (RuntimeError, AttributeError, TypeError, NotImplementedError) as problem:
        if route.used:
            raise
        return report | {"problem": f"does not work here: {str(problem).splitlines()[0]}"}
    if not error <= _WRONG:
        return report | {"problem": f"wrong numbers here: the relative error is {error:.2g}"}
    copies = min(max(1, _CACHE_BYTES // weight.num_bytes), _MOST_COPIES)
    turn = _in_turn([first, *(route.make() for _ in range(copies - 1))])
    for rows in measuring.rows:
        x = torch.randn(rows, weight.shape[1]).to(weight.layout.dtype)
        spent = seconds(partial(_call, turn, x), measuring.seconds)
        operations = 2.0 * rows * weight.shape[0] * weight.shape[1]
        least = measuring.roofline.seconds(weight.num_bytes, operations, route.integers)
        report["cells"].append(
            {
                "rows": rows,
                "seconds": spent,
                "gb_s": weight.num_bytes / spent / 1e9,
                "gop_s": operations / spent / 1e9,
                "roofline": least / spent,
            }
        )
    return report


def _in_turn(copies: Sequence[Multiply]) -> Iterator[Multiply]:
    while True:
        yield from copies


def _call(turn: Iterator[Multiply], x: torch.Tensor) -> None:
    next(turn)(x)


def _error(multiply: Callable[[torch.Tensor], torch.Tensor], weight: Weight) -> float:
    x = torch.randn(_CHECK_ROWS, weight.shape[1]).to(weight.layout.dtype)
    want = weight.product(x)
    return float((multiply(x).double() - want).norm() / want.norm())


def _billions(value: float | None) -> float | None:
    return None if value is None else value / 1e9


if __name__ == "__main__":
    child.main(bench)

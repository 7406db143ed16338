"""What `quantd bench kernels` asks for and shows."""

from __future__ import annotations

from typing import Any

import pytest

from quantd.daemon.cli import bench
from quantd.daemon.cli.parser import new_parser
from quantd.daemon.errors import ConfigError


def request(*flags: str) -> dict[str, Any]:
    return bench._request(new_parser().parse_args(["bench", "kernels", *flags]))


def test_shapes_are_asked_for_as_given() -> None:
    asked = request("--shape", "8x16", "--shape", "100x1", "--threads", "3")
    assert asked["shapes"] == [(8, 16), (100, 1)]
    assert asked["path"] is None and asked["threads"] == 3
    assert request()["shapes"] == [(2048, 2048)]


@pytest.mark.parametrize("shape", ["", "8", "8x", "0x4", "8x-1", "8x16x2", "1048577x1", "8 x 16"])
def test_a_wrong_shape_is_named_with_its_limit(shape: str) -> None:
    with pytest.raises(ConfigError, match=r"--shape = .*: must be OUTxIN, each from 1 to 1048576"):
        request(f"--shape={shape}")


def test_a_model_has_shapes_of_its_own() -> None:
    assert request("--model", "demo")["path"].endswith("demo")
    with pytest.raises(ConfigError, match="--model and --shape"):
        request("--model", "demo", "--shape", "8x8")
    with pytest.raises(ConfigError, match="no such folder"):
        request("--model", "/nowhere")


def route(name: str, spent: float, *, used: bool = False) -> dict[str, Any]:
    cell = {"rows": 4, "seconds": spent, "gb_s": 12.25, "gop_s": 99.5, "roofline": 0.5}
    return {"name": name, "used": used, "problem": None, "cells": [cell]}


def result(gain: float) -> dict[str, Any]:
    broken = {"name": "third", "used": False, "problem": "wrong numbers here", "cells": []}
    layout = {
        "layout": "w8a8",
        "bytes": 1 << 20,
        "routes": [route("first", 1.0, used=True), route("second", 0.9), broken],
        "fastest": [{"rows": 4, "route": "second", "gain": gain}],
    }
    return {
        "threads": 1,
        "level": "avx2",
        "notes": ["something is missing"],
        "read_gb_s": 20.0,
        "float_gop_s": 100.0,
        "int8_gop_s": None,
        "shapes": [{"shape": [8, 16], "layouts": [layout]}],
    }


def test_the_route_in_use_is_marked_and_who_beats_it_is_said() -> None:
    text = "\n".join(bench.show(result(1.5)))
    assert "1 thread, avx2; memory 20.0 GB/s, 100 GOP/s in fp32, measured now" in text
    assert "w8a8, 1.0 MiB  first*" in text and "12.2 100 50%" in text
    assert "w8a8, third: wrong numbers here" in text
    assert "8x16 w8a8, 4 rows: second, 1.50 times as fast" in text
    assert text.endswith("note: something is missing")


def test_a_difference_within_the_noise_is_no_win() -> None:
    text = "\n".join(bench.show(result(1.05)))
    assert "No route is faster than the one in use by more than 5%." in text
    assert "times as fast" not in text

"""`quantd bench kernels` as a user types it, on shapes that take a moment."""

from __future__ import annotations

import json
import subprocess
import sys

COMMAND = [sys.executable, "-m", "quantd.daemon", "bench", "kernels", "--threads", "1"]
ROWS = [1, 2, 4, 8, 16, 33, 64, 128, 512]


def test_every_layout_has_a_route_in_use_and_every_route_numbers_or_a_reason() -> None:
    command = [*COMMAND, "--shape", "33x80", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=540)
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert report["threads"] == 1 and report["read_gb_s"] > 0 and report["float_gop_s"] > 0
    assert [one["shape"] for one in report["shapes"]] == [[33, 80]]
    layouts = {one["layout"]: one for one in report["shapes"][0]["layouts"]}
    assert {"float32", "bfloat16", "4 bits", "w8a8", "8 bits exact"} <= layouts.keys()
    for layout in layouts.values():
        assert [route["used"] for route in layout["routes"]].count(True) == 1
        assert [cell["rows"] for cell in layout["fastest"]] == ROWS
        for route in layout["routes"]:
            if route["problem"] is None:
                assert [cell["rows"] for cell in route["cells"]] == ROWS
                assert all(cell["seconds"] > 0 for cell in route["cells"])
            else:
                assert not route["used"] and not route["cells"]


def test_a_shape_beyond_the_memory_is_refused_with_the_numbers() -> None:
    command = [*COMMAND, "--shape", "1048576x1048576"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=540)
    assert done.returncode == 1
    assert "1048576x1048576 takes" in done.stderr and "MiB are available" in done.stderr

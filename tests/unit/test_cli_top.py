"""What `quantd top` shows, without a terminal."""

from __future__ import annotations

from typing import Any

import pytest

from quantd.daemon.cli.top_view import Look, fit, lines

MODEL = {
    "name": "m",
    "aliases": ("alias",),
    "state": "ready",
    "stage": "",
    "progress": 1.0,
    "reason": None,
}
REQUEST = {
    "id": "chatcmpl-1-0",
    "caller": "alice",
    "phase": "prefill",
    "priority": 0,
    "prompt_tokens": 100,
    "cached_tokens": 32,
    "computed_tokens": 64,
    "output_tokens": 0,
    "max_tokens": 50,
    "blocks": 4,
    "preemptions": 1,
    "age": 2.25,
    "queue_seconds": None,
}


def engine(**fields: Any) -> dict[str, Any]:
    kv = {
        "block_bytes": 1 << 20,
        "free": 5,
        "used": 10,
        "cached": 5,
        "host_free": 1,
        "host_cached": 3,
        "disk_free": 0,
        "disk_cached": 0,
        "moved_blocks": {"out_host": 7, "in_host": 2, "out_disk": 0, "in_disk": 0},
        "disk_problem": None,
    }
    return {
        "running": 1,
        "waiting": 2,
        "kv": kv | fields.pop("kv", {}),
        "preemptions": {"memory": 3, "priority": 1},
        "finished": 9,
        "prompt_tokens": 1000,
        "cached_tokens": 250,
        "generated_tokens": 400,
        "requests": [],
    } | fields


def look(at: float, **engines: dict[str, Any]) -> Look:
    return Look(at, [MODEL], engines)


def test_rates_are_between_two_looks() -> None:
    before = look(10.0, m=engine(prompt_tokens=900, generated_tokens=380))
    text = lines(look(12.0, m=engine()), before)
    assert text[0] == "m  ready  running 1  waiting 2"
    assert text[1] == (
        "prompt 50.0 tok/s  generated 10.0 tok/s  prefix hits 25%  preempted 4  finished 9"
    )


@pytest.mark.parametrize("before", [None, look(1.0), look(1.0, m=engine(prompt_tokens=5000))])
def test_no_rate_without_a_look_before(before: Look | None) -> None:
    assert lines(look(2.0, m=engine()), before)[1].startswith("prompt - tok/s")


def test_tiers_that_are_there() -> None:
    text = lines(look(0.0, m=engine()), None)
    assert text[2] == (
        "device " + "█" * 15 + "▒" * 7 + "·" * 8 + " 15.0 MiB  used 10  cached 5  free 5"
    )
    assert text[3].endswith("3.0 MiB  cached 3  free 1  out 7  in 2")
    assert len(text) == 4
    resting = engine(kv={"disk_problem": "OSError: no space"})
    assert lines(look(0.0, m=resting), None)[-1] == "disk   rests: OSError: no space"


def test_requests_and_models_that_are_not_in_memory() -> None:
    text = lines(look(0.0, m=engine(requests=[REQUEST])), None)
    assert text[-1].split() == (
        ["chatcmpl-1-0", "alice", "prefill", "64/100", "32", "0/50", "2.2", "s", "-", "1"]
    )
    loading = MODEL | {"state": "loading", "stage": "weights", "progress": 0.5}
    failed = MODEL | {"name": "f", "aliases": (), "state": "failed", "reason": "no such file"}
    assert lines(Look(0.0, [loading, failed], {}), None) == [
        "m  loading weights 50%",
        "",
        "f  failed  no such file",
    ]
    assert lines(Look(0.0, [loading, failed], {}), None, "alias") == ["m  loading weights 50%"]


@pytest.mark.parametrize(("columns", "rows"), [(20, 3), (1, 1), (0, 0), (200, 50)])
def test_any_terminal_is_large_enough(columns: int, rows: int) -> None:
    text = fit(lines(look(0.0, m=engine(requests=[REQUEST] * 9)), None), columns, rows)
    assert len(text) <= rows and all(len(line) <= columns for line in text)


def test_what_is_cut_off_is_said() -> None:
    assert fit(["a", "b", "c", "d"], 80, 3) == ["a", "b", "… 2 lines more"]

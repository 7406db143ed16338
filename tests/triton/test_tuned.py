"""Sizes of tiles: whichever is taken gives the same bits; what is measured is written and read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import tune_gpu
from triton.runtime.errors import OutOfResources

from quantd.kernels.triton import grouped, tuned

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuned, "MEASURED", {})


@pytest.mark.parametrize(("most", "rows"), [(16, 3), (64, 21), (tuned.ROWS[-1], 70)])
@pytest.mark.parametrize("bits", [3, 4])
def test_every_candidate_gives_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, bits: int, most: int, rows: int
) -> None:
    monkeypatch.setattr(grouped, "SPAN", grouped.BLOCK)
    monkeypatch.setattr(grouped, "SPAN_BLOCKS", 1)
    part = tune_gpu.make_weight((70, 200), bits, CPU)
    part.scale.copy_(torch.rand(part.scale.shape))
    x = torch.randn(rows, 200).half()
    want = torch.full((rows, 70), torch.nan).half()
    grouped.grouped_matmul(x, part, None, want)
    assert want.isfinite().all()
    for candidate in tuned.CANDIDATES[most]:
        tuned.MEASURED["cpu", bits, most] = candidate
        assert tuned.tile(CPU, torch.float16, bits, rows) == candidate
        for enough in (1, 1 << 20):  # all spans in one program, or one each
            monkeypatch.setattr(tuned, "ENOUGH_PROGRAMS", enough)
            out = torch.full((rows, 70), torch.nan).half()
            grouped.grouped_matmul(x, part, None, out)
            assert torch.equal(out, want), candidate


def test_the_default_is_a_candidate() -> None:
    assert all(tuned.DEFAULT[most] in tuned.CANDIDATES[most] for most in tuned.ROWS)


def test_what_is_measured_is_written_and_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Dry: shapes of a few rows, and a clock by which 32 rows of activations and 8 warps win."""
    monkeypatch.setattr(tune_gpu, "ROWS", {16: (1,), 64: (17,), tuned.ROWS[-1]: (65,)})
    monkeypatch.setattr(tune_gpu, "REPEATS", 1)
    calls = []

    def clock(call: Callable[[], None]) -> float:
        (chosen,) = tuned.MEASURED.values()
        calls.append(chosen)
        call()
        if chosen.m == 128:
            raise OutOfResources(2, 1, "shared memory")
        return 1.0 if chosen.m == 32 or (chosen.warps, chosen.m) == (8, 16) else 1.02

    found = tune_gpu.tune(CPU, [4], [(20, 64)], clock)
    assert set(calls) == {c for candidates in tuned.CANDIDATES.values() for c in candidates}
    assert tuned.MEASURED == {}
    # 2 percent are not enough.
    assert found == {("cpu", 4, most): tuned.DEFAULT[most] for most in tuned.ROWS}
    monkeypatch.setattr(tune_gpu, "GAIN", 0.99)
    found = tune_gpu.tune(CPU, [4], [(20, 64)], clock)
    assert found["cpu", 4, 16] == tuned.Tile(128, 16, 8, 3)
    assert found["cpu", 4, 64] == tuned.Tile(64, 32, 4, 3)
    path = tmp_path / "tuned.json"
    tuned.write(path, found)
    assert tuned.read(path) == found


def test_a_tile_that_no_test_has_seen_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tuned.json"
    path.write_text('{"a GPU": {"4": {"16": [64, 16, 4, 3], "more": [512, 16, 4, 3]}}}')
    with pytest.raises(ValueError, match=r"a GPU, 4 bits, more rows: \[512, 16, 4, 3\]"):
        tuned.read(path)


def test_what_is_shipped_can_be_read() -> None:
    assert isinstance(tuned.read(tuned.FILE), dict)

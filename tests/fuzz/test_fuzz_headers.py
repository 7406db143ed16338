"""A short run of the fuzzer, and that it would see what it looks for."""

from __future__ import annotations

from pathlib import Path

import pytest
from fuzz import fuzz_headers


def test_mutated_headers_are_read_or_refused(tmp_path: Path) -> None:
    accepted, failures = fuzz_headers.run(seed=1, start=0, count=600, folder=tmp_path)
    assert failures == []
    assert 0 < accepted < 600


@pytest.mark.parametrize("number", range(len(fuzz_headers.TARGETS)))
def test_what_is_mutated_is_sound_itself(number: int, tmp_path: Path) -> None:
    name, data, opens = fuzz_headers.TARGETS[number]
    (tmp_path / name).write_bytes(data)
    opens(tmp_path / name)


def test_a_failure_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def takes_too_much(path: Path) -> None:
        raise KeyError(bytes(2 * fuzz_headers.PEAK_BYTES)[:1])

    target = ("model.gguf", b"GGUF", takes_too_much)
    monkeypatch.setattr(fuzz_headers, "TARGETS", (target,))
    accepted, failures = fuzz_headers.run(seed=1, start=0, count=1, folder=tmp_path)
    assert accepted == 0
    assert [failure.split(": ")[1].split()[0] for failure in failures] == ["KeyError", "took"]

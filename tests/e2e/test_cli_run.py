"""`quantd run` with nobody there: a daemon for the length of the call, and nothing left of it."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from pathlib import Path


def quantd(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "quantd.daemon", "run", *arguments],
        env=os.environ | {"TMPDIR": str(folder), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )


def test_an_answer_without_a_daemon(tmp_path: Path) -> None:
    rest = ["--temperature", "0", "--max-tokens", "8", "--socket", str(tmp_path / "none.sock")]
    done = quantd(tmp_path, "demo", "What is 2 + 3?", *rest)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip()
    again = quantd(tmp_path, "What is 2 + 3?", *rest)
    assert again.stdout == done.stdout, "a prompt alone asks the demo"
    assert list(tmp_path.iterdir()) == [], "its folder and its socket are gone"


def test_a_command_that_is_killed_leaves_no_daemon(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "quantd.daemon", "run", "demo", "hi"]
    environment = os.environ | {"TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    where = ["--socket", str(tmp_path / "none.sock")]
    call = subprocess.Popen(
        [*command, *where],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    children = Path(f"/proc/{call.pid}/task/{call.pid}/children")
    while not (daemon := children.read_text().split()):
        time.sleep(0.01)
    ended = os.pidfd_open(int(daemon[0]))
    while not list(tmp_path.glob("quantd-*/quantd.sock")):
        time.sleep(0.01)
    call.kill()
    call.wait()
    assert select.select([ended], [], [], 240)[0], "the daemon ends too"
    os.close(ended)


def test_a_model_that_cannot_be_loaded(tmp_path: Path) -> None:
    nobody = ["--socket", str(tmp_path / "none.sock")]
    model = tmp_path / "empty"
    model.mkdir()
    done = quantd(tmp_path, str(model), "hi", *nobody)
    assert (done.returncode, done.stdout) == (1, "")
    assert "empty" in done.stderr and done.stderr.count("\n") == 1
    done = quantd(tmp_path, "nope", *nobody)
    assert done.returncode == 1
    assert "nope: no such folder or file" in done.stderr and done.stderr.count("\n") == 1

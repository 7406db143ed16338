"""A daemon for the length of one command."""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from quantd.daemon.cli.client import ClientError, Target
from quantd.daemon.cli.screen import Spinner, bar

_POLL_SECONDS = 0.05
_STOP_SECONDS = 10.0
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


@contextmanager
def temporary_daemon(model: str | None, config: str | None) -> Iterator[Target]:
    """Serves `model` (None: the configured ones, else the demo), ready when the block begins.

    Raises ClientError with what the daemon said when it does not come up.
    """
    with tempfile.TemporaryDirectory(prefix="quantd-") as folder:
        path = Path(folder) / "quantd.sock"
        command = [sys.executable, "-m", "quantd.daemon", "serve"]
        command += ["--socket", str(path), "--port", "0", "--drain-seconds", "0"]
        command += ["--store-path", str(Path(folder) / "state")]
        command += ["--log-level", "warning", "--log-format", "console"]
        command += ["--config", config] if config else []
        command += [model] if model is not None else []
        with (Path(folder) / "log").open("w+b") as log:
            # A group of its own: Ctrl-C stops the answer and not the daemon.
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                process_group=0,
                preexec_fn=_end_with_parent,
            )
            try:
                _wait(process, Target(path), Path(log.name))
                yield Target(path)
            finally:
                _stop(process)


def _end_with_parent() -> None:
    """In the child: SIGTERM when the command is killed, so that no daemon is left behind."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _wait(process: subprocess.Popen[bytes], daemon: Target, log: Path) -> None:
    with Spinner("starting") as spinner:
        while not daemon.answers():
            _check(process, log)
            time.sleep(_POLL_SECONDS)
        while True:
            _check(process, log)
            models = daemon.get("/v1/models")["data"]
            failed = next((model for model in models if model["state"] == "failed"), None)
            if failed is not None:
                raise ClientError(f"{failed['id']}: {failed['reason']}")
            loading = [model for model in models if model["state"] == "loading"]
            if not loading:
                return
            spinner.text = f"loading {loading[0]['id']} {bar(loading[0]['progress'])}"
            time.sleep(_POLL_SECONDS)


def _check(process: subprocess.Popen[bytes], log: Path) -> None:
    if process.poll() is not None:
        lines = log.read_text(errors="replace").strip().splitlines()
        last = lines[-1].removeprefix("quantd: ") if lines else f"status {process.returncode}"
        raise ClientError(last)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()

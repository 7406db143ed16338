"""The real daemon as a process, on the embedded model or on random weights."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

START_SECONDS = 240
"""Of patience on a machine that is busy with other things; nothing is measured by it."""
_ADDRESS = re.compile(rb"http://127\.0\.0\.1:(\d+)\D")


def checked_output(
    command: list[str], environment: dict[str, str], folder: Path, seconds: float = 540
) -> str:
    """What a program writes; the test fails with it when the program does."""
    done = subprocess.run(
        command,
        env=environment,
        cwd=folder,
        timeout=seconds,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


class UnixConnection(http.client.HTTPConnection):
    """http.client over a Unix socket."""

    def __init__(self, path: Path, timeout: float = 240) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = str(path)

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class Server:
    """Where a daemon listens, and how to ask it."""

    def __init__(self, port: int, socket: Path) -> None:
        self.port = port
        self.socket = socket
        self.url = f"http://127.0.0.1:{port}"

    def wait(self, condition: Callable[[], Any]) -> Any:
        """The first true value of `condition`."""
        deadline = time.monotonic() + START_SECONDS
        while not (value := condition()):
            self.check(time.monotonic() < deadline)
            time.sleep(0.02)
        return value

    def check(self, in_time: bool) -> None:
        assert in_time, "the daemon does not come to what is waited for"

    def request(
        self, method: str, path: str, body: Any = None, *, unix: bool = False, **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        connection = (
            UnixConnection(self.socket)
            if unix
            else http.client.HTTPConnection("127.0.0.1", self.port, timeout=240)
        )
        try:
            data = body if body is None or isinstance(body, bytes) else json.dumps(body)
            sent = {"Content-Type": "application/json"} | headers
            connection.request(method, path, data, sent)
            response = connection.getresponse()
            received = {name.lower(): value for name, value in response.getheaders()}
            return response.status, received, response.read()
        finally:
            connection.close()

    def get(self, path: str, *, unix: bool = False) -> tuple[int, bytes]:
        status, _, body = self.request("GET", path, unix=unix)
        return status, body

    def post(self, path: str, body: Any, *, unix: bool = False) -> Any:
        status, _, data = self.request("POST", path, body, unix=unix)
        assert status == 200, (status, data)
        return json.loads(data)

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels; `name` may hold some of the labels."""
        base, _, labels = name.partition("{")
        total = 0.0
        for line in self.get("/metrics", unix=True)[1].decode().splitlines():
            if re.match(rf"{re.escape(base)}[{{ ]", line) and all(
                part in line for part in labels.rstrip("}").split(",") if part
            ):
                total += float(line.rsplit(" ", 1)[1])
        return total

    def wait_metric(self, name: str, value: float) -> None:
        self.wait(lambda: self.metric(name) == value)

    def num_requests(self) -> int:
        """Those that run or wait."""
        engines = json.loads(self.get("/admin/state", unix=True)[1])["engines"].values()
        return sum(engine["running"] + engine["waiting"] for engine in engines)

    def wait_requests(self, number: int) -> None:
        """Until so many run or wait; 0: also none that an earlier test has left."""
        self.wait(lambda: self.num_requests() == number)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Its workers stand still meanwhile: what runs does not end, what comes waits for it. For
        tests that must look, or bring together, before something is over."""
        models = json.loads(self.get("/admin/models", unix=True)[1])["models"]
        pids = [model["pid"] for model in models if model["pid"]]
        assert pids, "nothing is loaded"
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in pids:
                with suppress(ProcessLookupError):  # the test may have ended it
                    os.kill(pid, signal.SIGCONT)


class Daemon(Server):
    """`quantd serve ARGUMENTS` on a free port and a socket in `folder`, by default a new one.

    A context: at its end the daemon is ended, and the folder that was made for it is gone. What
    the daemon has said by then is in the report of a test that fails (tests/e2e/conftest.py).
    """

    running: ClassVar[list[Daemon]] = []
    """All that are not closed."""

    def __init__(
        self,
        *arguments: str,
        wait_ready: bool = True,
        folder: Path | None = None,
        max_files: int | None = None,
    ) -> None:
        """`max_files`: its soft limit of open files."""
        self._own_folder = folder is None
        self.folder = folder or Path(tempfile.mkdtemp(prefix="quantd-test-"))
        self.log = self.folder / "log"
        self.process = self._start(arguments, max_files)
        Daemon.running.append(self)
        try:
            super().__init__(self._wait_for_port(), self.folder / "quantd.sock")
            if wait_ready:
                self.wait_ready()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _start(self, arguments: tuple[str, ...], max_files: int | None) -> subprocess.Popen[bytes]:
        listen = ["--port", "0", "--socket", str(self.folder / "quantd.sock")]
        if not any(argument.startswith("--store-path") for argument in arguments):
            listen += ["--store-path", str(self.folder / "state")]
        command = [sys.executable, "-m", "quantd.daemon", "serve", *arguments, *listen]
        if max_files is not None:
            command = ["prlimit", f"--nofile={max_files}:", *command]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with self.log.open("wb") as log:
            return subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
            )

    def _wait_for_port(self) -> int:
        return int(self.wait(lambda: _ADDRESS.search(self.log.read_bytes()))[1])

    def wait_ready(self) -> None:
        self.wait(lambda: self.get("/ready")[0] == 200)

    def check(self, in_time: bool) -> None:
        assert in_time and self.process.poll() is None, self.said()

    def said(self) -> str:
        """Its log so far."""
        return self.log.read_text(errors="replace")

    def workers(self) -> list[int]:
        """Process ids of the daemon's workers."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in children.read_text().split()]

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Ends the process and leaves its folder; its status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(START_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"the daemon does not end: {self.said()}") from None

    def close(self) -> None:
        """Ends it, whatever state it is in; idempotent."""
        try:
            self.stop()
        finally:
            if self in Daemon.running:
                Daemon.running.remove(self)
            if self._own_folder:
                shutil.rmtree(self.folder, ignore_errors=True)

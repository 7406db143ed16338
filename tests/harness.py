"""The real daemon as a process, on the embedded model or on random weights."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

START_SECONDS = 120
_ADDRESS = re.compile(rb"http://127\.0\.0\.1:(\d+)")


def checked_output(
    command: list[str], environment: dict[str, str], folder: Path, seconds: float = 240
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

    def __init__(self, path: Path, timeout: float = 60) -> None:
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
            else http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
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


class Daemon(Server):
    """`quantd serve ARGUMENTS` on a free port and a socket in `folder`, by default a new one."""

    def __init__(
        self,
        *arguments: str,
        wait_ready: bool = True,
        folder: Path | None = None,
        max_files: int | None = None,
    ) -> None:
        """`max_files`: its soft limit of open files."""
        self.folder = folder or Path(tempfile.mkdtemp(prefix="quantd-test-"))
        self.socket = self.folder / "quantd.sock"
        self.log = self.folder / "log"
        listen = ["--port", "0", "--socket", str(self.socket)]
        if not any(argument.startswith("--store-path") for argument in arguments):
            listen += ["--store-path", str(self.folder / "state")]
        command = [sys.executable, "-m", "quantd.daemon", "serve", *arguments, *listen]
        if max_files is not None:
            command = ["prlimit", f"--nofile={max_files}:", *command]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
            )
        super().__init__(self._wait_for_port(), self.socket)
        if wait_ready:
            self.wait_ready()

    def _wait_for_port(self) -> int:
        return int(self.wait(lambda: _ADDRESS.search(self.log.read_bytes()))[1])

    def wait_ready(self) -> None:
        self.wait(lambda: self.get("/ready")[0] == 200)

    def check(self, in_time: bool) -> None:
        assert in_time and self.process.poll() is None, self.log.read_text(errors="replace")

    def workers(self) -> list[int]:
        """Process ids of the daemon's workers."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in children.read_text().split()]

    def stop(self, number: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise

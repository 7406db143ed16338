"""Sockets that the service manager made: the first connection starts the daemon, a stop lets
requests finish, and a restart loses no connection. Workers are of plain Python."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from harness import UnixConnection
from peers import free_port

FAKE = Path(__file__).parents[1] / "fixtures/fake_daemon.py"
QUESTION = json.dumps({"model": "stuck", "prompt": "a", "max_tokens": 8, "stream": True})


@pytest.fixture
def folder() -> Iterator[Path]:
    """Short, because a socket's path must be."""
    with tempfile.TemporaryDirectory(prefix="quantd-") as name:
        path = Path(name)
        (path / "config.toml").write_text(
            "[models.stuck]\npath = 'stuck'\n[server]\nport = 1\nsocket = '/nowhere/q.sock'\n"
        )
        yield path


@pytest.fixture
def sockets(folder: Path) -> Iterator[tuple[socket.socket, socket.socket]]:
    """What a service manager holds: a Unix and a TCP socket that listen."""
    with socket.socket(socket.AF_UNIX) as unix, socket.socket(socket.AF_INET) as tcp:
        unix.bind(str(folder / "q.sock"))
        tcp.bind(("127.0.0.1", 0))
        unix.listen()
        tcp.listen()
        yield unix, tcp


def command(folder: Path) -> list[str]:
    return [sys.executable, str(FAKE), "serve", "--config", str(folder / "config.toml")]


class Instance:
    """A daemon that was started with sockets; its log is a pipe."""

    def __init__(self, arguments: list[str], fds: tuple[int, ...] = ()) -> None:
        reading, writing = os.pipe()
        self.process = subprocess.Popen(
            arguments, stdin=subprocess.DEVNULL, stderr=writing, pass_fds=fds
        )
        os.close(writing)
        self._log = open(reading)

    def until(self, wanted: str) -> str:
        return next(line for line in self._log if wanted in line)

    def wait(self) -> int:
        try:
            return self.process.wait(240)
        finally:
            self._log.close()

    def end(self) -> int:
        self.process.terminate()
        return self.wait()


def start(folder: Path, sockets: tuple[socket.socket, ...]) -> Instance:
    """As systemd starts it: descriptors from 3 up, and $LISTEN_PID is the daemon's own."""
    numbers = [sock.fileno() for sock in sockets]
    moves = " ".join(f"{3 + i}<&{fd}" for i, fd in enumerate(numbers))
    script = f'export LISTEN_PID=$$ LISTEN_FDS={len(numbers)} LISTEN_FDNAMES=a:b; exec "$@" {moves}'
    return Instance(["bash", "-c", script, "bash", *command(folder)], tuple(numbers))


def ask(connection: http.client.HTTPConnection) -> http.client.HTTPResponse:
    connection.request("POST", "/v1/completions", QUESTION, {"Content-Type": "application/json"})
    return connection.getresponse()


def said(answer: http.client.HTTPResponse, length: int) -> str:
    """The stream's text, as soon as it is so long."""
    text = ""
    while len(text) < length:
        line = answer.readline()
        if line.startswith(b"data: {"):
            text += json.loads(line[6:])["choices"][0]["text"]
    return text


def status(connection: http.client.HTTPConnection) -> int:
    with closing(connection):
        connection.request("GET", "/health")
        return connection.getresponse().status


@pytest.mark.systemd
@pytest.mark.skipif(
    shutil.which("systemd-socket-activate") is None, reason="no systemd-socket-activate"
)
def test_the_first_connection_starts_it(folder: Path) -> None:
    port = free_port()
    path = folder / "q.sock"
    activate = ["systemd-socket-activate", "-l", str(path), "-l", f"127.0.0.1:{port}"]
    daemon = Instance([*activate, "--fdname=unix:http", *command(folder)])
    try:
        daemon.until("Listening on")
        daemon.until(f"127.0.0.1:{port}")
        program = Path(f"/proc/{daemon.process.pid}/exe")
        assert program.resolve().name == "systemd-socket-activate"
        assert status(UnixConnection(path)) == 200
        assert program.resolve() == Path(sys.executable).resolve(), "it became the daemon"
        assert status(http.client.HTTPConnection("127.0.0.1", port)) == 200
        line = daemon.until("listening on")
        assert f"{path} and http://127.0.0.1:{port}" in line, "the configured ones are not used"
    finally:
        assert daemon.end() == 0
    assert path.exists(), "the file is the service manager's"


def test_a_restart_finishes_the_old_and_loses_nothing_new(
    folder: Path, sockets: tuple[socket.socket, socket.socket]
) -> None:
    path = folder / "q.sock"
    first = start(folder, sockets)
    first.until("listening on")
    with closing(UnixConnection(path)) as early:
        answer = ask(early)
        # It stands still by then: what comes before that would not make it go on.
        assert len(said(answer, 3)) == 3, "the answer has begun"

        first.process.terminate()
        first.until("stopping")
        port = sockets[1].getsockname()[1]
        late = [UnixConnection(path), http.client.HTTPConnection("127.0.0.1", port)]
        for connection in late:
            connection.request("GET", "/health")
        os.kill(first.process.pid, signal.SIGUSR1)
        rest = answer.read()
        assert b'"finish_reason":"length"' in rest and rest.endswith(b"data: [DONE]\n\n")
        assert first.wait() == 0

    second = start(folder, sockets)
    for connection in late:
        with closing(connection):
            assert connection.getresponse().status == 200
    assert second.end() == 0


def test_only_what_is_passed_is_used(
    folder: Path, sockets: tuple[socket.socket, socket.socket]
) -> None:
    daemon = start(folder, sockets[:1])
    line = daemon.until("listening on")
    assert str(folder / "q.sock") in line and "http" not in line
    assert status(UnixConnection(folder / "q.sock")) == 200
    assert daemon.end() == 0


def test_a_descriptor_that_is_no_listener_is_refused(folder: Path) -> None:
    one, two = socket.socketpair()
    with one, two:
        daemon = start(folder, (one,))
        assert "is not a listening stream socket" in daemon.until("quantd:")
        assert daemon.wait() == 2

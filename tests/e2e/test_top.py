"""`quantd top` on a real terminal's other end, against a real daemon."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable

import pytest
from harness import Daemon


class Terminal:
    """`quantd top` on a pseudo-terminal."""

    def __init__(self, daemon: Daemon, columns: int = 100, rows: int = 20) -> None:
        self.master, slave = pty.openpty()
        self.resize(columns, rows, tell=False)
        self.modes = termios.tcgetattr(slave)
        command = [sys.executable, "-m", "quantd.daemon", "top", "--interval", "0.2"]
        self.process = subprocess.Popen(
            [*command, "--socket", str(daemon.socket)],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
        )
        self.slave = slave
        self.seen = b""

    def resize(self, columns: int, rows: int, *, tell: bool = True) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        if tell:
            self.process.send_signal(signal.SIGWINCH)

    def read_until(self, wanted: bytes) -> bytes:
        """What was shown up to `wanted`, since the last call."""
        deadline = time.monotonic() + 240
        while wanted not in self.seen:
            assert time.monotonic() < deadline, self.seen
            if select.select([self.master], [], [], 0.1)[0]:
                self.seen += os.read(self.master, 65536)
        shown, _, self.seen = self.seen.partition(wanted)
        return shown

    def type(self, keys: bytes) -> None:
        os.write(self.master, keys)

    def ended(self) -> int:
        """Its status; the terminal must be what it was."""
        self.read_until(b"\x1b[?25h\x1b[?1049l")
        status = self.process.wait(240)
        assert termios.tcgetattr(self.slave) == self.modes
        return status


@pytest.mark.parametrize("keys", [b"q", b"\x04"])
def test_it_shows_follows_the_size_and_quits(demo: Daemon, keys: bytes) -> None:
    terminal = Terminal(demo)
    terminal.read_until(b"\x1b[?1049h")
    terminal.read_until(b"demo  ready  running 0  waiting 0")
    terminal.read_until(b"prefix hits")
    terminal.resize(12, 2)
    terminal.read_until("… ".encode())
    terminal.resize(100, 20)
    terminal.read_until(b"prefix hits")
    terminal.type(keys)
    assert terminal.ended() == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_cleanly(demo: Daemon, number: int) -> None:
    terminal = Terminal(demo)
    terminal.read_until(b"prefix hits")
    terminal.process.send_signal(number)
    assert terminal.ended() == 0


def test_a_daemon_that_goes_away_is_one_line(serve: Callable[..., Daemon]) -> None:
    daemon = serve("demo")
    terminal = Terminal(daemon)
    terminal.read_until(b"prefix hits")
    daemon.process.kill()
    daemon.process.wait()
    assert terminal.ended() == 1
    terminal.read_until(b"cannot reach a daemon at")


def test_a_daemon_that_hangs_does_not_keep_the_terminal(serve: Callable[..., Daemon]) -> None:
    daemon = serve("demo")
    terminal = Terminal(daemon)
    terminal.read_until(b"prefix hits")
    daemon.process.send_signal(signal.SIGSTOP)
    try:
        assert terminal.ended() == 1
        terminal.read_until(b"timed out")
    finally:
        daemon.process.send_signal(signal.SIGCONT)


def test_once(demo: Daemon) -> None:
    command = [sys.executable, "-m", "quantd.daemon", "top", "--once", "--socket", str(demo.socket)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert text.startswith("demo  ready  running ")
    data = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True).stdout
    assert json.loads(data)["engines"]["demo"]["kv"]["block_bytes"] > 0
    wrong = subprocess.run([*command, "--model", "nope"], capture_output=True, text=True)
    assert wrong.returncode != 0 and "no model is called 'nope'; there are: demo" in wrong.stderr
    plain = subprocess.run(
        [word for word in command if word != "--once"], capture_output=True, text=True
    )
    assert plain.returncode != 0 and "needs a terminal" in plain.stderr

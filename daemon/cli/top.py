"""`quantd top`: a live view of a daemon, on the terminal's other screen."""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import sys
import termios
import time
import tty
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from quantd.daemon.cli import client
from quantd.daemon.cli.top_view import Look, fit, lines
from quantd.daemon.errors import RequestError

_ENTER = "\x1b[?1049h\x1b[?25l"
"""The other screen, without a cursor."""
_LEAVE = "\x1b[?25h\x1b[?1049l"
_PATIENCE = 3.0
"""Seconds."""
_QUIT = frozenset("qQ\x1b\x03\x04")


def run(arguments: argparse.Namespace) -> int:
    # One that hangs must not keep the terminal: no key and no signal is seen while it is asked.
    daemon = replace(client.find(arguments), timeout=_PATIENCE)
    if daemon.path is None:
        raise RequestError("`quantd top` needs the daemon's Unix socket; name it with --socket")
    look = _look(daemon)
    names = [name for model in look.models for name in (model["name"], *model["aliases"])]
    if arguments.model is not None and arguments.model not in names:
        raise RequestError(f"no model is called {arguments.model!r}; there are: {', '.join(names)}")
    if arguments.once:
        if arguments.json:
            print(json.dumps(look.as_json(), indent=2))
        else:
            print("\n".join(lines(look, None, arguments.model)))
        return 0
    if arguments.json:
        raise RequestError("--json needs --once")
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise RequestError("`quantd top` needs a terminal; use --once")
    with _terminal() as wake:
        return _watch(daemon, arguments.model, arguments.interval, wake)


def _look(daemon: client.Target) -> Look:
    engines: dict[str, dict[str, Any]] = daemon.get("/admin/state")["engines"]
    return Look(time.monotonic(), daemon.get("/admin/models")["models"], engines)


def _watch(daemon: client.Target, model: str | None, interval: float, wake: int) -> int:
    """Until a key or a signal ends it, or the daemon is gone: then ClientError says so."""
    before: Look | None = None
    look = _look(daemon)
    while True:
        _draw(lines(look, before, model))
        due = look.at + interval
        while (left := due - time.monotonic()) > 0:
            ready, _, _ = select.select([sys.stdin, wake], [], [], left)
            if wake in ready:
                if any(number != signal.SIGWINCH for number in os.read(wake, 64)):
                    return 0
                _draw(lines(look, before, model))
            if sys.stdin in ready:
                typed = os.read(sys.stdin.fileno(), 64).decode(errors="replace")
                if not typed or not _QUIT.isdisjoint(typed):
                    return 0
        before, look = look, _look(daemon)


def _draw(text: list[str]) -> None:
    columns, rows = os.get_terminal_size(sys.stdout.fileno())
    # Each line is cleared behind its end, so nothing flickers and nothing old is left.
    body = "\r\n".join(line + "\x1b[K" for line in fit(text, columns, rows))
    sys.stdout.write("\x1b[H" + body + "\x1b[J")
    sys.stdout.flush()


@contextmanager
def _terminal() -> Iterator[int]:
    """The other screen, keys as they are typed; gives a descriptor that signals arrive at.

    Whatever happens, the terminal is afterwards what it was before.
    """
    stdin = sys.stdin.fileno()
    modes = termios.tcgetattr(stdin)
    read_end, write_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    numbers = (signal.SIGWINCH, signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    former = [signal.signal(number, lambda *_: None) for number in numbers]
    former_wake = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    try:
        tty.setcbreak(stdin)
        sys.stdout.write(_ENTER)
        sys.stdout.flush()
        yield read_end
    finally:
        sys.stdout.write(_LEAVE)
        sys.stdout.flush()
        termios.tcsetattr(stdin, termios.TCSADRAIN, modes)
        signal.set_wakeup_fd(former_wake)
        for number, handler in zip(numbers, former, strict=True):
            signal.signal(number, handler)
        os.close(read_end)
        os.close(write_end)

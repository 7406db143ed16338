"""What moves on a terminal: one last line that log lines push down."""

from __future__ import annotations

import os
import sys
import threading
from types import TracebackType
from typing import Self, TextIO

_FRAMES = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
_FRAME_SECONDS = 0.1
_BAR_CELLS = 24


class LastLine:
    """A text stream to a terminal, with a line of its own kept below all that is written."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._line = ""

    def show(self, line: str) -> None:
        """Replaces the last line; "" takes it away. It is cut at the terminal's width."""
        line = line[: max(_width(self._stream) - 1, 0)]
        if line != self._line:
            self._line = line
            self._put("\r\x1b[K" + line)

    def write(self, text: str) -> int:
        self._put(f"\r\x1b[K{text}{self._line}" if self._line else text)
        return len(text)

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    def flush(self) -> None:
        self._stream.flush()

    def _put(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def bar(fraction: float) -> str:
    """A bar for a fraction in [0, 1]."""
    done = round(min(max(fraction, 0.0), 1.0) * _BAR_CELLS)
    return "█" * done + "░" * (_BAR_CELLS - done)


class Spinner:
    """Shows that something goes on, on stderr if that is a terminal; a context manager."""

    def __init__(self, text: str) -> None:
        self.text = text
        """May be set while it turns."""
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            self._thread = threading.Thread(target=self._turn, daemon=True)
            self._thread.start()
        return self

    def stop(self) -> None:
        """Takes it away; idempotent."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.stop()

    def _turn(self) -> None:
        line = LastLine(sys.stderr)
        turn = 0
        while not self._stop.wait(_FRAME_SECONDS):
            line.show(f"{_FRAMES[turn % len(_FRAMES)]} {self.text}")
            turn += 1
        line.show("")


def table(rows: list[list[str]]) -> str:
    """Columns aligned to the left, two spaces apart."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def size(num_bytes: float) -> str:
    """1.5 GiB"""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"


def _width(stream: TextIO) -> int:
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):
        return 80

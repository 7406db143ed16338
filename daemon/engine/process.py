"""One worker process as the engine sees it: its pid, its end, its last words."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import structlog

_log = structlog.get_logger("quantd.worker")

_MAX_LINE_BYTES = 4096
_NUM_LAST_LINES = 20

_SPIN_VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


def worker_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """`environ`, in which torch's OpenMP threads look for work for some tens of microseconds and
    then sleep, unless it says how long. By default they look for milliseconds after every
    operation, on the cores that the kernels' own threads need by then (docs/decisions/0012).
    """
    if any(name in environ for name in _SPIN_VARIABLES):
        return dict(environ)
    return {**environ, "GOMP_SPINCOUNT": "1000"}


class WorkerProcess:
    """A child process that is reaped for certain and never outlives this one.

    Event loop only. Not asyncio's subprocess: that needs a thread per child on Python 3.11, or
    libuv's SIGCHLD handler under uvloop; a pidfd in the loop is the same few lines for both.
    The kernel ties the worker's PR_SET_PDEATHSIG to the *thread* that forks, so `spawn` must be
    called in a thread that lives as long as the daemon: the event loop's.
    """

    def __init__(self, popen: subprocess.Popen[bytes], output: _OutputLines) -> None:
        self._popen = popen
        self._output = output
        self._loop = asyncio.get_running_loop()
        self.exited: asyncio.Future[str] = self._loop.create_future()
        """How it ended: "was killed by signal 9 (SIGKILL)" or "exited with status 1". Set once,
        after the child is reaped."""
        self._pidfd = os.pidfd_open(popen.pid)
        self._loop.add_reader(self._pidfd, self._on_exit)

    @classmethod
    async def spawn(cls, command: Sequence[str], name: str, fd: int) -> WorkerProcess:
        """Starts `command --fd <fd> --parent <our pid>`; the caller closes its own `fd` after.

        What it writes to stdout and stderr becomes log lines of the model `name`. Own process
        group: a Ctrl-C at the terminal is for the daemon, which then drains. Raises OSError.
        """
        output, output_fd = await _open_output(name)
        try:
            popen = subprocess.Popen(
                [*command, "--fd", str(fd), "--parent", str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=output_fd,
                stderr=output_fd,
                pass_fds=(fd,),
                process_group=0,
                env=worker_environment(os.environ),
            )
        finally:
            os.close(output_fd)
        return cls(popen, output)

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def last_lines(self) -> list[str]:
        """The last lines that it wrote to stdout or stderr."""
        return list(self._output.last_lines)

    @property
    def output_closed(self) -> asyncio.Future[None]:
        """Done when every line has been read. A grandchild that keeps stderr open can delay it."""
        return self._output.closed

    def kill(self) -> None:
        """SIGKILL; `exited` follows. No effect once it has ended."""
        if not self.exited.done():
            self._popen.kill()

    def _on_exit(self) -> None:
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self.exited.set_result(_describe(self._popen.wait()))


def _describe(returncode: int) -> str:
    if returncode >= 0:
        return f"exited with status {returncode}"
    try:
        name = signal.Signals(-returncode).name
    except ValueError:
        name = "unknown"
    return f"was killed by signal {-returncode} ({name})"


class _OutputLines(asyncio.Protocol):
    """Turns the bytes of a pipe into log lines. A line over the bound is cut into several."""

    def __init__(self, name: str, closed: asyncio.Future[None]) -> None:
        self._name = name
        self._pending = b""
        self.closed = closed
        self.last_lines: deque[str] = deque(maxlen=_NUM_LAST_LINES)

    def data_received(self, data: bytes) -> None:
        *lines, self._pending = (self._pending + data).split(b"\n")
        for line in lines:
            self._emit(line)
        if len(self._pending) > _MAX_LINE_BYTES:
            self._emit(self._pending)
            self._pending = b""

    def connection_lost(self, exc: Exception | None) -> None:
        self._emit(self._pending)
        self._pending = b""
        if not self.closed.done():
            self.closed.set_result(None)

    def _emit(self, line: bytes) -> None:
        for start in range(0, len(line), _MAX_LINE_BYTES):
            text = line[start : start + _MAX_LINE_BYTES].decode(errors="replace").rstrip()
            if text:
                self.last_lines.append(text)
                _log.info("worker", model=self._name, line=text)


async def _open_output(name: str) -> tuple[_OutputLines, int]:
    """A pipe whose lines go to the log; returns the reader and the descriptor to write to."""
    loop = asyncio.get_running_loop()
    read_fd, write_fd = os.pipe()
    pipe: Any = os.fdopen(read_fd, "rb", buffering=0)
    output = _OutputLines(name, loop.create_future())
    try:
        await loop.connect_read_pipe(lambda: output, pipe)
    except BaseException:
        os.close(write_fd)
        # uvloop has closed the descriptor itself when it was cancelled; an error from here would
        # take the cancellation's place, and the model would be started again.
        with suppress(OSError):
            pipe.close()
        raise
    return output, write_fd

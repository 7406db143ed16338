"""The worker process: read a plan, run it, reply. `python -m quantd.daemon.worker.main --fd N`.

Life of a worker: the engine starts it with one end of a socket pair and sends `LoadModel`; the
worker answers with progress and `ModelInfo`, then with one `StepResult` per `StepPlan`, in their
order. It ends when the engine closes the wire (status 0), when anything fails (a `WorkerFailed`
frame, status 1), or together with the daemon, by the kernel's hand. It sleeps in `recv` between
plans; only while a step is under way on a device does it look at both, the wire and the step.

Nothing here imports torch until the model is named, so that the first sign of life is quick.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import logging
import os
import signal
import socket
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Protocol

from quantd.daemon.frames import FrameError, FrameSocket
from quantd.daemon.types import (
    CompileGrammar,
    DiskDone,
    DiskIndex,
    GrammarCompiled,
    LoadModel,
    LoadProgress,
    ModelInfo,
    ReleaseMemory,
    StepPlan,
    StepResult,
    TokenTable,
    ToWorker,
    WorkerFailed,
)

_log = logging.getLogger("quantd.worker")

_PROGRESS_SECONDS = 0.1

_LOOK_SECONDS = 50e-6
"""Between two looks at the wire and at a step under way. The wait of `poll` counts milliseconds,
which a step of a small model does not take."""

# <linux/prctl.h>
_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15

OnProgress = Callable[[LoadProgress], None]
Send = Callable[[StepResult], None]


class StepRunner(Protocol):
    """What the loop needs of a runner. All calls are made from one thread."""

    @property
    def info(self) -> ModelInfo: ...

    @property
    def is_under_way(self) -> bool:
        """A plan's result is still to come, by `poll` or by the next `submit`."""
        ...

    def submit(self, plan: StepPlan, send: Send) -> None:
        """Runs a plan, or begins to. Results are sent as they come, in the order of the plans.
        Whatever it raises is a bug or a broken machine: the mirror is then no longer that of the
        scheduler, and the worker has to end."""
        ...

    def poll(self, send: Send) -> None:
        """Sends the result of what is under way if it has ended. Does not wait."""
        ...

    def release_memory(self, blocks: Sequence[tuple[int, int]]) -> None:
        """The bytes of these ranges of blocks are needed by no plan to come."""
        ...

    def open_disk(self, send: Callable[[DiskDone | DiskIndex], None]) -> None:
        """Begins to serve the disk tier, if there is one; `send` is called from its thread."""
        ...

    def set_tokens(self, table: TokenTable) -> None: ...

    def compile_grammar(
        self, message: CompileGrammar, send: Callable[[GrammarCompiled], None]
    ) -> None:
        """Begins to make it ready; `send` is called from a thread of its own."""
        ...


class AtOnce(ABC):
    """A runner whose steps have ended when `submit` returns."""

    is_under_way = False

    @abstractmethod
    def execute(self, plan: StepPlan) -> StepResult:
        """As `StepRunner.submit`."""

    def submit(self, plan: StepPlan, send: Send) -> None:
        send(self.execute(plan))

    def poll(self, send: Send) -> None:
        raise AssertionError("nothing is under way")


MakeRunner = Callable[[LoadModel, OnProgress], StepRunner]


def main(argv: Sequence[str] | None = None, make_runner: MakeRunner | None = None) -> int:
    """Serves one model until the wire closes; returns the exit status."""
    parser = argparse.ArgumentParser(prog="quantd-worker")
    parser.add_argument("--fd", type=int, required=True, help="connected socket to the engine")
    parser.add_argument("--parent", type=int, required=True, help="process id of the engine")
    arguments = parser.parse_args(argv)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(levelname)s %(message)s")
    if not _belong_to(arguments.parent):
        return 0
    # Not for processes that the worker starts: an open copy would hide its end from the engine.
    os.set_inheritable(arguments.fd, False)
    with socket.socket(fileno=arguments.fd) as sock:
        return serve(FrameSocket(sock, ToWorker), make_runner or _make_runner)


def serve(wire: FrameSocket[ToWorker], make_runner: MakeRunner) -> int:
    """The frame loop. Whatever goes wrong is told to the engine, once, as the last frame."""
    try:
        load = wire.receive()
        if load is None:
            return 0
        if not isinstance(load, LoadModel):
            raise FrameError(f"a {type(load).__name__} came before the model's name")
        runner = make_runner(load, _Reporter(wire.send))
        wire.send(runner.info)
        runner.open_disk(wire.send)
        while (message := _next(wire, runner)) is not None:
            if isinstance(message, StepPlan):
                runner.submit(message, wire.send)
            elif isinstance(message, ReleaseMemory):
                runner.release_memory(message.blocks)
            elif isinstance(message, TokenTable):
                runner.set_tokens(message)
            elif isinstance(message, CompileGrammar):
                runner.compile_grammar(message, wire.send)
            else:
                raise FrameError(f"a {type(message).__name__} came out of turn")
        return 0
    except (BrokenPipeError, ConnectionResetError):
        return 0  # the engine left while we were talking
    except Exception as error:
        _report(wire, error)
        return 1


def _next(wire: FrameSocket[ToWorker], runner: StepRunner) -> ToWorker | None:
    """Waits for the next message; a result that comes before it goes out meanwhile."""
    while runner.is_under_way and not wire.is_readable():
        runner.poll(wire.send)
        if runner.is_under_way:
            time.sleep(_LOOK_SECONDS)
    return wire.receive()


def _report(wire: FrameSocket[ToWorker], error: Exception) -> None:
    refused = _is_refusal(error)
    if refused:
        reason = str(error)
    else:
        _log.exception("the worker fails")
        reason = f"{type(error).__name__}: {error}"
    try:
        wire.send(WorkerFailed(reason, refused=refused))
    except OSError:
        _log.error("the engine is gone and cannot be told: %s", reason)


def _is_refusal(error: Exception) -> bool:
    # Whoever raised it has imported it. Importing it here would need torch, and that torch does
    # not load is one of the errors to report.
    api = sys.modules.get("quantd.plugins.api")
    return api is not None and isinstance(error, api.Refused)


class _Reporter:
    """Passes on progress: each stage's first and last, and a few per second in between."""

    def __init__(self, send: OnProgress, clock: Callable[[], float] = time.monotonic) -> None:
        self._send = send
        self._clock = clock
        self._stage = ""
        self._next = 0.0

    def __call__(self, progress: LoadProgress) -> None:
        now = self._clock()
        is_last = progress.done_bytes >= progress.total_bytes
        if progress.stage == self._stage and now < self._next and not is_last:
            return
        self._stage = progress.stage
        self._next = now + _PROGRESS_SECONDS
        self._send(progress)


def _make_runner(load: LoadModel, on_progress: OnProgress) -> StepRunner:
    on_progress(LoadProgress("importing", 0, 0))
    # What is imported and loaded stays until the process ends. Python's collector would look
    # through it again and again while it grows, and for a tenth of a second between two steps.
    gc.disable()
    from quantd.daemon.worker.pooled_runner import open_runner

    runner = open_runner(load, on_progress)
    gc.freeze()
    gc.enable()
    return runner


def _belong_to(parent: int) -> bool:
    """Ties this process to its parent's life; False when the parent is dead already."""
    libc = ctypes.CDLL(None, use_errno=True)
    name = ctypes.c_char_p(b"quantd-worker")
    libc.prctl(_PR_SET_NAME, name, 0, 0, 0)
    if libc.prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl(PR_SET_PDEATHSIG): {os.strerror(number)}")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The parent may have died between fork and prctl; then no signal will come.
    return os.getppid() == parent


if __name__ == "__main__":
    status = main()
    # Not sys.exit: taking down the interpreter with a model in it takes seconds and may crash,
    # and the kernel frees everything as well.
    logging.shutdown()
    sys.stdout.flush()
    os._exit(status)

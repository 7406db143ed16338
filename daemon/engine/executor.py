"""Runs step plans in a worker process; the only place that knows there is a process."""

from __future__ import annotations

import asyncio
import itertools
import socket
import sys
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol, cast

from quantd.daemon.engine.process import WorkerProcess
from quantd.daemon.errors import ModelRefused, Unavailable
from quantd.daemon.frames import FrameDecoder, FrameEncoder, FrameError
from quantd.daemon.types import (
    CompileGrammar,
    DiskDone,
    DiskIndex,
    FromWorker,
    Grammar,
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

# -P keeps the working directory off sys.path; a crash in native code leaves its stack in the log.
WORKER_COMMAND = (sys.executable, "-P", "-X", "faulthandler", "-m", "quantd.daemon.worker.main")

_EXIT_SECONDS = 3.0
"""How long a worker that has been told to end, or says that it ends, may take to do so."""

_LAST_WORDS_SECONDS = 1.0
"""How long frames and lines may still be read from a worker that has ended."""

OnProgress = Callable[[LoadProgress], None]
OnDisk = Callable[[DiskDone | DiskIndex], None]


class Executor(Protocol):
    """Runs plans in the order in which they are given."""

    @property
    def died(self) -> asyncio.Future[str]:
        """Done, with the reason, when no plan can run any more."""
        ...

    def execute(self, plan: StepPlan) -> asyncio.Future[StepResult]:
        """The plan is on its way when this returns; await for its result.

        Raises `Unavailable`, at once or when awaited, when the worker is gone.
        """
        ...

    @property
    def on_disk(self) -> OnDisk | None:
        """Where the disk tier's news go; what came before it was set comes then."""
        ...

    @on_disk.setter
    def on_disk(self, listener: OnDisk | None) -> None: ...

    def release_memory(self, blocks: Sequence[tuple[int, int]]) -> None:
        """Tells the worker that nobody needs the bytes of these ranges of blocks."""
        ...

    async def close(self) -> None:
        """Ends the worker; idempotent. Plans that are still running raise `Unavailable`."""
        ...


class WorkerExecutor:
    """An `Executor` over one worker process. Event loop only."""

    def __init__(self, process: WorkerProcess, wire: _Wire, name: str) -> None:
        """Use `start`."""
        loop = asyncio.get_running_loop()
        self._process = process
        self._wire = wire
        self._name = name
        self._outstanding: deque[tuple[int, asyncio.Future[StepResult]]] = deque()
        self._compiling: dict[int, asyncio.Future[str | None]] = {}
        self._numbers = itertools.count(1)
        self._loaded: asyncio.Future[ModelInfo] = loop.create_future()
        self._failure: tuple[type[Unavailable], str] | None = None
        self._died: asyncio.Future[str] = loop.create_future()
        self._watcher = loop.create_task(self._watch())
        self._on_disk: OnDisk | None = None
        self._early: list[DiskDone | DiskIndex] = []
        """What came before anybody listened."""

    @classmethod
    async def start(
        cls,
        load: LoadModel,
        on_progress: OnProgress,
        command: Sequence[str] = WORKER_COMMAND,
    ) -> WorkerExecutor:
        """Returns when the model is in memory. Raises `ModelRefused` when the checkpoint is not
        understood, else `Unavailable`. No process is left behind, also when cancelled."""
        wire = _Wire()
        try:
            process = await _spawn(command, load.name, wire)
        except OSError as error:
            wire.abort()
            reason = f"the worker of model {load.name!r} could not be started: {error}"
            raise Unavailable(reason) from error
        # From here to `listen` nothing is awaited, so nothing that the worker says is missed.
        executor = cls(process, wire, load.name)
        wire.listen(partial(executor._on_message, on_progress), executor._on_garbage)
        try:
            wire.send(load)
            await asyncio.shield(executor._loaded)
        except BaseException:
            process.kill()
            await asyncio.shield(executor._died)
            raise
        return executor

    @property
    def info(self) -> ModelInfo:
        return self._loaded.result()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def died(self) -> asyncio.Future[str]:
        """Why the worker is gone, also after `close`. All its plans have failed by then, and the
        process is reaped."""
        return self._died

    @property
    def on_disk(self) -> OnDisk | None:
        return self._on_disk

    @on_disk.setter
    def on_disk(self, listener: OnDisk | None) -> None:
        self._on_disk = listener
        early, self._early = self._early, []
        if listener is not None:
            for message in early:
                listener(message)

    def set_tokens(self, table: TokenTable) -> None:
        """What grammars need to know of the tokenizer; once, before the first of them. No effect
        when the worker is gone."""
        if self._failure is None:
            self._wire.send(table)

    def compile(self, grammar: Grammar) -> asyncio.Future[str | None]:
        """Has the worker make it ready beside its steps; the result is why it cannot be used, or
        None. Raises `Unavailable`, at once or when awaited, when the worker is gone."""
        if self._failure is not None:
            kind, reason = self._failure
            raise kind(reason)
        number = next(self._numbers)
        future: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        self._compiling[number] = future
        self._wire.send(CompileGrammar(number, grammar))
        return future

    def release_memory(self, blocks: Sequence[tuple[int, int]]) -> None:
        """See `Executor`. No effect when the worker is gone."""
        if self._failure is None and blocks:
            self._wire.send(ReleaseMemory(tuple(blocks)))

    def execute(self, plan: StepPlan) -> asyncio.Future[StepResult]:
        """See `Executor`. Several plans may be outstanding; they answer in order."""
        if self._failure is not None:
            kind, reason = self._failure
            raise kind(reason)
        future: asyncio.Future[StepResult] = asyncio.get_running_loop().create_future()
        self._wire.send(plan)
        self._outstanding.append((plan.step, future))
        return future

    async def close(self) -> None:
        """Closes the wire, at which the worker exits; it is killed when it does not in time."""
        self._fail(Unavailable, f"model {self._name!r} was unloaded")
        self._wire.abort()
        await asyncio.shield(self._died)

    def _on_message(self, on_progress: OnProgress, message: FromWorker) -> None:
        if self._failure is not None:
            return
        if isinstance(message, StepResult) and self._outstanding:
            step, future = self._outstanding.popleft()
            if step != message.step:
                self._outstanding.appendleft((step, future))
                raise FrameError(f"the result of step {message.step} came for step {step}")
            if not future.done():
                future.set_result(message)
        elif isinstance(message, GrammarCompiled) and message.id in self._compiling:
            compiled = self._compiling.pop(message.id)
            if not compiled.done():
                compiled.set_result(message.error)
        elif isinstance(message, DiskDone | DiskIndex) and self._loaded.done():
            if self._on_disk is None:
                self._early.append(message)
            else:
                self._on_disk(message)
        elif isinstance(message, LoadProgress) and not self._loaded.done():
            on_progress(message)
        elif isinstance(message, ModelInfo) and not self._loaded.done():
            self._loaded.set_result(message)
        elif isinstance(message, WorkerFailed):
            doing = "failed" if self._loaded.done() else "could not be loaded"
            kind = ModelRefused if message.refused else Unavailable
            self._fail(kind, f"model {self._name!r} {doing}: {message.reason}")
        else:
            raise FrameError(f"a {type(message).__name__} came out of turn")

    def _on_garbage(self, error: FrameError) -> None:
        """There is no way back to the start of a frame, so the worker must end."""
        self._fail(Unavailable, f"the worker of model {self._name!r} broke the protocol: {error}")
        self._process.kill()

    def _fail(self, kind: type[Unavailable], reason: str) -> None:
        """All that wait for the worker get this error; the first reason counts. The worker has
        `_EXIT_SECONDS` from here."""
        if self._failure is not None:
            return
        self._failure = kind, reason
        waiting: list[asyncio.Future[Any]] = [self._loaded]
        waiting += [future for _, future in self._outstanding]
        waiting += self._compiling.values()
        self._outstanding.clear()
        self._compiling.clear()
        for future in waiting:
            if not future.done():
                future.set_exception(kind(reason))
                future.exception()  # no warning when nobody waits any more
        asyncio.get_running_loop().call_later(_EXIT_SECONDS, self._process.kill)

    async def _watch(self) -> None:
        """Sees the process end, takes its last words and reports why."""
        exited, wire_closed = self._process.exited, self._wire.closed
        ends: list[asyncio.Future[Any]] = [exited, wire_closed]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if not exited.done():  # a worker without its wire is of no use, should it live on
            asyncio.get_running_loop().call_later(_EXIT_SECONDS, self._process.kill)
        how = await exited
        last_words = [wire_closed, self._process.output_closed]
        await asyncio.wait(last_words, timeout=_LAST_WORDS_SECONDS)
        self._wire.abort()
        lines = self._process.last_lines
        if how.startswith("exited") and lines:
            how += f"; its last line was: {lines[-1]}"
        self._fail(Unavailable, f"the worker of model {self._name!r} {how}")
        assert self._failure is not None
        self._died.set_result(self._failure[1])


async def _spawn(command: Sequence[str], name: str, wire: _Wire) -> WorkerProcess:
    """Starts the worker with one end of a socket pair, `wire` at the other. Raises OSError."""
    ours, theirs = socket.socketpair()
    with theirs:
        ours.setblocking(False)
        try:
            await asyncio.get_running_loop().create_unix_connection(lambda: wire, sock=ours)
        except BaseException:
            ours.close()
            raise
        return await WorkerProcess.spawn(command, name, theirs.fileno())


class _Wire(asyncio.Protocol):
    """The engine's end of the socket pair: frames in both directions."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._encoder = FrameEncoder()
        self._decoder: FrameDecoder[FromWorker] = FrameDecoder(FromWorker)
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def listen(
        self,
        on_message: Callable[[FromWorker], None],
        on_garbage: Callable[[FrameError], None],
    ) -> None:
        """Where frames go. `on_message` may raise FrameError, which goes to `on_garbage` too."""
        self._on_message = on_message
        self._on_garbage = on_garbage

    def send(self, message: ToWorker) -> None:
        """Raises FrameError when it is too long to send."""
        frame = self._encoder.encode(message)
        if self._transport is not None:
            self._transport.write(frame)

    def abort(self) -> None:
        """Closes our end now; idempotent."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        try:
            for message in self._decoder.feed(data):
                self._on_message(message)
        except FrameError as error:
            self._on_garbage(error)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if not self.closed.done():
            self.closed.set_result(None)

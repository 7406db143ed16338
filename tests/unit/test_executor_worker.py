"""The worker's side of the wire, without torch: the frame loop, and whose life it shares."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from fakes import FakeWorker, ManualClock, model_info

from quantd.daemon.engine.process import worker_environment
from quantd.daemon.frames import FrameSocket
from quantd.daemon.types import (
    Chunk,
    CompileGrammar,
    DiskDone,
    DiskIndex,
    FromWorker,
    Grammar,
    GrammarCompiled,
    LoadModel,
    LoadProgress,
    ModelInfo,
    NewSequence,
    SamplingParams,
    StepPlan,
    StepResult,
    TokenTable,
    ToWorker,
    WorkerFailed,
)
from quantd.daemon.worker.main import (
    AtOnce,
    MakeRunner,
    OnProgress,
    Send,
    StepRunner,
    _Reporter,
    serve,
)

STUCK_WORKER = str(Path(__file__).parents[1] / "fixtures" / "stuck_worker.py")
LOAD = LoadModel("m", "/models/m")
FIRST = StepPlan(
    1, (Chunk(1, 0, 2, (0,), True),), add=(NewSequence(1, (5, 6), 2, SamplingParams(max_tokens=9)),)
)


class Runner(AtOnce):
    """A runner whose model is `FakeWorker`."""

    def __init__(self, error: Exception | None = None) -> None:
        self._worker = FakeWorker()
        self._error = error

    @property
    def info(self) -> ModelInfo:
        return model_info()

    def execute(self, plan: StepPlan) -> StepResult:
        if self._error is not None:
            raise self._error
        return self._worker.run(plan)

    def release_memory(self, blocks: Sequence[tuple[int, int]]) -> None:
        pass

    def set_tokens(self, table: TokenTable) -> None:
        self.table = table

    def compile_grammar(
        self, message: CompileGrammar, send: Callable[[GrammarCompiled], None]
    ) -> None:
        """Refuses what is no token of the table."""
        known = message.grammar.source.encode() in self.table.pieces
        send(GrammarCompiled(message.id, None if known else "unknown"))

    def open_disk(self, send: Callable[[DiskDone | DiskIndex], None]) -> None:
        pass


def make_runner(load: LoadModel, on_progress: OnProgress) -> StepRunner:
    on_progress(LoadProgress("weights", 3, 3))
    return Runner()


def fails_with(error: Exception) -> MakeRunner:
    def make(load: LoadModel, on_progress: OnProgress) -> StepRunner:
        raise error

    return make


Talk = Callable[..., tuple[int, list[FromWorker]]]


@pytest.fixture
def talk() -> Iterator[Talk]:
    """Sends frames, closes our sending side, lets the worker run, and returns what it said."""
    ours, theirs = socket.socketpair()

    def talk(make: MakeRunner, *messages: ToWorker) -> tuple[int, list[FromWorker]]:
        engine: FrameSocket[FromWorker] = FrameSocket(ours, FromWorker)
        for message in messages:
            engine.send(message)
        ours.shutdown(socket.SHUT_WR)
        status = serve(FrameSocket(theirs, ToWorker), make)
        theirs.close()
        answers = []
        while (answer := engine.receive()) is not None:
            answers.append(answer)
        return status, answers

    with ours, theirs:
        yield talk


def test_loads_and_serves_until_the_wire_closes(talk: Talk) -> None:
    status, answers = talk(make_runner, LOAD, FIRST, StepPlan(2, ()), StepPlan(3, (), drop=(1,)))
    assert status == 0
    assert answers[:2] == [LoadProgress("weights", 3, 3), model_info()]
    results = [answer for answer in answers[2:] if isinstance(answer, StepResult)]
    assert [result.step for result in results] == [1, 2, 3]
    assert [len(result.sampled) for result in results] == [1, 0, 0]


class SlowRunner(Runner):
    """A step ends when it was looked at three times, or when the next one begins."""

    def __init__(self) -> None:
        super().__init__()
        self.left: list[StepPlan] = []
        self.looks = 0

    @property
    def is_under_way(self) -> bool:  # type: ignore[override]
        return bool(self.left)

    def submit(self, plan: StepPlan, send: Send) -> None:
        self.left.append(plan)
        self._finish(send, 1)

    def poll(self, send: Send) -> None:
        self.looks += 1
        if self.looks % 3 == 0:
            self._finish(send, 0)

    def _finish(self, send: Send, keep: int) -> None:
        while len(self.left) > keep:
            send(self.execute(self.left.pop(0)))


def test_a_result_goes_out_before_the_next_message_comes() -> None:
    ours, theirs = socket.socketpair()
    runner = SlowRunner()
    engine: FrameSocket[FromWorker] = FrameSocket(ours, FromWorker)
    serving = threading.Thread(
        target=serve, args=(FrameSocket(theirs, ToWorker), lambda load, on_progress: runner)
    )
    with ours, theirs:
        serving.start()
        engine.send(LOAD)
        assert engine.receive() == model_info()
        for step in (1, 2, 3):
            engine.send(StepPlan(step, ()))
            result = engine.receive()
            assert isinstance(result, StepResult) and result.step == step
        assert runner.looks == 9 and not runner.is_under_way
        ours.shutdown(socket.SHUT_WR)
        serving.join()


def test_results_keep_the_order_of_the_plans(talk: Talk) -> None:
    """All plans are there when the first one is read; the last one's result has no reader."""
    plans = [StepPlan(step, ()) for step in range(1, 5)]
    status, answers = talk(lambda load, on_progress: SlowRunner(), LOAD, *plans)
    assert status == 0
    assert [answer.step for answer in answers if isinstance(answer, StepResult)] == [1, 2, 3]


def test_grammars_are_answered_in_between(talk: Talk) -> None:
    table = TokenTable((b"a", b"b"), (), ())
    good, bad = CompileGrammar(5, Grammar("regex", "a")), CompileGrammar(6, Grammar("regex", "c"))
    status, answers = talk(make_runner, LOAD, table, good, FIRST, bad)
    assert status == 0
    assert answers[2] == GrammarCompiled(5)
    assert isinstance(answers[3], StepResult)
    assert answers[4] == GrammarCompiled(6, "unknown")


def test_a_wire_that_closes_at_once_is_no_error(talk: Talk) -> None:
    assert talk(make_runner) == (0, [])


def test_a_failed_load_is_the_last_frame(talk: Talk) -> None:
    status, answers = talk(fails_with(MemoryError("30 GB")), LOAD, FIRST)
    assert (status, answers) == (1, [WorkerFailed("MemoryError: 30 GB")])


def test_a_failed_step_is_the_last_frame(talk: Talk) -> None:
    status, answers = talk(lambda load, on_progress: Runner(KeyError("seq")), LOAD, FIRST)
    assert (status, answers) == (1, [model_info(), WorkerFailed("KeyError: 'seq'")])


def test_a_plan_before_the_model_is_refused(talk: Talk) -> None:
    status, answers = talk(make_runner, FIRST)
    reason = "FrameError: a StepPlan came before the model's name"
    assert (status, answers) == (1, [WorkerFailed(reason)])


def test_a_checkpoint_that_is_not_understood(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    class Api:
        class Refused(Exception):
            pass

    monkeypatch.setitem(sys.modules, "quantd.plugins.api", Api)  # type: ignore[arg-type]
    status, answers = talk(fails_with(Api.Refused("no such architecture")), LOAD)
    assert (status, answers) == (1, [WorkerFailed("no such architecture", refused=True)])


def test_an_engine_that_leaves_is_no_error() -> None:
    ours, theirs = socket.socketpair()

    def leave(load: LoadModel, on_progress: OnProgress) -> StepRunner:
        ours.close()
        on_progress(LoadProgress("weights", 1, 2))
        raise AssertionError("the worker did not notice")

    with theirs:
        FrameSocket[FromWorker](ours, FromWorker).send(LOAD)
        assert serve(FrameSocket(theirs, ToWorker), leave) == 0


def test_progress_is_thinned_out() -> None:
    clock = ManualClock()
    sent: list[LoadProgress] = []
    report = _Reporter(sent.append, clock)
    for done in range(101):
        report(LoadProgress("weights", done, 100))
        clock.advance(0.03)
    report(LoadProgress("caches", 0, 0))
    done_bytes = [progress.done_bytes for progress in sent if progress.stage == "weights"]
    assert done_bytes[0] == 0 and done_bytes[-1] == 100
    assert 20 < len(done_bytes) < 30
    assert sent[-1].stage == "caches"


PARENT = """
import asyncio, sys
from quantd.daemon.engine.executor import WorkerExecutor
from quantd.daemon.types import LoadModel

async def main():
    tell = lambda progress: print(progress.stage, flush=True)
    await WorkerExecutor.start(LoadModel("m", "x"), tell, [sys.executable, sys.argv[1]])

asyncio.run(main())
"""


def test_a_daemon_that_is_killed_takes_a_loading_worker_along() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, STUCK_WORKER], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        pidfd = os.pidfd_open(int(parent.stdout.readline()))
        try:
            assert Path(f"/proc/{parent.pid}").exists()
            parent.send_signal(signal.SIGKILL)
            readable, _, _ = select.select([pidfd], [], [], 240)
            assert readable, "the worker outlives its daemon"
        finally:
            os.close(pidfd)


def test_a_worker_whose_daemon_died_before_it_began_does_not_begin() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        command = [sys.executable, STUCK_WORKER, "--fd", str(theirs.fileno()), "--parent", "1"]
        done = subprocess.run(command, pass_fds=[theirs.fileno()], timeout=240, check=False)
        assert done.returncode == 0


def test_openmp_threads_of_a_worker_sleep_soon_unless_the_user_says_how_long() -> None:
    assert worker_environment({"A": "b"}) == {"A": "b", "GOMP_SPINCOUNT": "1000"}
    for own in ({"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "active"}):
        assert worker_environment(own) == own

"""The GPU's runner on a queue that does all as late or as early as it may, against the CPU's."""

from __future__ import annotations

import socket
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics.fake_queue import FakeQueue, reads_allowed
from numerics.gpu_pair import (
    BUFFER_BLOCKS,
    Driver,
    Pair,
    bits,
    both_runners,
    counted,
    decodes,
    expected,
    growing,
    story,
)
from numerics.random_plans import MANY
from numerics.tiny import FAMILIES, prompt_of

from quantd.daemon.frames import FrameSocket
from quantd.daemon.types import (
    BlockCopy,
    DiskOp,
    FromWorker,
    StepPlan,
    StepResult,
    ToWorker,
)
from quantd.daemon.worker.gpu import frame
from quantd.daemon.worker.gpu.queue import NotRecorded
from quantd.daemon.worker.main import serve
from quantd.daemon.worker.memory import KvPools
from quantd.kernels import ops

pytestmark = pytest.mark.skipif(
    bool(ops.notes()), reason="without the C library a row's bits depend on its batch"
)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with both_runners(tmp_path_factory.mktemp("llama")) as made:
        yield made


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1 << 30), eagerness=st.sampled_from((0.0, 0.3, 0.9)))
def test_every_schedule_gives_the_bits_of_the_cpu(pair: Pair, seed: int, eagerness: float) -> None:
    """Chunks of prompts beside decodes, one plan ahead, ends and preemptions with a token in
    flight, blocks that leave and come back, forks, grammars, penalties, log-probabilities, NaN."""
    plans, results = story(pair, seed)
    queue = FakeQueue(seed, eagerness)
    assert bits(Driver(pair.device(queue), queue).run(plans)) == bits(results)


@pytest.mark.parametrize("ahead", [0, 1])
def test_the_worker_s_loop_sends_what_has_ended(pair: Pair, ahead: int) -> None:
    """Over its socket, with plans sent one ahead of what is known, or none."""
    plans, results = story(pair, 11)
    ours, theirs = socket.socketpair()
    runner = pair.device(FakeQueue(11, 0.3))
    worker = threading.Thread(
        target=serve, args=(FrameSocket(theirs, ToWorker), lambda load, on_progress: runner)
    )
    engine: FrameSocket[FromWorker] = FrameSocket(ours, FromWorker)
    came: list[StepResult] = []

    def receive() -> None:
        result = engine.receive()
        assert isinstance(result, StepResult), result
        came.append(result)

    with ours, theirs:
        worker.start()
        engine.send(pair.load)
        assert engine.receive() == runner.info
        for number, plan in enumerate(plans):
            engine.send(plan)
            if number >= ahead:
                receive()
        while len(came) < len(plans):
            receive()
        ours.shutdown(socket.SHUT_WR)
        worker.join()
    assert bits(came) == bits(results)


def test_the_stories_have_everything_in_them(pair: Pair) -> None:
    assert MANY > 2 * BUFFER_BLOCKS, "more than both buffers hold"
    seen: Counter[str] = Counter()
    for seed in range(8):
        plans, _ = story(pair, seed, seen)
        params = [new.sampling for plan in plans for new in plan.add]
        seen["grammar"] += sum(p.grammar is not None for p in params)
        seen["prompt logprobs"] += sum(p.prompt_logprobs is not None for p in params)
    for what in (
        *("fetch", "spill", "rebind", "fork", "end", "error", "for nobody", "decodes only"),
        *("preempted with a token in flight", "ended with a token in flight"),
        *("many spills", "many fetches"),
        *("grammar", "prompt logprobs"),
    ):
        assert seen[what] >= 8, f"{what}: {seen}"


def test_a_size_is_recorded_the_second_time_and_replayed_after_it(pair: Pair) -> None:
    plans = decodes(5, prompt_of(20), prompt_of(9), prompt_of(17))
    queue = FakeQueue(1)
    assert bits(Driver(pair.device(queue), queue).run(plans)) == expected(pair, plans)
    # Three rows and four, of which one pads; the first time without a graph.
    assert (counted(queue, "record"), counted(queue, "replay")) == (1, 4)


def test_nothing_is_recorded_where_operations_read(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "reads_nothing", lambda device, dtype, head_dim: False)
    plans = decodes(5, prompt_of(20), prompt_of(9), prompt_of(17))
    queue = FakeQueue(1)
    assert bits(Driver(pair.device(queue), queue).run(plans)) == expected(pair, plans)
    assert counted(queue, "record") == counted(queue, "replay") == 0


def test_a_mixture_that_waits_is_never_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts that are not stacked, as on a CPU: how many rows each has is read."""
    specification = ops.expert_feed_forward

    def expert_feed_forward(*args: Any) -> torch.Tensor:
        with reads_allowed():
            return specification(*args)

    monkeypatch.setattr(ops, "expert_feed_forward", expert_feed_forward)
    with both_runners(tmp_path, FAMILIES["mixtral"]) as mixture:
        plans = decodes(4, prompt_of(20), prompt_of(9))
        queue = FakeQueue(1)
        assert bits(Driver(mixture.device(queue), queue).run(plans)) == expected(mixture, plans)
    assert counted(queue, "record") == 0


def test_a_device_that_records_nothing_computes_all_the_same(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plans = decodes(4, prompt_of(20), prompt_of(9))
    queue = FakeQueue(2)
    asked: list[Any] = []

    def refuse(work: Any) -> Any:
        asked.append(work)
        raise NotRecorded("operation not permitted\nat some line")

    monkeypatch.setattr(queue, "record", refuse)
    runner = pair.device(queue)
    assert bits(Driver(runner, queue).run(plans)) == expected(pair, plans)
    assert len(asked) == 1 and not runner._graphs._graphs
    (record,) = caplog.records
    assert record.getMessage().endswith("one by one: operation not permitted")


def test_few_graphs_are_kept(pair: Pair) -> None:
    queue = FakeQueue(2)
    runner = pair.device(queue)
    runner._graphs._most = 1
    one, two = decodes(3, prompt_of(20)), decodes(3, prompt_of(20), prompt_of(9))
    plans = [*one, *two, *one, *two]
    assert bits(Driver(runner, queue).run(plans)) == expected(pair, plans)
    assert (counted(queue, "record"), counted(queue, "replay")) == (4, 8)
    assert len(runner._graphs._graphs) == 1 and len(runner._graphs._leaving) == 0


@pytest.mark.parametrize("at", range(10))
def test_a_step_without_memory_is_done_once_more_without_graphs(pair: Pair, at: int) -> None:
    plans = decodes(6, prompt_of(20), prompt_of(9))
    queue = FakeQueue(at, memory_errors=[at])
    assert bits(Driver(pair.device(queue), queue).run(plans)) == expected(pair, plans)
    assert counted(queue, "settle") == counted(queue, "give back") == 1
    # Calls: a forward pass and sampling twice, recording and sampling, then sampling four times.
    # A graph that was there is recorded again when its size has come twice.
    assert counted(queue, "record") == (2 if at in (5, 6, 7) else 1)


def test_pools_without_memory_get_that_of_the_graphs(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = decodes(4, prompt_of(20))
    queue = FakeQueue(3)
    runner = pair.device(queue)
    left = [MemoryError("blocks")]

    def ensure(pools: KvPools, blocks: Iterable[int]) -> None:
        if counted(queue, "replay") and left:
            queue.in_step = False
            raise left.pop()

    monkeypatch.setattr(KvPools, "ensure_blocks", ensure)
    assert bits(Driver(runner, queue).run(plans)) == expected(pair, plans)
    assert not left and counted(queue, "give back") == 1


def test_a_second_time_without_memory_is_the_end(pair: Pair) -> None:
    queue = FakeQueue(0, memory_errors=[2, 3])
    with pytest.raises(MemoryError, match="a step does not fit .* lower token_budget or kv_bytes"):
        Driver(pair.device(queue), queue).run(decodes(3, prompt_of(20)))


def test_buffers_that_grow_take_the_graphs_along(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both buffers at once: a prompt too long for them, with all of its log-probabilities."""
    monkeypatch.setattr(frame, "_FIRST_BYTES", 1 << 10)
    queue = FakeQueue(4, 0.0)
    runner = pair.device(queue)
    plans = growing()
    assert bits(Driver(runner, queue).run(plans)) == expected(pair, plans)
    assert counted(queue, "record") == 2


def _orders(pair: Pair, *plans: StepPlan) -> tuple[list[tuple[DiskOp, torch.Tensor]], float]:
    """(What the disk was told and the place then, the first step's copy_seconds), of plans that
    spill block 70, which is of sevens."""
    queue = FakeQueue(5, 0.0)
    runner = pair.device(queue)
    orders: list[tuple[DiskOp, torch.Tensor]] = []

    class Disk:
        def put(self, op: DiskOp) -> None:
            orders.append((op, runner._host.places[op.place].clone()))

    runner._disk = Disk()  # type: ignore[assignment]
    runner._host.places.zero_()
    for tensor in pair.model.pools.tensors:
        tensor[70] = 7.0
    driver = Driver(runner, queue)
    for plan in plans:
        assert not orders
        driver.submit(plan)
    driver.submit(StepPlan(9, ()))
    return orders, driver.results[0].copy_seconds


SPILL = (BlockCopy("spill", 70, 3),)
WRITE = (DiskOp("write", bytes(32), 3),)


@pytest.mark.parametrize(
    "plans",
    [
        (StepPlan(1, (), copies=SPILL, disk=WRITE),),
        (StepPlan(1, (), copies=SPILL), StepPlan(2, (), disk=WRITE)),
    ],
    ids=["of the same plan", "of an earlier plan"],
)
def test_the_disk_gets_its_orders_when_the_copies_have_happened(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, plans: tuple[StepPlan, ...]
) -> None:
    """A file must not be written from a place whose spill is under way."""
    ((op, place),), copy_seconds = _orders(pair, *plans)
    assert op == WRITE[0] and torch.all(place == 7.0)
    assert copy_seconds > 0
    # And without the wait it would be: nothing else of these steps needs the copy.
    monkeypatch.setattr(FakeQueue, "follow", lambda queue, copied: None)
    ((op, place),), _ = _orders(pair, *plans)
    assert op == WRITE[0] and torch.all(place == 0.0)


def test_memory_is_released_when_nothing_is_under_way(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = FakeQueue(6, 0.0)
    runner = pair.device(queue)
    plans = decodes(2, prompt_of(20))

    def release(pools: KvPools, blocks: Sequence[tuple[int, int]]) -> None:
        assert queue.is_settled
        for tensor in (*pools.keys, *pools.values):
            tensor[blocks[0][0] : blocks[0][1]] = torch.nan

    monkeypatch.setattr(KvPools, "release", release)
    driver = Driver(runner, queue)
    for plan in plans:
        driver.submit(plan)
    runner.release_memory([(10, 12)])
    driver.wait()
    assert bits(driver.results) == expected(pair, plans)

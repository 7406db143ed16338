"""The GPU's runner on a queue that does all as late or as early as it may, against the CPU's."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics.fake_queue import FakeMark, FakeQueue, poisoned, reads_allowed
from numerics.random_plans import BAD_PLACE, TABLE, Dice
from numerics.tiny import Family, make_model, prompt_of

from quantd.daemon.types import (
    BlockCopy,
    Chunk,
    DiskOp,
    LoadModel,
    NewSequence,
    SamplingParams,
    StepPlan,
    StepResult,
)
from quantd.daemon.worker.gpu import frame
from quantd.daemon.worker.gpu.frame import Upward
from quantd.daemon.worker.gpu.graphs import Graphs
from quantd.daemon.worker.gpu.runner import GpuRunner
from quantd.daemon.worker.load import Model, load_model
from quantd.daemon.worker.memory import KvPools
from quantd.daemon.worker.runner import Runner
from quantd.kernels import ops

pytestmark = pytest.mark.skipif(
    bool(ops.notes()), reason="without the C library a row's bits depend on its batch"
)
NUM_PLANS = 30
GREEDY = SamplingParams(max_tokens=50, temperature=0.0, logprobs=2)


class Pair:
    """Both runners' parts, loaded once."""

    def __init__(self, load: LoadModel) -> None:
        self.load = load
        self.cpu = Runner(load, lambda progress: None)
        self.model: Model = load_model(load, lambda progress: None)
        self.next_seq = 0
        self.cpu.set_tokens(TABLE)
        self.cpu._host._places[BAD_PLACE] = torch.nan

    def device(self, queue: FakeQueue) -> GpuRunner:
        with poisoned():
            runner = GpuRunner(self.model, self.load, queue)
        runner.set_tokens(TABLE)
        runner._host._places[BAD_PLACE] = torch.nan
        return runner


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("llama")
    make_model(Family("llama", {"tie_word_embeddings": True}), folder)
    load = LoadModel("t", str(folder), dtype="float32", threads=1, host_kv_bytes=1 << 20)
    specification = ops.sample_rows

    def sample_rows(logits: torch.Tensor, rows: ops.SamplingRows) -> Any:
        with reads_allowed():  # Triton's, in its place on a GPU, reads nothing on the host
            return specification(logits, rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "sample_rows", sample_rows)
        yield Pair(load)


def story(
    pair: Pair, seed: int, seen: Counter[str] | None = None
) -> tuple[list[StepPlan], list[StepResult]]:
    """Plans as a scheduler makes them that is told of a step when the next one is planned, and what
    the CPU's runner says to them."""
    dice = Dice(seed, pair.next_seq, len(pair.cpu._host._places))
    pair.next_seq += 1000
    plans: list[StepPlan] = []
    results: list[StepResult] = []
    for _ in range(NUM_PLANS):
        plans.append(dice.plan())
        if results:
            dice.told(results[-1])
        results.append(pair.cpu.execute(plans[-1]))
    plans.append(dice.end())
    results.append(pair.cpu.execute(plans[-1]))
    if seen is not None:
        seen.update(dice.seen)
    return plans, results


class Driver:
    """What the worker's loop does, with looks at the step under way by dice."""

    def __init__(self, runner: GpuRunner, queue: FakeQueue) -> None:
        self.runner, self.queue = runner, queue
        self.results: list[StepResult] = []
        self._random = random.Random(queue.seed)

    def run(self, plans: Sequence[StepPlan]) -> list[StepResult]:
        for plan in plans:
            for _ in range(self._random.choice((0, 0, 1, 4))):
                self.poll()
            self.submit(plan)
        self.wait()
        return self.results

    def submit(self, plan: StepPlan) -> None:
        first_own, start = self.queue.num_marks + 1, len(self.queue.log)
        self.queue.in_step = True
        with poisoned():
            self.runner.submit(plan, self.results.append)
        self.queue.in_step = False
        waits = [number for kind, number in self.queue.log[start:] if kind == "wait"]
        assert all(number < first_own for number in waits), "a step waited for itself"
        assert len(waits) <= 1

    def poll(self) -> None:
        if self.runner.is_under_way:
            self.runner.poll(self.results.append)

    def wait(self) -> None:
        while self.runner.is_under_way:
            self.poll()
            self.queue.get_on()


def bits(results: Sequence[StepResult]) -> list[Any]:
    """What was said. As text, because NaN is not itself."""
    return [(r.step, repr(r.sampled), repr(r.prompt_logprobs), r.num_masks) for r in results]


def decodes(count: int, *prompts: tuple[int, ...]) -> list[StepPlan]:
    """Prompts of at most two blocks in a plan of their own, then `count` decodes of all at once."""
    seqs = range(len(prompts))
    first = [Chunk(i, 0, len(prompts[i]), (10 + 8 * i, 11 + 8 * i), True) for i in seqs]
    add = [NewSequence(i, prompts[i], len(prompts[i]), GREEDY) for i in seqs]
    plans = [StepPlan(0, tuple(first), tuple(add), tuple(seqs))]
    for k in range(count):
        starts = [len(prompts[i]) + k for i in seqs]
        chunks = tuple(Chunk(i, start, start + 1, (), True) for i, start in enumerate(starts))
        plans.append(StepPlan(1 + k, chunks))
    return plans


def expected(pair: Pair, plans: Sequence[StepPlan]) -> list[Any]:
    return bits([pair.cpu.execute(plan) for plan in plans])


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1 << 30), eagerness=st.sampled_from((0.0, 0.3, 0.9)))
def test_every_schedule_gives_the_bits_of_the_cpu(pair: Pair, seed: int, eagerness: float) -> None:
    """Chunks of prompts beside decodes, one plan ahead, ends and preemptions with a token in
    flight, blocks that leave and come back, forks, grammars, penalties, log-probabilities, NaN."""
    plans, results = story(pair, seed)
    queue = FakeQueue(seed, eagerness)
    assert bits(Driver(pair.device(queue), queue).run(plans)) == bits(results)


def test_the_stories_have_everything_in_them(pair: Pair) -> None:
    seen: Counter[str] = Counter()
    for seed in range(8):
        plans, _ = story(pair, seed, seen)
        params = [new.sampling for plan in plans for new in plan.add]
        seen["grammar"] += sum(p.grammar is not None for p in params)
        seen["prompt logprobs"] += sum(p.prompt_logprobs is not None for p in params)
    for what in (
        *("fetch", "spill", "rebind", "fork", "end", "error", "for nobody", "decodes only"),
        *("preempted with a token in flight", "ended with a token in flight"),
        *("grammar", "prompt logprobs"),
    ):
        assert seen[what] >= 8, f"{what}: {seen}"


def counted(queue: FakeQueue, kind: str) -> int:
    return sum(one == kind for one, _ in queue.log)


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


def growing() -> list[StepPlan]:
    params = SamplingParams(max_tokens=50, temperature=0.0, prompt_logprobs=20)
    prompt = prompt_of(100, 3)
    long = Chunk(9, 0, 100, tuple(range(90, 97)), True)
    before = decodes(7, prompt_of(9), prompt_of(7))
    between = StepPlan(70, (long,), (NewSequence(9, prompt, 100, params),), (9,))
    return [*before[:4], between, *before[4:]]


def test_the_disk_gets_its_orders_when_the_copies_have_happened(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file must not be written from a place whose spill is under way."""
    queue = FakeQueue(5, 0.0)
    runner = pair.device(queue)
    orders: list[tuple[DiskOp, torch.Tensor]] = []

    class Disk:
        def put(self, op: DiskOp) -> None:
            orders.append((op, runner._host._places[op.place].clone()))

    runner._disk = Disk()  # type: ignore[assignment]
    for tensor in (*pair.model.pools.keys, *pair.model.pools.values):
        tensor[70] = 7.0
    op = DiskOp("write", bytes(32), 3)
    driver = Driver(runner, queue)
    driver.submit(StepPlan(1, (), copies=(BlockCopy("spill", 70, 3),), disk=(op,)))
    assert not orders
    driver.submit(StepPlan(2, ()))
    assert [one for one, _ in orders] == [op]
    assert torch.all(orders[0][1] == 7.0)
    assert driver.results[0].copy_seconds > 0


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


# --- what has to be noticed ----------------------------------------------------------------------


def test_pinned_memory_that_is_written_too_early_is_noticed(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Upward, "_TURNS", 1)
    plans = decodes(4, prompt_of(20), prompt_of(9))
    queue = FakeQueue(0, 0.0)
    with suppress(IndexError):  # of a poisoned token
        assert bits(Driver(pair.device(queue), queue).run(plans)) != expected(pair, plans)


def test_a_read_before_the_mark_is_noticed(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeMark, "wait", lambda mark: None)
    monkeypatch.setattr(FakeQueue, "seconds", lambda queue, begun, ended: 0.0)
    plans = decodes(1, prompt_of(20))
    for eagerness in (0.0, 1.0):
        queue = FakeQueue(0, eagerness)
        driver = Driver(pair.device(queue), queue)
        for plan in plans:
            driver.submit(plan)
        assert bits(driver.results) != expected(pair, plans)[:1]


@pytest.mark.parametrize("kind", ["spill", "fetch"])
def test_a_copy_that_does_not_wait_is_noticed(pair: Pair, kind: str) -> None:
    """A block is saved, the next plan fetches it elsewhere: with nobody to order the streams, it
    is saved before it is computed, or fetched after it is read."""
    prompt = prompt_of(20)
    spill, fetch = BlockCopy("spill", 10, 4), BlockCopy("fetch", 4, 80)
    add = (NewSequence(1, prompt, 20, GREEDY),)
    plans = [
        *decodes(0, prompt),
        StepPlan(1, (), copies=(spill,)),
        StepPlan(2, (Chunk(1, 16, 20, (80, 81), True),), add, (0, 1), (fetch,)),
    ]
    queue = FakeQueue(0, 0.0, copies_wait=False)
    queue.prefers_copies = kind == "spill"
    for tensor in (*pair.model.pools.keys, *pair.model.pools.values):
        tensor[10], tensor[80] = 0.5, 0.5
    right = expected(pair, plans)
    assert bits(Driver(pair.device(queue), queue).run(plans)) != right
    queue = FakeQueue(0, 0.0)
    assert bits(Driver(pair.device(queue), queue).run(plans)) == right


def test_a_graph_that_outlives_its_buffer_is_noticed(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frame, "_FIRST_BYTES", 1 << 10)
    monkeypatch.setattr(Graphs, "drop", lambda graphs: None)
    queue = FakeQueue(4, 0.0)
    plans = growing()
    assert bits(Driver(pair.device(queue), queue).run(plans)) != expected(pair, plans)


@pytest.mark.parametrize(
    "work",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: bool(x.any()),
        lambda x: x[x > 1],
        lambda x: x.nonzero(),
        lambda x: x.unique(),
        lambda x: torch.bincount(x.long()),
        lambda x: x.cpu() if x.is_cuda else x.masked_select(x > 1),
    ],
)
def test_reading_in_queued_work_is_noticed(work: Callable[[torch.Tensor], Any]) -> None:
    queue = FakeQueue(0, 0.0)
    x = torch.arange(4.0)
    queue.run(lambda: work(x))
    with pytest.raises(AssertionError, match="the host would wait for the device"):
        queue.settle()


def test_waiting_for_all_within_a_step_is_noticed() -> None:
    queue = FakeQueue(in_step=True)
    with pytest.raises(AssertionError, match="within a step"):
        queue.settle()

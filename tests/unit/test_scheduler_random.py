"""Everything that may happen to a scheduler at once, at random: policies, windows, tiers, salts,
marks, timeouts, aborts, errors, new budgets, and a disk that is late, full or loses files.

`StepLoop` recounts after every call, and the worker's "KV" changes an answer when a block is lost,
mixed up or taken too early.
"""

from __future__ import annotations

import random
from collections import deque

import pytest
from fakes import VOCAB_SIZE, ManualClock, StepLoop

from quantd.daemon.config import SchedulerSettings
from quantd.daemon.kv.cache import KvCache
from quantd.daemon.kv.disk import DiskIndex
from quantd.daemon.kv.pool import BlockPool
from quantd.daemon.kv.window import NO_WINDOW, Window
from quantd.daemon.scheduler.tables import BlockTables
from quantd.daemon.types import BLOCK_TOKENS, DiskDone, SamplingParams, StepPlan, StepResult
from quantd.daemon.types import DiskIndex as Listing

PROMPT = [i * 7 % VOCAB_SIZE for i in range(400)]
WINDOWS = [NO_WINDOW, NO_WINDOW, Window(20, 0.5), Window(33, 0.8), Window(16, 1.0)]
POLICIES = ["fcfs", "priority", "sjf"]


class Load:
    """A loop, and the disk's answers, which come when `answer` is called."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        num_places = rng.choice([0, 1, 2, 3, 8, 16])
        share = rng.random() < 0.9
        clock = ManualClock()
        disk = None
        if num_places and share and rng.random() < 0.7:
            disk = DiskIndex(rng.choice([1, 2, 5, 64]), clock)
        if disk is not None and rng.random() < 0.7:
            disk.open((), 1)
        window = rng.choice(WINDOWS)
        host = BlockPool(num_places) if num_places else None
        pool = BlockPool(rng.randint(7, 24), 100, window.share)
        self.kv = KvCache(pool, host, disk, 64, window)
        settings = SchedulerSettings(
            policy=rng.choice(POLICIES),  # type: ignore[arg-type]
            token_budget=rng.choice([16, 40, 256]),
            max_running=rng.choice([2, 5, 8]),
            aging_seconds=rng.choice([1.0, 20.0]),
        )
        tables = BlockTables(self.kv, "fake", share)
        self.loop = StepLoop(tables=tables, settings=settings, overlap=rng.random() < 0.6)
        self.loop.clock = clock
        self.answers: deque[DiskDone] = deque()
        self.aborted: set[int] = set()
        self._run = self.loop.worker.run
        self.loop.worker.run = self._late  # type: ignore[method-assign]

    def _late(self, plan: StepPlan) -> StepResult:
        result = self._run(plan)
        self.answers.extend(self.loop.worker.disk_done)
        self.loop.worker.disk_done.clear()
        return result

    def answer(self, most: int) -> None:
        for _ in range(min(most, len(self.answers))):
            self.loop.scheduler.disk_done(self.answers.popleft())
            self.loop.scheduler.check()

    def add(self) -> None:
        """One request, or three choices of one."""
        rng = self.rng
        most = self.kv.window.most_blocks(self.kv.pool.limit) or 20
        max_tokens, tail = rng.randint(1, 30), rng.randint(0, 3)
        length = rng.choice([rng.randint(1, 160), BLOCK_TOKENS * rng.randint(1, 9)])
        length = min(length, most * BLOCK_TOKENS - max_tokens - tail)
        start = 15 * rng.randint(0, 2)
        scored = rng.choice([None] * 8 + [1])
        for seed in range(rng.choice([1, 1, 1, 3]) if length > 0 else 0):
            self.loop.add(
                0,
                prompt=[*PROMPT[start : start + length], *[tail] * tail],
                sampling=SamplingParams(
                    max_tokens=max_tokens,
                    seed=seed,
                    prompt_logprobs=scored,
                    stop_token_ids=tuple(range(rng.choice([0, 0, 10, 60]))),
                ),
                priority=rng.randint(0, 2),
                caller=rng.choice("ab"),
                cache_salt=rng.choice(["", "", "", "s"]),
                mark=rng.choice(["", "m", "n"]),
                is_batch=rng.random() < 0.2,
                deadline=self.loop.clock() + rng.choice([1, 5, 30]) if rng.random() < 0.2 else None,
            )

    def disturb(self) -> None:
        """Whatever may come between two steps."""
        rng, loop, kv, worker = self.rng, self.loop, self.kv, self.loop.worker
        match rng.randrange(12):
            case 0 | 1 if loop.sequences:
                seq_id = rng.choice(list(loop.sequences))
                if loop.scheduler.abort(seq_id):
                    self.aborted.add(seq_id)
            case 2:
                kv.forget(rng.choice("mn"))
            case 3:
                kv.unmark(rng.choice("mn"))
            case 4 | 5:
                loop.scheduler.resize(rng.randint(5, 30))
                loop.take_ended()
            case 6:
                kv.shrink()
            case 7:
                worker.disk_error = rng.choice([None, "full"])
            case 8 if kv.disk is not None and not kv.disk.is_open:
                loop.scheduler.disk_open(Listing(tuple(worker.files), 1))
            case 9 if worker.files:
                del worker.files[rng.choice(sorted(worker.files))]
            case 10:
                kv.cost.computed(100, rng.choice([1e-7, 1e-3]))
                kv.cost.copied(1, rng.choice([1.0, 1e-9]))
            case 11 if worker.rows:
                worker.errors[rng.choice(sorted(worker.rows))] = "not finite"
        loop.scheduler.check()

    def finish(self) -> None:
        """Until all have ended and the disk has answered."""
        loop = self.loop
        loop.worker.disk_error = None
        for _ in range(5000):
            if not loop.scheduler.has_work and not loop.in_flight and not self.answers:
                if loop.begin() is None:
                    return
                loop.end()
            loop.step()
            loop.clock.advance(0.01)
            self.answer(self.rng.randint(0, 2))
        raise AssertionError("it does not come to rest")


def check_random_load(seed: int) -> None:
    rng = random.Random(seed)
    load = Load(rng)
    loop, kv, scheduler = load.loop, load.kv, load.loop.scheduler
    for _ in range(rng.randint(20, 120)):
        what = rng.random()
        if what < 0.35:
            load.add()
        elif what < 0.7:
            for _ in range(rng.randint(1, 5)):
                loop.clock.advance(rng.choice([0.0, 0.1, 1.0]))
                loop.step()
        elif what < 0.85:
            load.disturb()
        else:
            load.answer(rng.randint(1, 5))
    load.finish()
    loop.check_outputs()
    assert set(loop.reasons()) == set(loop.sequences) - load.aborted
    assert kv.pool.num_used == 0
    kv.shrink()
    load.finish()
    for mark in "mn":
        kv.forget(mark)
    load.finish()
    # Nothing is left of anybody: no claim on a place, no memory of a request.
    assert kv.pool.num_free == kv.pool.limit
    assert not kv.reads._jobs and not kv.reads._waits and not kv.writes.places()
    assert not kv._marks._nodes and not kv._marks._files
    assert not scheduler._deadlines._live and not len(scheduler._fetching)
    for queue in (scheduler._queues._others, scheduler._queues._lines):
        assert not len(queue) and not queue.shares._num_requests
    if kv.host is not None:
        assert None not in [kv.take_place() for _ in range(kv.host.limit)], "a place is stuck"
        assert not kv.tree._roots
    if kv.disk is not None and kv.disk.is_open:
        assert all(map(kv.disk.knows, loop.worker.files)), "a file that nobody knows of"


@pytest.mark.parametrize("seed", range(30))
def test_a_random_load(seed: int) -> None:
    check_random_load(seed)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_many_random_loads() -> None:
    for seed in range(30, 2000):
        check_random_load(seed)

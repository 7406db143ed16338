"""A runner of the CPU and one of a GPU over the same model, and plans for both."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from numerics.fake_queue import FakeQueue, poisoned, reads_allowed
from numerics.random_plans import BAD_PLACE, TABLE, Dice
from numerics.tiny import Family, make_model, prompt_of

from quantd.daemon.types import (
    Chunk,
    LoadModel,
    NewSequence,
    SamplingParams,
    StepPlan,
    StepResult,
)
from quantd.daemon.worker.gpu import bounce
from quantd.daemon.worker.gpu.runner import GpuRunner
from quantd.daemon.worker.load import Model, load_model
from quantd.daemon.worker.runner import Runner
from quantd.kernels import ops

NUM_PLANS = 30
LLAMA = Family("llama", {"tie_word_embeddings": True})
BUFFER_BLOCKS = 2
GREEDY = SamplingParams(max_tokens=50, temperature=0.0, logprobs=2)


class Pair:
    """Both runners' parts, loaded once."""

    def __init__(self, load: LoadModel) -> None:
        self.load = load
        self.cpu = Runner(load, lambda progress: None)
        self.model: Model = load_model(load, lambda progress: None)
        self.next_seq = 0
        self.cpu.set_tokens(TABLE)
        self.cpu._host.places[BAD_PLACE] = torch.nan

    def device(self, queue: FakeQueue) -> GpuRunner:
        with poisoned():
            runner = GpuRunner(self.model, self.load, queue)
        runner.set_tokens(TABLE)
        runner._host.places[BAD_PLACE] = torch.nan
        return runner


@contextmanager
def both_runners(folder: Path, family: Family = LLAMA) -> Iterator[Pair]:
    """Of a model that is made in `folder`."""
    make_model(family, folder)
    load = LoadModel("t", str(folder), dtype="float32", threads=1, host_kv_bytes=1 << 20)
    specification = ops.sample_rows

    def sample_rows(logits: torch.Tensor, rows: ops.SamplingRows) -> Any:
        with reads_allowed():  # Triton's, in its place on a GPU, reads nothing on the host
            return specification(logits, rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "sample_rows", sample_rows)
        pair = Pair(load)
        patch.setattr(bounce, "BUFFER_BYTES", BUFFER_BLOCKS * pair.model.info.block_bytes)
        yield pair


def story(
    pair: Pair, seed: int, seen: Counter[str] | None = None
) -> tuple[list[StepPlan], list[StepResult]]:
    """Plans as a scheduler makes them that is told of a step when the next one is planned, and what
    the CPU's runner says to them."""
    dice = Dice(seed, pair.next_seq, len(pair.cpu._host.places))
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


def growing() -> list[StepPlan]:
    params = SamplingParams(max_tokens=50, temperature=0.0, prompt_logprobs=20)
    prompt = prompt_of(100, 3)
    long = Chunk(9, 0, 100, tuple(range(90, 97)), True)
    before = decodes(7, prompt_of(9), prompt_of(7))
    between = StepPlan(70, (long,), (NewSequence(9, prompt, 100, params),), (9,))
    return [*before[:4], between, *before[4:]]


def expected(pair: Pair, plans: Sequence[StepPlan]) -> list[Any]:
    return bits([pair.cpu.execute(plan) for plan in plans])


def counted(queue: FakeQueue, kind: str) -> int:
    return sum(one == kind for one, _ in queue.log)

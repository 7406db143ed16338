"""A model under plans on a GPU, as the worker runs it: planned ahead or not, and what it said."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_harness import DEVICE, ON_CPU
from numerics.tiny import VOCAB
from torch import Tensor

from quantd.daemon.types import (
    BLOCK_TOKENS,
    BlockCopy,
    Chunk,
    LoadModel,
    NewSequence,
    SamplingParams,
    StepPlan,
    StepResult,
    TokenLogprob,
)
from quantd.daemon.worker import load
from quantd.daemon.worker.gpu.runner import GpuRunner
from quantd.daemon.worker.pooled_runner import open_runner

NAME = "cpu" if ON_CPU else "cuda:0"
GREEDY = SamplingParams(max_tokens=400, temperature=0.0, logprobs=VOCAB, prompt_logprobs=VOCAB)
WARM = SamplingParams(max_tokens=400, temperature=1.0, seed=7, logprobs=VOCAB)


def _open(frame: LoadModel) -> Any:
    runner = open_runner(frame, lambda progress: None)
    assert isinstance(runner, GpuRunner) == (frame.device != "cpu")
    return runner


def _on_a_cpu(frame: LoadModel) -> GpuRunner:
    """With pools as on a CUDA device: blocks that no plan has named cannot be touched."""
    from numerics.fake_driver import FakeLibrary, allocate
    from numerics.fake_queue import FakeQueue

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load, "allocate", allocate(FakeLibrary()))
        model = load.load_model(frame, lambda progress: None)
    return GpuRunner(model, frame, FakeQueue(seed=1, eagerness=0.1))


@dataclass
class Said:
    """What a sequence got: its tokens, and a distribution after each of them that was asked for."""

    tokens: list[int]
    rows: dict[int, Tensor] = field(default_factory=dict)
    """By position: the log-probabilities [VOCAB] of what comes next."""

    def same(self, other: Said) -> bool:
        """Bit for bit, where both were asked."""
        both = self.rows.keys() & other.rows.keys()
        return self.tokens == other.tokens and all(
            torch.equal(self.rows[at], other.rows[at]) for at in both
        )

    def error(self, other: Said) -> float:
        """Of the logits, less their mean: the mean squared difference over the mean square. Where
        it decoded something else from some place on, up to there."""
        pairs = zip(self.tokens, other.tokens, strict=False)
        until = next((i for i, (a, b) in enumerate(pairs) if a != b), len(self.tokens))
        both = [at for at in self.rows.keys() & other.rows.keys() if at < until]
        got, want = (
            torch.stack([said.rows[at] - said.rows[at].mean() for at in both])
            for said in (self, other)
        )
        return float((got - want).square().mean() / want.square().mean())


class Steps:
    """`ahead`: a plan is put before the result of the one before it is read, as the engine does.

    Where a CPU runs these tests, the GPU's runner has a queue that does its work as late as it may.
    """

    def __init__(self, folder: Path, device: str = NAME, **options: Any) -> None:
        more = {"max_context": 512, "threads": 1} | options
        self.load = LoadModel("tiny", str(folder), device=device, **more)
        self.runner: Any = _on_a_cpu(self.load) if ON_CPU else _open(self.load)
        self.results: list[StepResult] = []
        self.ahead = True
        self.plans: list[StepPlan] = []

    @property
    def pools(self) -> Any:
        return self.runner._model.pools

    def put(self, *chunks: Chunk, **rest: Any) -> None:
        """A plan; what came before it may still be under way."""
        plan = StepPlan(len(self.plans), chunks, **rest)
        self.plans.append(plan)
        self.runner.submit(plan, self.results.append)
        if not self.ahead:
            self.settle()

    def settle(self) -> None:
        """Until every result is there."""
        deadline = time.monotonic() + 240
        while self.runner.is_under_way:
            self.runner.poll(self.results.append)
            if ON_CPU:
                self.runner._queue.get_on()
            assert time.monotonic() < deadline, "a step does not end"
        assert [result.step for result in self.results] == list(range(len(self.plans)))

    def step(self, *chunks: Chunk, **rest: Any) -> StepResult:
        """A plan and its result."""
        self.put(*chunks, **rest)
        self.settle()
        return self.results[-1]

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        decodes: int = 0,
        chunk: int = 1 << 20,
        sampling: SamplingParams | Sequence[SamplingParams] = GREEDY,
        first: int = 0,
        blocks: Sequence[int] | None = None,
    ) -> list[Said]:
        """All prompts in one batch, in chunks of at most `chunk`, then `decodes` tokens more than
        the first. Their ids are from `first` on, their blocks from `blocks` or scattered. They are
        dropped at the end."""
        each = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else sampling
        seqs = {first + i: len(prompt) for i, prompt in enumerate(prompts)}
        add = tuple(
            NewSequence(seq, tuple(prompt), len(prompt), params)
            for seq, prompt, params in zip(seqs, prompts, each, strict=True)
        )
        free = list(blocks or self.scattered())
        done = dict.fromkeys(seqs, 0)
        goals = {seq: size + decodes for seq, size in seqs.items()}
        start = len(self.plans)
        while any(done[seq] < goals[seq] for seq in seqs):
            chunks = []
            for seq, size in seqs.items():
                if done[seq] == goals[seq]:
                    continue
                stop = min(done[seq] + chunk, size) if done[seq] < size else done[seq] + 1
                count = -(-stop // BLOCK_TOKENS) - -(-done[seq] // BLOCK_TOKENS)
                own = tuple(free.pop() for _ in range(count))
                chunks.append(Chunk(seq, done[seq], stop, own, stop >= size))
                done[seq] = stop
            self.put(*chunks, add=add)
            add = ()
        self.put(drop=tuple(seqs))
        self.settle()
        said = {seq: Said(list(prompt)) for seq, prompt in zip(seqs, prompts, strict=True)}
        self.collect(said, start)
        return list(said.values())

    def scattered(self) -> list[int]:
        free = list(range(min(400, self.runner.info.num_blocks)))
        random.Random(len(self.plans)).shuffle(free)
        return free

    def collect(self, said: dict[int, Said], start: int = 0) -> None:
        """Adds what the results from number `start` on hold of these sequences."""
        for result in self.results[start:]:
            for item in result.prompt_logprobs:
                if item.seq in said:
                    for i, entry in enumerate(item.entries):
                        said[item.seq].rows[item.start + i - 1] = row_of(entry)
            for sampled in result.sampled:
                if sampled.seq not in said:
                    continue
                assert sampled.error is None, sampled.error
                answer = said[sampled.seq]
                if sampled.logprob is not None:
                    answer.rows[len(answer.tokens) - 1] = row_of(sampled.logprob)
                answer.tokens.append(sampled.token)


def row_of(entry: TokenLogprob) -> Tensor:
    row = torch.full((VOCAB,), float("nan"))
    for token, logprob in entry.top:
        row[token] = logprob
    return row


def poison(steps: Steps, blocks: Sequence[int]) -> None:
    """Fills free blocks with NaN in every layer, behind all that is under way."""
    at = torch.tensor(list(blocks), device=DEVICE)
    steps.pools.ensure_blocks(b for b in blocks if b != steps.pools.waste_block)

    def work() -> None:
        for pool in (*steps.pools.keys, *steps.pools.values):
            pool.index_fill_(0, at, float("nan"))

    steps.runner._queue.run(work)


def spills(blocks: Sequence[int], first: int = 0) -> tuple[BlockCopy, ...]:
    return tuple(BlockCopy("spill", block, first + i) for i, block in enumerate(blocks))


def fetches(blocks: Sequence[int], first: int = 0) -> tuple[BlockCopy, ...]:
    return tuple(BlockCopy("fetch", first + i, block) for i, block in enumerate(blocks))

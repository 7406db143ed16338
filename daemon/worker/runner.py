"""StepPlan to StepResult, one after the other: the batch as tensors, forward, sampling."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quantd.daemon.types import (
    BlockCopy,
    Chunk,
    CompileGrammar,
    DiskDone,
    DiskIndex,
    GrammarCompiled,
    LoadModel,
    ModelInfo,
    PromptLogprobs,
    Sampled,
    StepPlan,
    StepResult,
    TokenLogprob,
    TokenTable,
)
from quantd.daemon.worker.disk import DiskTier
from quantd.daemon.worker.grammar import CPU_OWN_SECONDS, Grammars
from quantd.daemon.worker.host import HostPool
from quantd.daemon.worker.load import Model, load_model
from quantd.daemon.worker.loader import Progress
from quantd.daemon.worker.main import AtOnce
from quantd.daemon.worker.memory import new_blocks
from quantd.daemon.worker.mirror import Mirror, MirroredSequence, Wanted, WantedLogprobs
from quantd.daemon.worker.pooling import PoolingPlan
from quantd.daemon.worker.sampler import Sampler
from quantd.kernels import ops

_LOGIT_ROWS = 64
"""Rows of the output layer at once for prompt log-probabilities: 16 MB in bfloat16 at a
vocabulary of 128k, where a whole prompt's would be gigabytes."""


class Runner(AtOnce):
    """One loaded model. Plans are executed strictly in order, from one thread."""

    def __init__(
        self, load: LoadModel, on_progress: Progress, pooling: PoolingPlan | None = None
    ) -> None:
        self._model: Model = load_model(load, on_progress, pooling)
        self._sampler = Sampler(self._model.info.vocab_size)
        own_seconds = CPU_OWN_SECONDS if self._model.device.type == "cpu" else 0.0
        self._grammars = Grammars(self._model.info.vocab_size, own_seconds)
        self._mirror = Mirror(self._grammars.open)
        self._host = HostPool(self._model.pools, self.info.num_host_blocks)
        self._load = load
        self._disk: DiskTier | None = None

    def open_disk(self, send: Callable[[DiskDone | DiskIndex], None]) -> None:
        """Begins to serve the disk tier, if there is one; `send` is called from its thread."""
        self._disk = self._host.open_disk(self._load, self.info.kv_revision, send)

    def release_memory(self, blocks: Sequence[tuple[int, int]]) -> None:
        """The bytes of these ranges of blocks are not needed; their memory goes back."""
        self._model.pools.release(blocks)

    def set_tokens(self, table: TokenTable) -> None:
        """What grammars need to know of the tokenizer, before the first of them."""
        self._grammars.set_table(table)

    def compile_grammar(
        self, message: CompileGrammar, send: Callable[[GrammarCompiled], None]
    ) -> None:
        """Begins to make it ready; `send` is called from a thread of its own."""
        self._grammars.compile(message, send)

    @property
    def info(self) -> ModelInfo:
        return self._model.info

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult:
        """Runs one step. Whatever it raises is a bug or a broken machine: the mirror is then no
        longer that of the scheduler, and the worker has to end."""
        started = time.perf_counter()
        self._mirror.apply(plan)
        self._model.pools.ensure_blocks(new_blocks(plan))
        copying = time.perf_counter()
        for copy in plan.copies:
            self._copy(copy)
        copy_seconds = time.perf_counter() - copying
        for op in plan.disk:
            assert self._disk is not None, "there is no disk tier"
            self._disk.put(op)
        sampled: list[Sampled] = []
        logprobs: tuple[PromptLogprobs, ...] = ()
        if plan.chunks:
            self._grammars.begin()
            sampled, logprobs = self._run(plan.chunks)
        masks = self._grammars.take_timing()
        seconds = time.perf_counter() - started
        return StepResult(plan.step, tuple(sampled), logprobs, seconds, copy_seconds, *masks)

    def _copy(self, copy: BlockCopy) -> None:
        """One after the other: a block that one copy saves may be the next one's target."""
        if copy.kind == "spill":
            self._host.spill(copy.src, copy.dst)
        elif copy.kind == "fetch":
            self._host.fetch(copy.src, copy.dst)
        elif copy.kind == "trim":
            self._model.pools.trim(copy.src)
        else:
            self._model.pools.copy(copy.src, copy.dst)

    def _run(self, chunks: tuple[Chunk, ...]) -> tuple[list[Sampled], tuple[PromptLogprobs, ...]]:
        tokens, batch, stop, wanted = self._batch(chunks)
        decoder = self._model.decoder
        every = len(wanted.rows) == len(tokens)
        rows = None if every else self._tensor(np.array(wanted.rows, np.int64))
        hidden = decoder.forward(tokens, batch, stop, self._model.pools, rows)
        logprobs = tuple(self._prompt_logprobs(item, hidden) for item in wanted.logprobs)
        if not wanted.sampled:
            return [], logprobs
        if len(wanted.sampled) < len(wanted.rows):
            hidden = hidden.index_select(0, self._tensor(np.array(wanted.sampled, np.int64)))
        logits = decoder.logits(hidden)
        sampled = self._sample(wanted.sequences, logits)
        for sequence, result in zip(wanted.sequences, sampled, strict=True):
            # Also after an error: the next plan, made before this one's end, may run the sequence.
            sequence.row.tokens.append(result.token)
        return sampled, logprobs

    def _sample(self, sequences: Sequence[MirroredSequence], logits: Tensor) -> list[Sampled]:
        constraints = [sequence.constraint for sequence in sequences]
        masks = self._grammars.wait(constraints)
        rows = [sequence.row for sequence in sequences]
        return self._grammars.advance(constraints, self._sampler.sample(logits, rows, masks))

    def _batch(self, chunks: tuple[Chunk, ...]) -> tuple[Tensor, ops.AttentionBatch, int, Wanted]:
        """(tokens [T], the batch, a position above all of its, the rows that are asked for)."""
        made = self._mirror.batch(chunks)
        batch = ops.AttentionBatch(
            self._tensor(made.starts),
            self._tensor(made.kv_lens),
            self._tensor(made.table),
            self._tensor(made.slots),
            self._tensor(made.positions),
        )
        return self._tensor(made.tokens), batch, made.stop, made.wanted

    def _prompt_logprobs(self, wanted: WantedLogprobs, hidden: Tensor) -> PromptLogprobs:
        k = wanted.sequence.row.sampling.prompt_logprobs
        assert k is not None
        entries: list[TokenLogprob] = []
        for start in range(0, len(wanted.tokens), _LOGIT_ROWS):
            tokens = wanted.tokens[start : start + _LOGIT_ROWS]
            first = wanted.index + start
            logits = self._model.decoder.logits(hidden[first : first + len(tokens)])
            entries += self._sampler.prompt_logprobs(logits, tokens, k)
        return PromptLogprobs(wanted.sequence.row.seq, wanted.start, tuple(entries))

    def _tensor(self, array: NDArray[np.int32] | NDArray[np.int64]) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor if self._model.device.type == "cpu" else tensor.to(self._model.device)

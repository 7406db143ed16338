"""Which runner a checkpoint gets; and StepPlan to StepResult for models that give a vector for each
prompt instead of tokens.

The scheduler treats each prompt as a request for one token; in its place comes a vector. On a GPU
such a step is waited for, as on a CPU: it is a whole batch of prompts, beside which the time
between two steps does not count.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quantd.daemon.types import (
    Chunk,
    CompileGrammar,
    DiskDone,
    DiskIndex,
    GrammarCompiled,
    LoadModel,
    ModelInfo,
    NewSequence,
    PromptLogprobs,
    Sampled,
    StepPlan,
    StepResult,
    TokenTable,
)
from quantd.daemon.worker.checkpoint import Checkpoint, open_checkpoint
from quantd.daemon.worker.load import choose_device, load_model
from quantd.daemon.worker.load_encoder import load_encoder
from quantd.daemon.worker.loader import Progress
from quantd.daemon.worker.main import AtOnce, StepRunner
from quantd.daemon.worker.pooling import PoolingPlan, plan_pooling, pool, vectors
from quantd.daemon.worker.runner import Runner

_NOT_FINITE = "its hidden states were not finite"


def open_runner(load: LoadModel, on_progress: Progress) -> StepRunner:
    """The runner of whatever stands at `load.path`."""
    path = Path(load.path)
    if load.task != "embed" and path.suffix == ".gguf":
        return _open_generating(load, on_progress)  # it says of no file that it embeds
    checkpoint = open_checkpoint(path)
    plan = plan_pooling(load, checkpoint.path, checkpoint.config)
    if plan is None:
        return _open_generating(load, on_progress)
    if plan.is_encoder:
        return EncoderRunner(load, checkpoint, plan, on_progress)
    return DecoderRunner(load, plan, on_progress)


def _open_generating(load: LoadModel, on_progress: Progress) -> StepRunner:
    device = choose_device(load.device)
    if device.type == "cpu":
        return Runner(load, on_progress)
    from quantd.daemon.worker.gpu.cuda import CudaQueue
    from quantd.daemon.worker.gpu.runner import GpuRunner

    return GpuRunner(load_model(load, on_progress), load, CudaQueue(device))


class EncoderRunner(AtOnce):
    """One encoder. It keeps nothing between steps: each prompt is computed by its one chunk."""

    def __init__(
        self, load: LoadModel, checkpoint: Checkpoint, plan: PoolingPlan, on_progress: Progress
    ) -> None:
        self._model = load_encoder(load, checkpoint, plan, on_progress)
        self._plan = plan
        self._sequences: dict[int, NewSequence] = {}

    @property
    def info(self) -> ModelInfo:
        return self._model.info

    def open_disk(self, send: Callable[[DiskDone | DiskIndex], None]) -> None:
        """There are no blocks."""

    def release_memory(self, blocks: Sequence[tuple[int, int]]) -> None:
        """There are no blocks."""

    def set_tokens(self, table: TokenTable) -> None:
        """No grammar will come."""

    def compile_grammar(
        self, message: CompileGrammar, send: Callable[[GrammarCompiled], None]
    ) -> None:
        raise AssertionError("a grammar for a model that does not generate")

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult:
        started = time.perf_counter()
        for seq in plan.drop:
            self._sequences.pop(seq, None)
        for new in plan.add:
            self._sequences[new.seq] = new
        assert all(chunk.sample and chunk.start == 0 for chunk in plan.chunks), "a part of a prompt"
        sampled: tuple[Sampled, ...] = ()
        if plan.chunks:
            found = [self._sequences[chunk.seq] for chunk in plan.chunks]
            sampled = _answers(plan.chunks, self._vectors(found))
        return StepResult(plan.step, sampled, seconds=time.perf_counter() - started)

    def _vectors(self, sequences: Sequence[NewSequence]) -> Tensor:
        encoder, starts = self._model.encoder, [0]
        starts += accumulate(len(sequence.tokens) for sequence in sequences)
        tokens, positions, types = (
            torch.from_numpy(np.concatenate([of(sequence) for sequence in sequences])).to(
                self._model.device
            )
            for of in (_tokens, self._positions, self._types)
        )
        hidden = encoder.forward(tokens, positions, types, starts)
        if self._plan.task == "embed":
            return pool(hidden, starts, self._plan.kind, self._plan.normalized)
        first = hidden[torch.tensor(starts[:-1], device=hidden.device)]
        return torch.tensor([[_sigmoid(logit)] for logit in encoder.score(first)[:, 0].tolist()])

    def _positions(self, sequence: NewSequence) -> NDArray[np.int64]:
        padding = self._model.config.padding
        if padding is None:
            return np.arange(len(sequence.tokens))
        # As RoBERTa was trained: padding is not counted, also where it is part of a text.
        real = _tokens(sequence) != padding
        positions: NDArray[np.int64] = np.cumsum(real) * real + padding
        return positions

    def _types(self, sequence: NewSequence) -> NDArray[np.int64]:
        types = np.zeros(len(sequence.tokens), np.int64)
        # RoBERTa has one type only, whatever its tokenizer says.
        if sequence.second is not None and self._model.config.padding is None:
            types[sequence.second :] = 1
        return types


class DecoderRunner(Runner):
    """A decoder without its output layer. A prompt whose last token says it all comes in chunks
    and uses the prefix cache as any other; else it is computed in one step."""

    def __init__(self, load: LoadModel, plan: PoolingPlan, on_progress: Progress) -> None:
        self._plan = plan
        super().__init__(load, on_progress, plan)

    def _run(self, chunks: tuple[Chunk, ...]) -> tuple[list[Sampled], tuple[PromptLogprobs, ...]]:
        tokens, batch, stop, wanted = self._batch(chunks)
        kind, decoder = self._plan.kind, self._model.decoder
        ending = [chunk for chunk in chunks if chunk.sample]
        if kind == "last":
            rows = self._tensor(np.array(wanted.rows, np.int64))
            hidden = decoder.forward(tokens, batch, stop, self._model.pools, rows)
            starts = list(range(len(ending) + 1))
        else:
            assert len(ending) == len(chunks) and all(chunk.start == 0 for chunk in chunks)
            hidden = decoder.forward(tokens, batch, stop, self._model.pools, None)
            starts = [0, *accumulate(chunk.stop for chunk in chunks)]
        if not ending:
            return [], ()
        out = pool(hidden, starts, kind, self._plan.normalized)
        for sequence in wanted.sequences:
            sequence.row.tokens.append(0)
        return list(_answers(ending, out)), ()


def _sigmoid(x: float) -> float:
    """Of one number at a time, for the same bits in any batch; NaN for what is not finite."""
    if not math.isfinite(x):
        return math.nan
    return 1.0 / (1.0 + math.exp(-x)) if x > -700.0 else 0.0


def _tokens(sequence: NewSequence) -> NDArray[np.int64]:
    return np.array(sequence.tokens, np.int64)


def _answers(chunks: Sequence[Chunk], out: Tensor) -> tuple[Sampled, ...]:
    return tuple(
        Sampled(chunk.seq, 0, error=_NOT_FINITE if vector is None else None, vector=vector)
        for chunk, vector in zip(chunks, vectors(out), strict=True)
    )

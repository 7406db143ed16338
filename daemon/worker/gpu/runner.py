"""StepPlan to StepResult on a device: a step is put into queues, and read when the next one is.

While the device is at a step, the next one is launched; see docs/decisions/0023. Nothing here reads
a tensor of the device: what is known of a step before its mark is reached is what the plan says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quantd.daemon.types import (
    BlockCopy,
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
    TokenTable,
)
from quantd.daemon.worker.disk import DiskTier
from quantd.daemon.worker.gpu.bounce import Bounce
from quantd.daemon.worker.gpu.frame import Downward, Upward
from quantd.daemon.worker.gpu.graphs import Graphs, is_decode, padded
from quantd.daemon.worker.gpu.queue import Mark, Queue, Work
from quantd.daemon.worker.gpu.sampler import DeviceSampler
from quantd.daemon.worker.gpu.saying import Saying
from quantd.daemon.worker.grammar import Grammars, MaskTiming
from quantd.daemon.worker.host import HostPool
from quantd.daemon.worker.load import Model
from quantd.daemon.worker.main import Send
from quantd.daemon.worker.memory import new_blocks
from quantd.daemon.worker.mirror import Batch, Mirror, Wanted
from quantd.kernels import ops


@dataclass(slots=True)
class _Step:
    """A plan from its launch to its result."""

    plan: StepPlan
    begun: Mark
    """Before its copies."""
    copied: Mark | None = None
    """Behind its copies, if there are any, but for those from buffers to the host."""
    wanted: Wanted = field(default_factory=Wanted)
    hidden: list[Tensor] = field(default_factory=list)
    """What the forward pass's work leaves: the rows that are asked for, one tensor."""
    saying: Saying | None = None
    """None: nothing is asked for."""
    masks: MaskTiming = field(default_factory=lambda: MaskTiming(0, 0.0, 0.0))
    ended: Mark | None = None
    """Set when all of it is in the queue."""


class GpuRunner:
    """One loaded decoder that generates, on the device of `queue`. At most one step is under way
    between two calls, two within `submit`.

    `StepResult.seconds` is the device's time from the end of the step before, or from the launch
    where the device had nothing to do, to this step's own end; `copy_seconds` is the part of it
    for which copies kept it from computing. `mask_wait_seconds` is the host's time, beside the
    forward pass.
    """

    def __init__(self, model: Model, load: LoadModel, queue: Queue) -> None:
        self._model, self._load, self._queue = model, load, queue
        self._grammars = Grammars(model.info.vocab_size)
        self._mirror = Mirror(self._grammars.open)
        self._sampler = DeviceSampler(model.info.vocab_size)
        self._host = HostPool(model.pools, model.info.num_host_blocks)
        self._bounce = Bounce(queue, model.pools, self._host, self._run)
        self._disk: DiskTier | None = None
        self._graphs = Graphs(queue)
        self._batches = Upward(queue, self._graphs.drop)
        self._parameters = Upward(queue, lambda: None)
        self._answers = Downward(queue, self._graphs.drop)
        self._decoded = self._rows_of_hidden(0)
        """What decodes leave, at a fixed place for graphs. One step's at a time: what reads it is
        in the queue before the next step is launched."""
        self._is_recordable = not model.decoder.waits and ops.reads_nothing(
            queue.device, model.decoder.dtype, model.config.head_dim
        )
        self._under_way: _Step | None = None
        model.decoder.reserve(model.info.max_context)

    @property
    def info(self) -> ModelInfo:
        return self._model.info

    @property
    def is_under_way(self) -> bool:
        return self._under_way is not None

    def open_disk(self, send: Callable[[DiskDone | DiskIndex], None]) -> None:
        """Begins to serve the disk tier, if there is one; `send` is called from its thread."""
        self._disk = self._host.open_disk(self._load, self.info.kv_revision, send)

    def set_tokens(self, table: TokenTable) -> None:
        """What grammars need to know of the tokenizer, before the first of them."""
        self._grammars.set_table(table)

    def compile_grammar(
        self, message: CompileGrammar, send: Callable[[GrammarCompiled], None]
    ) -> None:
        """Begins to make it ready; `send` is called from a thread of its own."""
        self._grammars.compile(message, send)

    def release_memory(self, blocks: Sequence[tuple[int, int]]) -> None:
        """Waits for the step under way, which may still read them."""
        self._queue.settle()
        self._model.pools.release(blocks)

    @torch.inference_mode()
    def submit(self, plan: StepPlan, send: Send) -> None:
        """Launches a step, sends the result of the one before it, and lets this one be sampled.
        Whatever it raises is a bug or a broken machine: the worker has to end."""
        step = self._launch(plan)
        if self._under_way is not None:
            self._finish(self._under_way, send)
        self._sample(step)
        self._under_way = step

    @torch.inference_mode()
    def poll(self, send: Send) -> None:
        """Sends the result of the step under way if its mark is reached."""
        step = self._under_way
        assert step is not None and step.ended is not None, "nothing is under way"
        if step.ended.is_reached():
            self._under_way = None
            self._finish(step, send)

    # --- launch ----------------------------------------------------------------------------------

    def _launch(self, plan: StepPlan) -> _Step:
        """All that needs no token of the step under way on the host."""
        self._grammars.begin()
        self._mirror.apply(plan)
        self._attempt(lambda: self._model.pools.ensure_blocks(new_blocks(plan)))
        step = _Step(plan, self._queue.mark())
        if plan.copies:
            self._copy(plan.copies)
            step.copied = self._queue.mark()
        if plan.chunks:
            batch = self._mirror.batch(plan.chunks)
            step.wanted = batch.wanted
            is_recorded = self._is_recordable and is_decode(batch)
            compute = self._decode if is_recorded else self._compute
            self._attempt(lambda: compute(batch, step.hidden))
        return step

    def _copy(self, copies: Sequence[BlockCopy]) -> None:
        """One after the other: a block that one copy saves may be the next one's target."""
        for is_cow, part in groupby(copies, lambda copy: copy.kind == "cow"):
            some = tuple(part)
            assert all(copy.kind != "trim" for copy in some), "pools on a device are not trimmed"
            if is_cow:
                pairs = [(copy.src, copy.dst) for copy in some]
                self._run(partial(ops.copy_blocks, self._model.pools.tensors, pairs))
            else:
                self._bounce.copy(some)

    def _compute(self, batch: Batch, hidden: list[Tensor]) -> None:
        arrays: dict[str, NDArray[Any]] = {
            "tokens": batch.tokens,
            "positions": batch.positions,
            "slots": batch.slots,
            "starts": batch.starts,
            "kv_lens": batch.kv_lens,
            "table": batch.table,
            "rows": np.array(batch.wanted.rows, np.int64),
        }
        tensors, last = self._batches.upload(arrays), self._answers.last
        hidden.clear()
        self._queue.run(lambda: hidden.append(self._forward(tensors, last, tensors["rows"])))

    def _decode(self, batch: Batch, hidden: list[Tensor]) -> None:
        """As `_compute`, by a graph."""
        key, arrays = padded(batch, self._model.pools.waste_block)
        if key[0] > len(self._decoded):
            self._decoded = self._rows_of_hidden(key[0])
            self._graphs.drop()
        tensors, last = self._batches.upload(arrays), self._answers.last
        out = self._decoded[: key[0]]

        def work() -> None:
            out.copy_(self._forward(tensors, last, None))

        self._graphs.run(key, work)
        hidden[:] = [out[: len(batch.tokens)]]

    def _forward(self, tensors: Mapping[str, Tensor], last: Tensor, rows: Tensor | None) -> Tensor:
        """Work of the computing stream. last: the tokens that the step before has sampled."""
        given = tensors["tokens"]
        # Below 0 is also what says that a row of the step before failed; the host's mirror has 0.
        sampled = last.index_select(0, (-1 - given).clamp_(min=0)).clamp_(min=0)
        batch = ops.AttentionBatch(
            tensors["starts"],
            tensors["kv_lens"],
            tensors["table"],
            tensors["slots"],
            tensors["positions"],
        )
        tokens = torch.where(given < 0, sampled, given)
        stop = self.info.max_context
        return self._model.decoder.forward(tokens, batch, stop, self._model.pools, rows)

    # --- finish ----------------------------------------------------------------------------------

    def _finish(self, step: _Step, send: Send) -> None:
        """Waits for its mark and sends its result. The mirror and the grammars move on."""
        assert step.ended is not None
        step.ended.wait()
        self._graphs.sweep()
        sequences = step.wanted.sequences
        constraints = [sequence.constraint for sequence in sequences]
        sampled: list[Sampled] = []
        logprobs: tuple[PromptLogprobs, ...] = ()
        if step.saying is not None:
            sampled, logprobs = step.saying.read()
            sampled = self._grammars.advance(constraints, sampled)
        for sequence, result in zip(sequences, sampled, strict=True):
            # Also after an error: the step that is launched already may run the sequence.
            sequence.row.tokens.append(result.token)
            sequence.pending = None
        for op in step.plan.disk:
            assert self._disk is not None, "there is no disk tier"
            self._disk.put(op)
        seconds = self._queue.seconds(step.begun, step.ended)
        copying = 0.0 if step.copied is None else self._queue.seconds(step.begun, step.copied)
        send(StepResult(step.plan.step, tuple(sampled), logprobs, seconds, copying, *step.masks))

    # --- sample ----------------------------------------------------------------------------------

    def _sample(self, step: _Step) -> None:
        """The rest of a step, once the one before it has been read."""
        sequences = step.wanted.sequences
        if step.wanted.rows:
            masks = self._grammars.wait([sequence.constraint for sequence in sequences])
            step.masks = self._grammars.take_timing()
            saying = Saying(self._sampler, self.info.vocab_size, step.wanted, masks)
            self._attempt(lambda: self._say(saying, step.hidden))
            step.saying = saying
        for i, sequence in enumerate(sequences):
            sequence.pending = i
        if step.plan.disk and self._bounce.last is not None:
            # Also what earlier plans have copied: the disk may want the places of those.
            self._queue.follow(self._bounce.last)
        step.ended = self._queue.mark()

    def _say(self, saying: Saying, hidden: list[Tensor]) -> None:
        tensors = self._parameters.upload(saying.arrays)
        landing = self._answers.open(saying.fields)
        decoder = self._model.decoder
        self._queue.run(lambda: saying.run(decoder.logits, hidden[0], tensors, landing.device))
        self._answers.download(saying.fields)
        saying.host = landing.host

    # --- memory ----------------------------------------------------------------------------------

    def _run(self, work: Work) -> None:
        """Puts it into the computing stream, as `_attempt` does it."""
        self._attempt(partial(self._queue.run, work))

    def _attempt(self, work: Work) -> None:
        """Does it, once more if the device has no memory: without graphs, which are recorded again
        later, and without what torch keeps. `work` may be done twice."""
        if self._fits(work):
            return
        self._queue.settle()
        self._graphs.drop()
        self._graphs.sweep()
        self._queue.give_back()
        try:
            work()
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise MemoryError(
                f"a step does not fit into the memory of {self._queue.device}, also without "
                f"recorded graphs; lower token_budget or kv_bytes ({error})"
            ) from error

    @staticmethod
    def _fits(work: Work) -> bool:
        # A function of its own, so that no traceback holds tensors when memory is given back.
        try:
            work()
        except (torch.OutOfMemoryError, MemoryError):
            return False
        return True

    def _rows_of_hidden(self, rows: int) -> Tensor:
        shape = (rows, self._model.config.hidden_size)
        dtype = self._model.decoder.dtype
        return torch.empty(shape, dtype=dtype, device=self._queue.device)

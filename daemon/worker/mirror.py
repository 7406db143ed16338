"""The worker's copy of what the scheduler knows of its sequences, and batches made of it.

Nothing here touches a device: a batch is arrays, and what becomes of them is the runner's matter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quantd.daemon.types import BLOCK_TOKENS, Chunk, NewSequence, StepPlan
from quantd.daemon.worker.grammar import Constraint
from quantd.daemon.worker.sampler import SampleRow

Open = Callable[[NewSequence], Constraint | None]


class MirroredSequence:
    """Tokens and block table of one sequence, and its place in its grammar."""

    __slots__ = ("blocks", "constraint", "num_blocks", "pending", "row")

    def __init__(self, new: NewSequence, constraint: Constraint | None) -> None:
        self.constraint = constraint
        self.row = SampleRow(new.seq, new.sampling, list(new.tokens), new.num_prompt_tokens)
        self.blocks: NDArray[np.int32] = np.zeros(16, np.int32)
        self.num_blocks = 0
        self.pending: int | None = None
        """Which of the tokens of the step under way is its next one, that the mirror does not
        have yet; None where a step ends before the next one begins."""

    def extend(self, blocks: tuple[int, ...]) -> None:
        stop = self.num_blocks + len(blocks)
        if stop > len(self.blocks):
            self.blocks = np.concatenate((self.blocks, np.zeros(stop, np.int32)))
        self.blocks[self.num_blocks : stop] = blocks
        self.num_blocks = stop


@dataclass(slots=True)
class WantedLogprobs:
    """The rows of one chunk that predict prompt tokens."""

    sequence: MirroredSequence
    start: int
    """Position of the first token that is predicted."""
    tokens: list[int]
    index: int = 0
    """Of its first row among the rows that are asked for."""


class Wanted:
    """Which rows of the batch need hidden states, in order, and what for."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.sampled: list[int] = []
        """Indices into `rows`."""
        self.sequences: list[MirroredSequence] = []
        """As many as `sampled`."""
        self.logprobs: list[WantedLogprobs] = []

    def add(self, sequence: MirroredSequence, chunk: Chunk, first_row: int) -> None:
        row = sequence.row
        if row.sampling.prompt_logprobs is not None and chunk.start < row.num_prompt_tokens - 1:
            stop = min(chunk.stop, row.num_prompt_tokens - 1)
            tokens = row.tokens[chunk.start + 1 : stop + 1]
            wanted = WantedLogprobs(sequence, chunk.start + 1, tokens, len(self.rows))
            self.logprobs.append(wanted)
            self.rows += range(first_row, first_row + stop - chunk.start)
        if chunk.sample:
            last = first_row + chunk.stop - chunk.start - 1
            if not self.rows or self.rows[-1] != last:
                self.rows.append(last)
            self.sampled.append(len(self.rows) - 1)
            self.sequences.append(sequence)


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's chunks as arrays; see `ops.AttentionBatch` for what they are."""

    tokens: NDArray[np.int64]
    """[T]; below 0: the token number -1 - value of those that the step under way samples."""
    positions: NDArray[np.int64]
    slots: NDArray[np.int64]
    starts: NDArray[np.int32]
    kv_lens: NDArray[np.int32]
    table: NDArray[np.int32]
    stop: int
    """A position above all of its."""
    wanted: Wanted


class Mirror:
    """All sequences of one model. The worker's own thread only."""

    def __init__(self, open_constraint: Open) -> None:
        self._open = open_constraint
        self._sequences: dict[int, MirroredSequence] = {}

    def apply(self, plan: StepPlan) -> None:
        """What comes before the plan's copies: drop, add, rebinds."""
        for seq in plan.drop:
            self._sequences.pop(seq, None)
        for new in plan.add:
            assert new.seq not in self._sequences, f"sequence {new.seq} is known already"
            self._sequences[new.seq] = MirroredSequence(new, self._open(new))
        for rebind in plan.rebinds:
            self._sequences[rebind.seq].blocks[rebind.index] = rebind.block

    def batch(self, chunks: Sequence[Chunk]) -> Batch:
        """The chunks one after another. Their blocks are appended to the sequences' tables."""
        lengths = [chunk.stop - chunk.start for chunk in chunks]
        total, count = sum(lengths), len(chunks)
        tokens, positions, slots = (np.empty(total, np.int64) for _ in range(3))
        starts, kv_lens = np.zeros(count + 1, np.int32), np.empty(count, np.int32)
        wanted, sequences, row = Wanted(), [], 0
        for i, (chunk, length) in enumerate(zip(chunks, lengths, strict=True)):
            sequence = self._sequences[chunk.seq]
            sequence.extend(chunk.blocks)
            _check(chunk, sequence)
            stop_row = row + length
            known = sequence.row.tokens
            if chunk.stop > len(known):  # by one, that is pending
                assert sequence.pending is not None
                tokens[stop_row - 1] = -1 - sequence.pending
                tokens[row : stop_row - 1] = known[chunk.start : chunk.stop]
            else:
                tokens[row:stop_row] = known[chunk.start : chunk.stop]
            at = np.arange(chunk.start, chunk.stop)
            positions[row:stop_row] = at
            blocks = sequence.blocks[at // BLOCK_TOKENS].astype(np.int64)
            slots[row:stop_row] = blocks * BLOCK_TOKENS + at % BLOCK_TOKENS
            wanted.add(sequence, chunk, row)
            sequences.append(sequence)
            row = stop_row
            starts[i + 1], kv_lens[i] = row, chunk.stop
        stop = max(chunk.stop for chunk in chunks)
        table = np.zeros((count, -(-stop // BLOCK_TOKENS)), np.int32)
        for i, sequence in enumerate(sequences):
            used = -(-chunks[i].stop // BLOCK_TOKENS)
            table[i, :used] = sequence.blocks[:used]
        return Batch(tokens, positions, slots, starts, kv_lens, table, stop, wanted)


def _check(chunk: Chunk, sequence: MirroredSequence) -> None:
    """A plan that cannot be is a bug of the scheduler's."""
    known = len(sequence.row.tokens) + (sequence.pending is not None)
    # Before `start` may lie blocks that other sequences have computed, or do in this step.
    assert 0 <= chunk.start < chunk.stop <= known, f"{chunk} of {known} tokens"
    assert chunk.stop <= sequence.num_blocks * BLOCK_TOKENS, f"{chunk} has no block"
    assert not chunk.sample or chunk.stop == known, f"{chunk} would overwrite a token"

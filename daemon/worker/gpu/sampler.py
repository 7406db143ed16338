"""The sampler of a device: what goes up, the work that is queued, and what its outcome means.

Results are those of `daemon/worker/sampler.py`, to which this is what a launch is to a call.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quantd.daemon.types import Sampled, SamplingParams, TokenLogprob
from quantd.daemon.worker.gpu.edits import Edits, has_edits
from quantd.daemon.worker.gpu.seen import Seen
from quantd.daemon.worker.sampler import (
    GREEDY_BELOW,
    Bits,
    SampleRow,
    all_masked,
    not_finite,
)
from quantd.kernels import ops
from quantd.kernels.sampling import ALL_MASKED, NOT_FINITE

_LOGPROB_ROWS = 16
"""Rows whose log-probabilities are computed at once: 80 MB at a vocabulary of 128k."""

_SENT = tuple(name for name in ops.SamplingRows.__slots__ if name != "seen")

_NO_MASKS: Mapping[int, Bits] = MappingProxyType({})
_MASK64 = 0xFFFFFFFFFFFFFFFF


@dataclass(frozen=True, slots=True)
class SamplingPlan:
    """What sampling the rows of one step takes."""

    arrays: Mapping[str, NDArray[Any]]
    """By name, to be on the device: the fields of `SamplingRows` but `seen`, and `logprob_rows`
    (int64), the rows of `logprobs`. Some may be empty. Each begins there at a multiple of 16 bytes,
    because Triton compiles again for a pointer that does not."""
    logprobs: Mapping[int, int]
    """The rows that want log-probabilities, in order, and how many."""
    num_seen: int
    """Rows of the table of seen tokens."""


class Logprobs(NamedTuple):
    """Of m rows, on the device or copied from there."""

    chosen: Tensor
    """fp32 [m]: of the token that was chosen, or came next; of whatever where none was chosen."""
    top_tokens: Tensor
    """int64 [m, k], most likely first."""
    top: Tensor
    """fp32 [m, k]"""


class Outcome(NamedTuple):
    """Of the n rows of a plan, m of which want log-probabilities; on the device or copied."""

    tokens: Tensor
    """int64 [n]: ids, NOT_FINITE or ALL_MASKED."""
    highest: Tensor
    """fp32 [n]: the highest logit."""
    chosen: Tensor
    top_tokens: Tensor
    top: Tensor
    """These three as in `Logprobs`, empty if m is 0."""


class DeviceSampler:
    """Samples below `vocab_size`; columns beyond it are padding of the model's output layer."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._edits: WeakKeyDictionary[SampleRow, Edits] = WeakKeyDictionary()
        self._seen = Seen(vocab_size)

    def stage(
        self, rows: Sequence[SampleRow], masks: Mapping[int, Bits] = _NO_MASKS
    ) -> SamplingPlan:
        """For the tokens that come next in these rows, none of which is there twice. masks: row ->
        the tokens that its grammar allows. A row's tokens may only be appended to between calls."""
        logprobs = {
            i: row.sampling.logprobs
            for i, row in enumerate(rows)
            if row.sampling.logprobs is not None
        }
        arrays = {
            **_numbers([row.sampling for row in rows], self._vocab_size),
            "position": np.array([len(row.tokens) for row in rows], np.int64),
            **self._changes(rows, masks),
            **self._seen.stage(rows),
            "logprob_rows": np.array(list(logprobs), np.int64),
        }
        return SamplingPlan(arrays, logprobs, self._seen.num_rows)

    def run(self, logits: Tensor, tensors: Mapping[str, Tensor], plan: SamplingPlan) -> Outcome:
        """Work for a queue. logits [n, >= vocab_size] (any float dtype, not changed); tensors: the
        arrays of the plan, on their device."""
        logits = logits[:, : self._vocab_size]
        seen = self._seen.table(plan.num_seen, logits.device)
        rows = ops.SamplingRows(seen=seen, **{name: tensors[name] for name in _SENT})
        tokens, highest = ops.sample_rows(logits, rows)
        if not plan.logprobs:
            none = highest.new_empty(0, 0)
            return Outcome(tokens, highest, none.flatten(), none.long(), none)
        parts = (
            (logits.index_select(0, at), tokens.index_select(0, at))
            for at in torch.split(tensors["logprob_rows"], _LOGPROB_ROWS)
        )
        return Outcome(tokens, highest, *_logprobs(parts, max(plan.logprobs.values())))

    def read(
        self, plan: SamplingPlan, outcome: Outcome, rows: Sequence[SampleRow]
    ) -> list[Sampled]:
        """Of the outcome on the host, for the rows that the plan was made of."""
        tokens: list[int] = outcome.tokens.tolist()
        highest: list[float] = outcome.highest.tolist()
        logprobs: dict[int, TokenLogprob] = {}
        if plan.logprobs:
            chosen = [tokens[i] for i in plan.logprobs]
            entries = _entries(Logprobs(*outcome[2:]), chosen, list(plan.logprobs.values()))
            logprobs = dict(zip(plan.logprobs, entries, strict=True))
        sampled = []
        for i, (row, token) in enumerate(zip(rows, tokens, strict=True)):
            if token == NOT_FINITE:
                sampled.append(not_finite(row.seq, highest[i]))
            elif token == ALL_MASKED:
                sampled.append(all_masked(row.seq))
            else:
                sampled.append(Sampled(row.seq, token, logprobs.get(i)))
        return sampled

    def run_prompt(self, logits: Tensor, next_tokens: Tensor, k: int) -> Logprobs:
        """Work for a queue: for each row of logits [m, >= vocab_size] the raw log-probability of
        the token that came next, int64 [m], and the k most likely ones."""
        logits = logits[:, : self._vocab_size]
        pairs = zip(*(torch.split(t, _LOGPROB_ROWS) for t in (logits, next_tokens)), strict=True)
        return _logprobs(pairs, k)

    def read_prompt(
        self, outcome: Logprobs, next_tokens: Sequence[int], k: int
    ) -> tuple[TokenLogprob, ...]:
        """Of the outcome on the host."""
        return tuple(_entries(outcome, next_tokens, [k] * len(next_tokens)))

    def _changes(
        self, rows: Sequence[SampleRow], masks: Mapping[int, Bits]
    ) -> dict[str, NDArray[Any]]:
        """Masks and edits."""
        num_edits, mask_row = np.zeros(len(rows) + 1, np.int32), np.full(len(rows), -1, np.int32)
        edits: list[Edits] = []
        allowed: list[Bits] = [np.zeros(0, np.int32)]
        for i, row in enumerate(rows):
            bits = masks.get(i)
            if has_edits(row.sampling):
                own = self._edits_of(row)
                own.update(row)
                edits.append(own)
                num_edits[i + 1] = len(own.tokens)
                if own.allowed is not None:
                    bits = own.allowed if bits is None else own.allowed & bits
            if bits is not None:
                mask_row[i] = len(allowed) - 1
                allowed.append(bits)
        return {
            "mask": np.concatenate(allowed).reshape(-1, -(-self._vocab_size // 32)),
            "mask_row": mask_row,
            "edit_start": num_edits.cumsum(dtype=np.int32),
            "edit_token": _joined((own.tokens for own in edits), np.int32),
            "edit_bias": _joined((own.biases for own in edits), np.float32),
            "edit_count": _joined((own.counts for own in edits), np.float32),
            "edit_flags": _joined((own.flags for own in edits), np.int32),
        }

    def _edits_of(self, row: SampleRow) -> Edits:
        found = self._edits.get(row)
        if found is None:
            found = self._edits[row] = Edits(row, self._vocab_size)
        return found


@torch.inference_mode()
def try_sampling(logits: Tensor, vocab_size: int) -> None:
    """Samples from logits [1, >= vocab_size], which compiles the kernel before it is needed."""
    sampler = DeviceSampler(vocab_size)
    plan = sampler.stage([SampleRow(0, SamplingParams(max_tokens=1, temperature=0.0), [0], 1)])
    arrays = plan.arrays.items()
    sampler.run(logits, {name: torch.tensor(a, device=logits.device) for name, a in arrays}, plan)


def _joined(columns: Iterable[array[Any]], dtype: type[np.generic]) -> NDArray[Any]:
    # In a bytearray, because torch takes no array that cannot be written to.
    return np.frombuffer(bytearray().join(columns), dtype)


def _numbers(params: Sequence[SamplingParams], vocab_size: int) -> dict[str, NDArray[Any]]:
    """What is one number for each row."""
    heat = np.array([p.temperature for p in params], np.float64)
    heat[heat < GREEDY_BELOW] = 0
    return {
        "seed": np.array([p.seed & _MASK64 for p in params], np.uint64).view(np.int64),
        "temperature": heat.astype(np.float32),
        "top_k": np.array([min(p.top_k, vocab_size) for p in params], np.int32),
        "top_p": np.array([p.top_p for p in params], np.float64),
        "min_p": np.array([p.min_p for p in params], np.float64),
        "repetition": np.array([p.repetition_penalty for p in params], np.float32),
        "frequency": np.array([p.frequency_penalty for p in params], np.float32),
        "presence": np.array([p.presence_penalty for p in params], np.float32),
    }


def _logprobs(parts: Iterable[tuple[Tensor, Tensor]], k: int) -> Logprobs:
    """Of parts of the rows: their logits and tokens."""
    columns = zip(*(ops.token_logprobs(logits, tokens, k) for logits, tokens in parts), strict=True)
    return Logprobs(*(torch.cat(column) for column in columns))


def _entries(
    outcome: Logprobs, tokens: Sequence[int], counts: Sequence[int]
) -> Iterable[TokenLogprob]:
    columns = (tokens, *(tensor.tolist() for tensor in outcome), counts)
    for token, chosen, ids, top, k in zip(*columns, strict=True):
        yield TokenLogprob(token, chosen, tuple(zip(ids[:k], top[:k], strict=True)))

"""What one sequence's parameters do to its logits, kept from step to step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from quantd.daemon.worker.sampler import Bits, SampleRow, masked_tokens
from quantd.kernels.sampling import MASKED, SEEN

_TOKEN, _BIAS, _COUNT, _FLAGS = range(4)


class Edits:
    """The tokens of one row whose logits are changed, each once, and how. A step costs what its
    new tokens cost, not the whole prompt; so the row's tokens may only be appended to."""

    def __init__(self, row: SampleRow, vocab_size: int) -> None:
        params = row.sampling
        self._vocab_size = vocab_size
        self._column: dict[int, int] = {}
        self._edits = np.zeros((4, 16), np.int32)
        self._num_known = 0
        self._masked: list[int] = []
        self._is_seen = params.repetition_penalty != 1
        self._is_counted = bool(params.frequency_penalty or params.presence_penalty)
        self.allowed: Bits | None = None
        """Of allowed_token_ids."""
        if params.allowed_token_ids is not None:
            self.allowed = _bits(params.allowed_token_ids, vocab_size)
        bias: Counter[int] = Counter()
        for token, value in params.logit_bias:
            bias[token] += value  # type: ignore[assignment]
        self._edits[_BIAS].view(np.float32)[self._columns(bias)] = list(bias.values())

    def take(self, row: SampleRow) -> NDArray[np.int32]:
        """int32 [4, edits] of tokens, biases, counts (both the bits of fp32) and flags, for the
        token that comes next in the row that these are of. Holds until the next call."""
        self._add_tokens(row)
        self._edits[_FLAGS, self._masked] &= ~MASKED
        self._masked = self._columns(masked_tokens(row, self._vocab_size))
        self._edits[_FLAGS, self._masked] |= MASKED
        return self._edits[:, : len(self._column)]

    def _add_tokens(self, row: SampleRow) -> None:
        known, self._num_known = self._num_known, len(row.tokens)
        if self._is_seen:
            columns = self._columns(set(row.tokens[known:]))
            self._edits[_FLAGS, columns] |= SEEN
        if self._is_counted:
            counts = Counter(row.tokens[max(known, row.num_prompt_tokens) :])
            columns = self._columns(counts)
            self._edits[_COUNT].view(np.float32)[columns] += list(counts.values())

    def _columns(self, tokens: Collection[int]) -> list[int]:
        """Where they are, or are from now on."""
        column = self._column
        found = [column.setdefault(token, len(column)) for token in tokens]
        while len(column) > self._edits.shape[1]:
            self._edits = np.concatenate((self._edits, np.zeros_like(self._edits)), axis=1)
        self._edits[_TOKEN, found] = list(tokens)
        return found


def _bits(tokens: Sequence[int], vocab_size: int) -> Bits:
    allowed = np.zeros(-(-vocab_size // 32) * 32, np.uint8)
    allowed[list(tokens)] = 1
    return np.packbits(allowed, bitorder="little").view(np.int32)

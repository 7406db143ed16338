"""What one sequence's parameters do to its logits, kept from step to step."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Collection, Sequence

import numpy as np

from quantd.daemon.types import SamplingParams
from quantd.daemon.worker.sampler import Bits, SampleRow, masked_tokens
from quantd.kernels.sampling import MASKED


def has_edits(params: SamplingParams) -> bool:
    """Logits may be changed by what is sent with each step."""
    return bool(
        params.allowed_token_ids is not None
        or params.bad_words
        or params.min_tokens
        or params.logit_bias
        or params.frequency_penalty
        or params.presence_penalty
    )


class Edits:
    """The tokens of one row whose logits are changed, each once, and how: columns of numbers of 32
    bits. A step costs what its new tokens cost, not the whole prompt; so the row's tokens may only
    be appended to."""

    def __init__(self, row: SampleRow, vocab_size: int) -> None:
        params = row.sampling
        self.tokens, self.flags = array("i"), array("i")
        self.biases, self.counts = array("f"), array("f")
        self.allowed: Bits | None = None
        """Of allowed_token_ids."""
        self._vocab_size = vocab_size
        self._place: dict[int, int] = {}
        self._num_known = 0
        self._masked: list[int] = []
        self._is_counted = bool(params.frequency_penalty or params.presence_penalty)
        self._may_mask = bool(params.bad_words or params.min_tokens)
        if params.allowed_token_ids is not None:
            self.allowed = _bits(params.allowed_token_ids, vocab_size)
        self._add([token for token, _ in params.logit_bias])
        for token, bias in params.logit_bias:
            self.biases[self._place[token]] += bias

    def update(self, row: SampleRow) -> None:
        """For the token that comes next in the row that these are of."""
        known, self._num_known = self._num_known, len(row.tokens)
        if self._is_counted:
            counts = Counter(row.tokens[max(known, row.num_prompt_tokens) :])
            self._add(counts)
            for token, count in counts.items():
                self.counts[self._place[token]] += count
        if self._may_mask:
            for place in self._masked:
                self.flags[place] = 0
            masked = masked_tokens(row, self._vocab_size)
            self._add(masked)
            self._masked = [self._place[token] for token in masked]
            for place in self._masked:
                self.flags[place] = MASKED

    def _add(self, tokens: Collection[int]) -> None:
        """Each gets a place, unless it has one."""
        place = self._place
        new = dict.fromkeys(token for token in tokens if token not in place)
        if new:
            place.update(zip(new, range(len(place), len(place) + len(new)), strict=True))
            self.tokens.extend(new)
            nothing = bytes(4 * len(new))
            for column in (self.biases, self.counts, self.flags):
                column.frombytes(nothing)


def _bits(tokens: Sequence[int], vocab_size: int) -> Bits:
    allowed = np.zeros(-(-vocab_size // 32) * 32, np.uint8)
    allowed[list(tokens)] = 1
    return np.packbits(allowed, bitorder="little").view(np.int32)

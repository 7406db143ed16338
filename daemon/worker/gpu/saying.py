"""What one step says: which work gives it, where it lies, and what it means when it is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quantd.daemon.types import PromptLogprobs, Sampled
from quantd.daemon.worker.gpu.frame import Field
from quantd.daemon.worker.gpu.sampler import DeviceSampler, Logprobs, Outcome
from quantd.daemon.worker.mirror import Wanted, WantedLogprobs
from quantd.daemon.worker.sampler import Bits

_LOGIT_ROWS = 64
"""Rows of the output layer at once for prompt log-probabilities, as on a CPU."""

_SAMPLED, _PROMPT = len(Outcome._fields), len(Logprobs._fields)


class Saying:
    """The tokens of a step's sequences and the log-probabilities of its prompts."""

    def __init__(
        self,
        sampler: DeviceSampler,
        vocab_size: int,
        wanted: Wanted,
        masks: Mapping[int, Bits],
    ) -> None:
        """To be made when the tokens of the step before are in the mirror."""
        self._sampler, self._vocab_size, self._wanted = sampler, vocab_size, wanted
        self._rows = [sequence.row for sequence in wanted.sequences]
        self._plan = sampler.stage(self._rows, masks)
        self.host: list[Tensor] = []
        """Where `fields` are copied to, to be set before `read`."""

    @property
    def arrays(self) -> dict[str, NDArray[Any]]:
        """What the work needs on the device."""
        following = [token for item in self._wanted.logprobs for token in item.tokens]
        return {
            **self._plan.arrays,
            "sampled": np.array(self._wanted.sampled, np.int64),
            "following": np.array(following, np.int64),
        }

    @property
    def fields(self) -> list[Field]:
        """Of the outcome, the tokens first."""
        count, asked = len(self._rows), self._plan.logprobs
        k = self._width(max(asked.values(), default=0))
        sampled = ((torch.int64, (count,)), (torch.float32, (count,)))
        fields: list[Field] = [*sampled, *_logprob_fields(len(asked), k)]
        for item in self._wanted.logprobs:
            fields += _logprob_fields(len(item.tokens), self._width(_asked(item)))
        return fields

    def run(
        self,
        logits: Callable[[Tensor], Tensor],
        hidden: Tensor,
        tensors: Mapping[str, Tensor],
        out: Sequence[Tensor],
    ) -> None:
        """Work of the computing stream. hidden [n, hidden]: the rows that are asked for; out: as
        `fields`."""
        if self._rows:
            every = len(self._rows) == len(hidden)
            rows = hidden if every else hidden.index_select(0, tensors["sampled"])
            outcome = self._sampler.run(logits(rows), tensors, self._plan)
            for target, source in zip(out[:_SAMPLED], outcome, strict=True):
                target.copy_(source)
        at, place = 0, _SAMPLED
        for item in self._wanted.logprobs:
            for start in range(0, len(item.tokens), _LOGIT_ROWS):
                stop = min(start + _LOGIT_ROWS, len(item.tokens))
                following = tensors["following"][at + start : at + stop]
                part = logits(hidden[item.index + start : item.index + stop])
                found = self._sampler.run_prompt(part, following, _asked(item))
                for target, source in zip(out[place : place + _PROMPT], found, strict=True):
                    target[start:stop].copy_(source)
            at, place = at + len(item.tokens), place + _PROMPT

    def read(self) -> tuple[list[Sampled], tuple[PromptLogprobs, ...]]:
        """When the step's mark is reached."""
        outcome = Outcome(*self.host[:_SAMPLED])
        sampled = self._sampler.read(self._plan, outcome, self._rows)
        logprobs, place = [], _SAMPLED
        for item in self._wanted.logprobs:
            found = Logprobs(*self.host[place : place + _PROMPT])
            entries = self._sampler.read_prompt(found, item.tokens, _asked(item))
            logprobs.append(PromptLogprobs(item.sequence.row.seq, item.start, entries))
            place += _PROMPT
        return sampled, tuple(logprobs)

    def _width(self, k: int) -> int:
        return min(k, self._vocab_size)


def _asked(item: WantedLogprobs) -> int:
    k = item.sequence.row.sampling.prompt_logprobs
    assert k is not None
    return k


def _logprob_fields(count: int, k: int) -> list[Field]:
    """As `Logprobs`."""
    return [(torch.float32, (count,)), (torch.int64, (count, k)), (torch.float32, (count, k))]

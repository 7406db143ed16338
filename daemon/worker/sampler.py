"""Logits to tokens, for the sequences of one step.

Order of operations, ties and the generator are specified in `kernels/reference/sampling.py`. A
sequence's next token depends on its logits, its parameters and its tokens so far, and on nothing
else: not on the batch, the step or an earlier call, so a preempted sequence goes on as it would
have. The sampler keeps no state.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quantd.daemon.types import Sampled, SamplingParams, TokenLogprob
from quantd.kernels import ops
from quantd.kernels.reference import sampling as spec

GREEDY_BELOW = 1e-5
"""A lower temperature is greedy, as in vLLM: float32 logits divided by it may overflow."""

_LOGPROB_ROWS = 16
"""Rows whose log-probabilities are in float32 at once: 8 MB at a vocabulary of 128k."""

_MASK_TOKENS = 1 << 21
"""Of how many tokens' masks are a byte each at once: 16 rows at a vocabulary of 128k."""

Bits = NDArray[np.int32]
"""A grammar's mask [ceil(V / 32)]: bit i % 32 of word i // 32 is set where token i is allowed."""
_NO_MASKS: Mapping[int, Bits] = MappingProxyType({})

_SMALL_LOGITS = 1 << 20
"""Logits below which sampling has the caller's thread alone: some hundreds of microseconds."""

_NOT_FINITE = "the model's logits are not finite: {value} is the highest"
_ALL_MASKED = (
    "no token may be sampled: allowed_token_ids, bad_words, min_tokens and the grammar together "
    "exclude the whole vocabulary"
)


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class SampleRow:
    """What one row of logits belongs to. `tokens` is prompt and output so far; it is only read."""

    seq: int
    sampling: SamplingParams
    tokens: list[int]
    num_prompt_tokens: int

    @property
    def num_output_tokens(self) -> int:
        return len(self.tokens) - self.num_prompt_tokens


class Sampler:
    """Samples below `vocab_size`; columns beyond it are padding of the model's output layer."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size

    @torch.inference_mode()
    def sample(
        self, logits: Tensor, rows: Sequence[SampleRow], masks: Mapping[int, Bits] = _NO_MASKS
    ) -> list[Sampled]:
        """One token per row of logits [n, >= vocab_size] (any float dtype, not changed).

        masks: row -> the tokens that its grammar allows.
        A row with NaN or +inf, or in which everything is masked, gets an error in place of a
        token; the other rows are not touched by it.
        """
        if not rows:
            return []
        logits = logits[:, : self._vocab_size]
        if logits.is_cpu and logits.numel() < _SMALL_LOGITS:
            with ops.OnCallerThread():
                return self._sample(logits, rows, masks)
        return self._sample(logits, rows, masks)

    def _sample(
        self, logits: Tensor, rows: Sequence[SampleRow], masks: Mapping[int, Bits]
    ) -> list[Sampled]:
        # max and not argmax, which is six times slower on bfloat16. Both take the lowest id of
        # equals and let NaN win, so the highest value says whether the row is finite.
        highest, ids = logits.max(-1)
        tokens: list[int] = ids.tolist()
        errors = {
            i: not_finite(rows[i].seq, value)
            for i, value in enumerate(highest.tolist())
            if not math.isfinite(value)
        }
        special = [
            i
            for i, row in enumerate(rows)
            if i not in errors and (i in masks or not is_argmax(row.sampling))
        ]
        if special:
            raw = logits if len(special) == len(rows) else logits[special]
            work = raw.to(torch.float32, copy=True)
            _apply_masks(work, [masks.get(i) for i in special])
            chosen = _sample_special(work, [rows[i] for i in special])
            for i, token in zip(special, chosen, strict=True):
                if token is None:
                    errors[i] = all_masked(rows[i].seq)
                else:
                    tokens[i] = token
        return [
            errors[i]
            if i in errors
            else Sampled(row.seq, tokens[i], self._logprob(logits[i], tokens[i], row.sampling))
            for i, row in enumerate(rows)
        ]

    @torch.inference_mode()
    def prompt_logprobs(
        self, logits: Tensor, next_tokens: Sequence[int], k: int
    ) -> tuple[TokenLogprob, ...]:
        """For each row of logits [m, >= vocab_size] the raw log-probability of the token that
        came next, and the k most likely ones. At most 16 rows are in float32 at a time."""
        logits = logits[:, : self._vocab_size]
        entries: list[TokenLogprob] = []
        for start in range(0, len(next_tokens), _LOGPROB_ROWS):
            rows = logits[start : start + _LOGPROB_ROWS].float()
            entries += _token_logprobs(rows, next_tokens[start : start + _LOGPROB_ROWS], k)
        return tuple(entries)

    def _logprob(self, logits: Tensor, token: int, params: SamplingParams) -> TokenLogprob | None:
        if params.logprobs is None:
            return None
        return _token_logprobs(logits[None].float(), [token], params.logprobs)[0]


def not_finite(seq: int, highest: float) -> Sampled:
    """In the place of a token, where the highest logit is no finite number."""
    return Sampled(seq, 0, error=_NOT_FINITE.format(value=highest))


def all_masked(seq: int) -> Sampled:
    """In the place of a token, where none may be chosen."""
    return Sampled(seq, 0, error=_ALL_MASKED, is_excluded=True)


def is_argmax(params: SamplingParams) -> bool:
    """The highest logit is chosen as it came, but for a grammar's mask."""
    return params.temperature < GREEDY_BELOW and not is_edited(params)


def is_edited(params: SamplingParams) -> bool:
    """Logits may be changed before one is chosen."""
    return bool(
        params.allowed_token_ids is not None
        or params.bad_words
        or params.min_tokens
        or params.logit_bias
        or params.repetition_penalty != 1
        or params.frequency_penalty
        or params.presence_penalty
    )


def masked_tokens(row: SampleRow, vocab_size: int) -> list[int]:
    """Tokens that may not come now: the last ones of the bad words that the output is about to
    complete, and stop tokens before min_tokens. May repeat."""
    masked = []
    for *before, last in row.sampling.bad_words:
        start = len(row.tokens) - len(before)
        if start >= row.num_prompt_tokens and row.tokens[start:] == before:
            masked.append(last)
    if row.num_output_tokens < row.sampling.min_tokens:
        # A stop token beyond the vocabulary cannot come, so it needs no mask.
        masked += [token for token in row.sampling.stop_token_ids if token < vocab_size]
    return masked


def _apply_masks(work: Tensor, masks: Sequence[Bits | None]) -> None:
    """work: float32 [m, V], in place. A few rows at a time, as each bit becomes a number."""
    masked = [(i, bits) for i, bits in enumerate(masks) if bits is not None]
    num_rows = max(1, _MASK_TOKENS // work.shape[1])
    for start in range(0, len(masked), num_rows):
        part = masked[start : start + num_rows]
        allowed = _unpacked(np.stack([bits for _, bits in part]), work)
        first, last = part[0][0], part[-1][0]
        if last - first == len(part) - 1:
            spec.keep_allowed(work[first : last + 1], allowed)
        else:
            for i, (row, _) in enumerate(part):
                spec.keep_allowed(work[row : row + 1], allowed[i : i + 1])


def _unpacked(bits: Bits, work: Tensor) -> Tensor:
    """uint8 [n, V] of bits [n, ceil(V / 32)], on the device of work [m, V]."""
    octets, num_tokens = bits.view(np.uint8), work.shape[1]
    if work.device.type == "cpu":  # by numpy, in a tenth of torch's time
        unpacked = np.unpackbits(octets, axis=1, count=num_tokens, bitorder="little")
        return torch.from_numpy(unpacked)
    shifts = torch.arange(8, dtype=torch.uint8, device=work.device)
    spread = torch.from_numpy(octets).to(work.device)[:, :, None] >> shifts
    return (spread & 1).flatten(1)[:, :num_tokens]


def _sample_special(work: Tensor, rows: Sequence[SampleRow]) -> list[int | None]:
    """Tokens for rows that are not plain argmax; None where everything is masked.

    work: float32 [m, V], overwritten.
    """
    for logits, row in zip(work, rows, strict=True):
        _adjust(logits, row)
    highest, ids = work.max(-1)
    tokens: list[int | None] = ids.tolist()
    for i, value in enumerate(highest.tolist()):
        if value == -math.inf:
            tokens[i] = None
    drawn = [
        i
        for i, row in enumerate(rows)
        if tokens[i] is not None and row.sampling.temperature >= GREEDY_BELOW
    ]
    if not drawn:
        return tokens
    if len(drawn) < len(rows):
        work, highest = work[drawn], highest[drawn]
    params = [rows[i].sampling for i in drawn]
    spec.apply_temperature(work, highest, work.new_tensor([p.temperature for p in params]))
    uniform = torch.tensor(
        [
            spec.philox_uniform(p.seed, len(rows[i].tokens))
            for i, p in zip(drawn, params, strict=True)
        ],
        dtype=torch.float64,
        device=work.device,
    )
    for i, token in zip(drawn, _draw(work, params, uniform), strict=True):
        tokens[i] = token
    return tokens


def _draw(z: Tensor, params: Sequence[SamplingParams], uniform: Tensor) -> list[int]:
    """Filter and choose: z [m, V] (highest value 0), uniform float64 [m]."""
    filtered = [i for i, p in enumerate(params) if p.top_k or p.top_p < 1 or p.min_p]
    if not filtered:
        whole: list[int] = spec.choose(z, uniform).tolist()
        return whole
    tokens = [0] * len(params)
    for i in filtered:
        ids = spec.kept_tokens(z[i], params[i].top_k, params[i].top_p, params[i].min_p)
        tokens[i] = int(ids[spec.choose(z[i, ids][None], uniform[i : i + 1])])
    plain = sorted(set(range(len(params))).difference(filtered))
    if plain:
        for i, token in zip(plain, spec.choose(z[plain], uniform[plain]).tolist(), strict=True):
            tokens[i] = token
    return tokens


def _adjust(logits: Tensor, row: SampleRow) -> None:
    """Masks, bias and penalties of one row; logits float32 [V], in place."""
    params = row.sampling

    def ids(tokens: Iterable[int]) -> Tensor:
        return torch.tensor(list(tokens), dtype=torch.int64, device=logits.device)

    if params.allowed_token_ids is not None:
        spec.keep_only(logits, ids(params.allowed_token_ids))
    masked = masked_tokens(row, len(logits))
    if masked:
        spec.mask_tokens(logits, ids(masked))
    if params.logit_bias:
        biased, bias = zip(*params.logit_bias, strict=True)
        spec.add_bias(logits, ids(biased), logits.new_tensor(bias))
    if params.repetition_penalty != 1:
        spec.apply_repetition_penalty(logits, ids(set(row.tokens)), params.repetition_penalty)
    if params.frequency_penalty or params.presence_penalty:
        counts = Counter(row.tokens[row.num_prompt_tokens :])
        spec.apply_output_penalties(
            logits,
            ids(counts),
            logits.new_tensor(list(counts.values())),
            params.frequency_penalty,
            params.presence_penalty,
        )


def _token_logprobs(rows: Tensor, tokens: Sequence[int], k: int) -> list[TokenLogprob]:
    """rows: raw logits, float32 [m, V]. Ordered by logit, equal ones by id."""
    logprobs = rows.log_softmax(-1)
    chosen = logprobs.gather(1, torch.tensor(list(tokens), device=rows.device)[:, None])
    entries = []
    for i, value in enumerate(chosen[:, 0].tolist()):
        top = spec.top_tokens(rows[i], k)
        pairs = zip(top.tolist(), logprobs[i, top].tolist(), strict=True)
        entries.append(TokenLogprob(tokens[i], value, tuple(pairs)))
    return entries

"""What a step brought to a sequence, as the engine hears of it."""

from __future__ import annotations

import msgspec

from quantd.daemon.scheduler.sequence import Sequence
from quantd.daemon.types import FinishReason, PromptLogprobs, Sampled, TokenLogprob


class SequenceUpdate(msgspec.Struct, frozen=True, gc=False):
    """What one step brought to one sequence: a token, or its end by an error."""

    seq: Sequence
    tokens: tuple[int, ...] = ()
    """In order. A stop token that ended the sequence is the last of them, and counts as output;
    finish_reason "stop" without `complete` means just that, so whoever makes text leaves the last
    token out."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """One per token when asked for, else empty."""
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
    """In the sequence's first update only, one per prompt token, when asked for."""
    finish_reason: FinishReason | None = None
    error: str | None = None
    complete: bool = False
    """With "stop": the grammar is complete, and the last token is text."""


def finish_reason(seq: Sequence, sampled: Sampled, max_context: int) -> FinishReason | None:
    """Whether a sequence, to which the token was appended just now, has ended with it."""
    # No stop token before min_tokens: the sampler sees to that.
    if sampled.complete or sampled.token in seq.stop_token_ids:
        return "stop"
    max_tokens = seq.request.sampling.max_tokens
    if seq.num_output_tokens >= max_tokens or len(seq.tokens) >= max_context:
        return "length"
    return None


def keep_prompt_logprobs(seq: Sequence, part: PromptLogprobs) -> None:
    """Append those that are new: a prompt that is computed again says the same again."""
    kept = seq.prompt_logprobs
    if not kept:
        kept.append(None)
    assert part.start <= len(kept), "a gap in the prompt's logprobs"
    kept.extend(part.entries[len(kept) - part.start :])

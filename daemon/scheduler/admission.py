"""Who is let into the queue: refuses what can never run, and what is over the queue's bound."""

from __future__ import annotations

from quantd.daemon.errors import ContextLengthExceeded, QueueFull, RequestError
from quantd.daemon.kv.window import Window
from quantd.daemon.scheduler.scheduler import Scheduler
from quantd.daemon.scheduler.sequence import blocks_for
from quantd.daemon.types import BLOCK_TOKENS, ModelInfo, Request

MIN_RETRY_SECONDS = 1.0
"""Retry-After is in whole seconds, and 0 would invite a busy loop."""


def usable_context(info: ModelInfo) -> int:
    """Most tokens of one sequence: what the model can and what the pool can hold.

    Where a caller gives no max_tokens, the output may go on to here.
    """
    most = _window(info).most_blocks(info.num_blocks)
    if most is None or most > info.max_blocks > 0:
        most = info.max_blocks
    # One more than the pool holds, because the last token is sampled and never computed.
    return min(info.max_context, most * BLOCK_TOKENS + 1)


def _window(info: ModelInfo) -> Window:
    return Window(info.window, info.window_share)


def check(request: Request, info: ModelInfo, scheduler: Scheduler, now: float) -> None:
    """Raise RequestError, ContextLengthExceeded or QueueFull; else the request may be added."""
    # What comes in the place of a token takes no place.
    check_context(request, info.max_context + (info.pooling is not None))
    check_pool(request, info)
    check_queue(request, scheduler, now)


def check_context(request: Request, max_context: int) -> None:
    prompt, completion = len(request.prompt), request.sampling.max_tokens
    if prompt == 0:
        raise RequestError("The prompt is empty: it must have at least one token.", param="prompt")
    if prompt + completion <= max_context:
        return
    hint = "Please reduce the length of the prompt."
    if prompt < max_context:
        hint = "Please reduce the length of the prompt or completion."
    raise ContextLengthExceeded(
        f"This model's maximum context length is {max_context} tokens. However, you requested "
        f"{prompt + completion} tokens ({prompt} in the prompt, {completion} in the completion). "
        f"{hint}",
        param="prompt" if prompt >= max_context else "max_tokens",
    )


def check_pool(request: Request, info: ModelInfo) -> None:
    prompt, completion = len(request.prompt), request.sampling.max_tokens
    cost = _window(info).cost
    needed = cost(blocks_for(prompt + completion - 1))
    if needed <= info.num_blocks:
        return
    raise RequestError(
        f"The request needs {prompt + completion} tokens ({prompt} in the prompt, {completion} in "
        f"the completion), which is {needed} KV blocks of {BLOCK_TOKENS} tokens, and there are "
        f"{info.num_blocks} in all. Ask for fewer tokens, or set kv_bytes of the model to at least "
        f"{needed * info.block_bytes}.",
        param="prompt" if cost(blocks_for(len(request.prompt))) > info.num_blocks else "max_tokens",
        code="kv_cache_too_small",
    )


def check_queue(request: Request, scheduler: Scheduler, now: float) -> None:
    """Lines of batches and all others each have the bound for themselves."""
    lines, bound = scheduler.num_lines_waiting, scheduler.settings.max_waiting
    waiting = lines if request.is_batch else scheduler.num_waiting - lines
    if waiting < bound:
        return
    pace = scheduler.seconds_per_start(now)
    retry_after = max(MIN_RETRY_SECONDS, pace)
    raise QueueFull(
        f"The queue is full: {waiting} requests wait and max_waiting is {bound}. At the present "
        f"pace a place becomes free every {pace:.3g} s; try again in {retry_after:.0f} s.",
        retry_after=retry_after,
    )

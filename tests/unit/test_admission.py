"""Who is let in, and the words and numbers with which others are refused."""

from __future__ import annotations

import pytest
from fakes import StepLoop, make_request, model_info
from msgspec.structs import replace

from quantd.daemon.config import SchedulerSettings
from quantd.daemon.errors import ContextLengthExceeded, QueueFull, RequestError
from quantd.daemon.scheduler import admission
from quantd.daemon.scheduler.sequence import Sequence


def check(num_prompt_tokens: int, max_tokens: int, *, num_blocks: int, max_context: int) -> None:
    loop = StepLoop(num_blocks=num_blocks, max_context=max_context)
    info = model_info(num_blocks=num_blocks, max_context=max_context)
    request = make_request([1] * num_prompt_tokens, max_tokens=max_tokens)
    admission.check(request, info, loop.scheduler, now=0.0)
    # Whoever is let in is served, alone at least.
    loop.scheduler.add(Sequence(0, request))
    loop.sequences[0] = Sequence(0, request)
    loop.outputs[0] = []
    loop.run()
    assert len(loop.outputs[0]) == max_tokens


@pytest.mark.parametrize(("prompt", "completion"), [(99, 1), (1, 99), (50, 50)])
def test_what_just_fits_the_context_is_let_in_and_served(prompt: int, completion: int) -> None:
    check(prompt, completion, num_blocks=64, max_context=100)


@pytest.mark.parametrize(
    ("prompt", "completion", "param"),
    [(100, 1, "prompt"), (1000, 5, "prompt"), (60, 41, "max_tokens")],
)
def test_over_the_context(prompt: int, completion: int, param: str) -> None:
    with pytest.raises(ContextLengthExceeded) as caught:
        check(prompt, completion, num_blocks=64, max_context=100)
    assert caught.value.message.startswith(
        "This model's maximum context length is 100 tokens. However, you requested "
        f"{prompt + completion} tokens ({prompt} in the prompt, {completion} in the completion). "
    )
    what = "prompt" if prompt >= 100 else "prompt or completion"
    assert caught.value.message.endswith(f" Please reduce the length of the {what}.")
    assert caught.value.param == param
    assert caught.value.error_code == "context_length_exceeded"


def test_an_empty_prompt() -> None:
    with pytest.raises(RequestError, match="empty") as caught:
        check(0, 5, num_blocks=64, max_context=100)
    assert caught.value.param == "prompt"


@pytest.mark.parametrize(("prompt", "completion"), [(64, 1), (1, 64), (33, 32)])
def test_what_just_fits_the_pool_is_let_in_and_served(prompt: int, completion: int) -> None:
    check(prompt, completion, num_blocks=4, max_context=1000)


@pytest.mark.parametrize(
    ("prompt", "completion", "param"), [(65, 1, "prompt"), (33, 33, "max_tokens")]
)
def test_over_the_pool(prompt: int, completion: int, param: str) -> None:
    with pytest.raises(RequestError) as caught:
        check(prompt, completion, num_blocks=4, max_context=1000)
    info = model_info(num_blocks=4)
    message = caught.value.message
    assert f"needs {prompt + completion} tokens" in message
    assert "5 KV blocks of 16 tokens, and there are 4 in all" in message
    assert f"kv_bytes of the model to at least {5 * info.block_bytes}." in message
    assert caught.value.param == param


def test_the_usable_context_is_admitted_and_one_more_is_not() -> None:
    info = model_info(num_blocks=4, max_context=1000)
    usable = admission.usable_context(info)
    check(10, usable - 10, num_blocks=4, max_context=1000)
    with pytest.raises(RequestError):
        check(10, usable - 9, num_blocks=4, max_context=1000)
    assert admission.usable_context(model_info(num_blocks=64, max_context=100)) == 100


@pytest.mark.parametrize(
    ("num_blocks", "max_blocks", "share", "usable"),
    [
        (10, 0, 0.0, 161),
        (10, 50, 0.0, 161),  # more can be given to it later
        (10, 50, 0.5, (4 + 2 * 6) * 16 + 1),
        (10, 12, 0.5, 12 * 16 + 1),
        (10, 50, 1.0, 50 * 16 + 1),
        (3, 50, 1.0, 3 * 16 + 1),
        (10, 100, 1.0, 1000),
    ],
)
def test_the_usable_context_with_sliding_windows(
    num_blocks: int, max_blocks: int, share: float, usable: int
) -> None:
    """Behind a window of two blocks, and two more, a block costs what is not trimmed of it; but
    there are no more ids of blocks than `max_blocks`."""
    info = replace(
        model_info(num_blocks=num_blocks, max_context=1000),
        max_blocks=max_blocks,
        window=32,
        window_share=share,
    )
    assert admission.usable_context(info) == usable
    request = make_request([1], max_tokens=usable - 1)
    admission.check_pool(request, info)


def full_queue() -> StepLoop:
    """One runs for long and three wait, with a start every two seconds until then."""
    loop = StepLoop(settings=SchedulerSettings(max_running=1, max_waiting=3))
    for _ in range(4):
        loop.add(5, max_tokens=2)
    while loop.scheduler.has_work:
        loop.clock.advance(1.0)
        loop.step()
    for _ in range(4):
        loop.add(5, max_tokens=100)
    loop.clock.advance(1.0)
    loop.step()
    return loop


def test_a_full_queue_says_when_to_come_back() -> None:
    loop = full_queue()
    request, info = make_request([1]), model_info()
    with pytest.raises(QueueFull, match="3 requests wait and max_waiting is 3") as caught:
        admission.check(request, info, loop.scheduler, loop.clock())
    assert caught.value.retry_after == pytest.approx(1.6)  # starts after 1, 2, 2, 2 and 1 s
    loop.clock.advance(50)
    with pytest.raises(QueueFull) as caught:
        admission.check(request, info, loop.scheduler, loop.clock())
    assert caught.value.retry_after == 50


def test_an_idle_hour_before_the_queue_filled_is_no_wait() -> None:
    loop = StepLoop(settings=SchedulerSettings(max_running=1, max_waiting=3))
    loop.add(5, max_tokens=1)
    loop.run()
    loop.clock.advance(3600)
    for _ in range(4):
        loop.add(5, max_tokens=100)
    loop.clock.advance(2.0)
    loop.step()
    with pytest.raises(QueueFull) as caught:
        admission.check(make_request([1]), model_info(), loop.scheduler, loop.clock())
    assert caught.value.retry_after == 1.0  # the mean of 0 and 2


def test_a_place_that_becomes_free_is_given_again() -> None:
    loop = full_queue()
    loop.scheduler.abort(max(loop.sequences))
    admission.check(make_request([1]), model_info(), loop.scheduler, loop.clock())


def test_what_never_fits_is_not_told_to_come_back() -> None:
    loop = full_queue()
    request = make_request([1] * 600)
    with pytest.raises(ContextLengthExceeded):
        admission.check(request, model_info(max_context=512), loop.scheduler, loop.clock())

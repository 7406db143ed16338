"""A stream merges what its reader does not take, and ends once."""

from __future__ import annotations

import asyncio

import pytest

from quantd.daemon.engine.stream import Leaving, TokenStream
from quantd.daemon.types import TokenEvent, TokenLogprob


def stream() -> TokenStream:
    return TokenStream(lambda reason: None)


async def test_a_prompt_reader_gets_each_event() -> None:
    tokens = stream()
    tokens.push([1])
    assert await anext(tokens) == TokenEvent(tokens=(1,))
    tokens.push([2])
    tokens.finish("stop")
    assert await anext(tokens) == TokenEvent(tokens=(2,), finish_reason="stop")
    with pytest.raises(StopAsyncIteration):
        await anext(tokens)


async def test_a_slow_reader_gets_one_event_with_everything() -> None:
    tokens = stream()
    logprobs = [TokenLogprob(token, -1.0) for token in range(1000)]
    for token in range(1000):
        tokens.push([token], [logprobs[token]], (None, logprobs[0]) if token == 0 else ())
    tokens.finish("length")
    events = [event async for event in tokens]
    assert events == [
        TokenEvent(tuple(range(1000)), tuple(logprobs), (None, logprobs[0]), "length")
    ]


async def test_the_last_event_says_that_its_last_token_is_text() -> None:
    tokens = stream()
    tokens.push([1])
    assert not (await anext(tokens)).complete
    tokens.push([2])
    tokens.finish("stop", complete=True)
    assert await anext(tokens) == TokenEvent((2,), finish_reason="stop", complete=True)


async def test_the_prompts_logprobs_come_once() -> None:
    tokens = stream()
    tokens.push([1], [], (None, TokenLogprob(2, -1.0)))
    assert (await anext(tokens)).prompt_logprobs == (None, TokenLogprob(2, -1.0))
    tokens.push([2])
    assert (await anext(tokens)).prompt_logprobs == ()


async def test_a_waiting_reader_wakes() -> None:
    tokens = stream()
    reader = asyncio.ensure_future(anext(tokens))
    await asyncio.sleep(0)
    assert not reader.done()
    tokens.push([7])
    assert await reader == TokenEvent(tokens=(7,))


async def test_an_error_comes_after_the_tokens_before_it() -> None:
    tokens = stream()
    tokens.push([1, 2])
    tokens.finish("error", "the worker died")
    events = [event async for event in tokens]
    assert events == [TokenEvent((1, 2), finish_reason="error", error="the worker died")]


@pytest.mark.parametrize("reason", ["abort", "stop"])
async def test_leaving_is_told_once_and_not_after_the_end(reason: Leaving) -> None:
    told: list[Leaving] = []

    def on_leave(reason: Leaving) -> None:
        told.append(reason)
        tokens.finish(reason)

    tokens = TokenStream(on_leave)
    tokens.stop() if reason == "stop" else tokens.abort()
    tokens.stop()
    tokens.abort()
    await tokens.aclose()
    assert told == [reason]
    assert [event.finish_reason async for event in tokens] == [reason]
    finished = TokenStream(on_leave)
    finished.finish("stop")
    finished.stop()
    await finished.aclose()
    assert told == [reason] and finished.is_finished

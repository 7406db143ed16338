"""POST /v1/completions: prompt forms, echo, logprobs as lm-eval reads them."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from fakes import ManualClock
from server_fakes import BOS, END, EOS, Answer, FakeFleet, fake_info, logprob_of, serving, spoken

from quantd.daemon.server.context import Clock

URL = "/v1/completions"


async def test_the_whole_reply() -> None:
    async with serving() as served:
        status, reply = await served.post(URL, {"prompt": "ab"})
        assert status == 200
        assert reply.pop("id").startswith("cmpl-")
        assert isinstance(reply.pop("created"), int)
        assert reply == {
            "object": "text_completion",
            "model": "org/tiny",
            "choices": [
                {
                    "index": 0,
                    "text": "ok",
                    "logprobs": None,
                    "finish_reason": "stop",
                    "stop_reason": None,
                }
            ],
            "usage": {
                "prompt_tokens": 3,
                "completion_tokens": 3,
                "total_tokens": 6,
                "prompt_tokens_details": {"cached_tokens": 0},
                "completion_tokens_details": {"reasoning_tokens": 0},
            },
        }
        assert served.engine.requests[0].sampling.max_tokens == 16


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("ab", [(BOS, 97, 98)]),
        (["ab", "c"], [(BOS, 97, 98), (BOS, 99)]),
        ([97, 98], [(97, 98)]),
        ([[97, 98], [99]], [(97, 98), (99,)]),
    ],
)
async def test_prompt_forms(prompt: Any, expected: list[tuple[int, ...]]) -> None:
    async with serving() as served:
        served.engine.answer = lambda request: spoken(request.id[-1])
        status, reply = await served.post(URL, {"prompt": prompt})
        assert status == 200
        assert [request.prompt for request in served.engine.requests] == expected
        assert [c["index"] for c in reply["choices"]] == list(range(len(expected)))
        assert reply["usage"]["prompt_tokens"] == sum(map(len, expected))


async def test_choices_are_counted_prompt_by_prompt() -> None:
    async with serving() as served:
        served.engine.answer = lambda request: spoken(request.id[-1])
        _, reply = await served.post(URL, {"prompt": ["a", "b"], "n": 2, "seed": 1})
        assert [c["text"] for c in reply["choices"]] == ["0", "1", "2", "3"]
        requests = served.engine.requests
        assert [chr(request.prompt[1]) for request in requests] == ["a", "a", "b", "b"]
        seeds = [request.sampling.seed for request in requests]
        assert seeds[:2] == seeds[2:]
        assert seeds[0] != seeds[1]
        assert reply["usage"]["prompt_tokens"] == 4


BAD: list[tuple[dict[str, Any], str]] = [
    ({}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": ["a", 1]}, "prompt"),
    ({"prompt": [[1], "a"]}, "prompt"),
    ({"prompt": [1.5]}, "prompt[0]"),
    ({"prompt": [[1, "a"]]}, "prompt[0][1]"),
    ({"prompt": {"a": 1}}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [260]}, "prompt"),
    ({"prompt": [[97], [10**30]]}, "prompt"),
    ({"prompt": ["a"] * 2049}, "prompt"),
    ({"prompt": "", "add_special_tokens": False}, "prompt"),
    ({"prompt": "a", "suffix": "b"}, "suffix"),
    ({"prompt": "a", "prompt_embeds": "x"}, "prompt_embeds"),
    ({"prompt": "a", "logprobs": 21}, "logprobs"),
    ({"prompt": "a", "logprobs": -1}, "logprobs"),
    ({"prompt": "a", "logprobs": True}, "logprobs"),
    ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
    ({"prompt": "a", "best_of": 3}, "best_of"),
    ({"prompt": "a", "n": 3, "best_of": 2}, "best_of"),
    ({"prompt": "a", "echo": "yes"}, "echo"),
    ({"prompt": "a", "response_format": {"type": "xml"}}, "response_format"),
    ({"prompt": "a", "guided_regex": "("}, "guided_regex"),
]


@pytest.mark.parametrize(("body", "param"), BAD)
async def test_bad_fields(body: dict[str, Any], param: str) -> None:
    async with serving() as served:
        error = await served.error(URL, body)
        assert error["param"] == param


async def test_empty_suffix_asks_for_nothing() -> None:
    async with serving() as served:
        assert (await served.post(URL, {"prompt": "a", "suffix": ""}))[0] == 200


async def test_default_max_tokens_gives_way_to_the_context() -> None:
    async with serving(fleet=FakeFleet(info=fake_info(10))) as served:
        await served.post(URL, {"prompt": "abcd"})
        await served.post(URL, {"prompt": "abcd", "max_tokens": 16})
        first, second = served.engine.requests
        assert first.sampling.max_tokens == 5
        assert second.sampling.max_tokens == 16  # the caller's word: admission judges it


async def test_echo_with_logprobs_aligns() -> None:
    async with serving() as served:
        served.engine.answer = lambda request: spoken("c")
        body = {"prompt": "ab", "echo": True, "logprobs": 1, "max_tokens": 1}
        _, reply = await served.post(URL, body)
        choice = reply["choices"][0]
        assert choice["text"] == "abc"
        assert choice["logprobs"] == {
            "text_offset": [0, 0, 1, 2],
            "token_logprobs": [None, -0.97, -0.98, -0.99],
            "tokens": ["<s>", "a", "b", "c"],
            "top_logprobs": [
                None,
                {"\x00": 0.0, "a": -0.97},
                {"\x00": 0.0, "b": -0.98},
                {"\x00": 0.0, "c": -0.99},
            ],
        }
        sampling = served.engine.requests[0].sampling
        assert (sampling.logprobs, sampling.prompt_logprobs) == (1, 1)


@pytest.mark.parametrize("skips", [True, False])
async def test_echo_of_special_tokens_that_the_caller_has_written(skips: bool) -> None:
    async with serving() as served:
        served.engine.answer = lambda request: spoken("c")
        body = {"prompt": "a<end>b", "echo": True, "logprobs": 0, "skip_special_tokens": skips}
        _, reply = await served.post(URL, body)
        choice = reply["choices"][0]
        assert choice["text"] == "a<end>bc"
        assert choice["logprobs"]["tokens"] == ["<s>", "a", "<end>", "b", "c"]
        assert choice["logprobs"]["text_offset"] == [0, 0, 1, 6, 7]


async def test_echo_of_token_ids_decodes_them() -> None:
    async with serving() as served:
        served.engine.answer = lambda request: spoken("!")
        body = {"prompt": [97, 98], "echo": True, "logprobs": 0, "max_tokens": 1}
        _, reply = await served.post(URL, body)
        choice = reply["choices"][0]
        assert choice["text"] == "ab!"
        assert choice["logprobs"]["tokens"] == ["a", "b", "!"]
        assert choice["logprobs"]["token_logprobs"] == [None, -0.98, -0.33]
        assert choice["logprobs"]["top_logprobs"][1] == {"b": -0.98}


async def test_echo_and_no_output() -> None:
    async with serving() as served:
        body = {"prompt": ["ab", "c"], "echo": True, "logprobs": 2, "max_tokens": 0}
        _, reply = await served.post(URL, body)
        assert [c["text"] for c in reply["choices"]] == ["ab", "c"]
        assert [c["finish_reason"] for c in reply["choices"]] == ["length", "length"]
        assert [len(c["logprobs"]["tokens"]) for c in reply["choices"]] == [3, 2]
        assert reply["usage"]["completion_tokens"] == 0
        assert served.engine.requests[0].sampling.max_tokens == 1


async def test_lm_eval_finds_the_greedy_token() -> None:
    """Its parse_logprobs: slice off the context and the generated token, then compare each token
    with the best of its top ones."""
    async with serving() as served:
        served.engine.answer = lambda request: spoken("c")
        body = {"prompt": [97, 0, 0xC3, 0xA9], "echo": True, "logprobs": 1, "max_tokens": 1}
        _, reply = await served.post(URL, body)
        logprobs = reply["choices"][0]["logprobs"]
        tokens = logprobs["tokens"][1:-1]
        assert tokens == ["\x00", "bytes:\\xc3", "bytes:\\xa9"]
        assert logprobs["token_logprobs"][1:-1] == [
            logprob_of(token, 0).logprob for token in (0, 0xC3, 0xA9)
        ]
        greedy = []
        for token, top in zip(tokens, logprobs["top_logprobs"][1:-1], strict=True):
            greedy.append(max(top, key=top.__getitem__) == token)
        assert greedy == [True, False, False]


@pytest.mark.parametrize("stream", [False, True])
async def test_lm_eval_finds_one_generated_token_also_when_it_is_the_end(stream: bool) -> None:
    """Without it the prompt's last token was taken for the generated one."""
    async with serving() as served:
        served.engine.answer = lambda request: spoken("", "stop")
        body = {"prompt": "ab", "echo": True, "logprobs": 1, "max_tokens": 1}
        if stream:
            chunks = await served.chunks(URL, {**body, "stream": True})
            choices = [choice for chunk in chunks for choice in chunk["choices"]]
        else:
            choices = (await served.post(URL, body))[1]["choices"]
        assert "".join(choice["text"] for choice in choices) == "ab"
        made = [choice["logprobs"] for choice in choices if choice["logprobs"]]
        assert [name for each in made for name in each["tokens"]] == ["<s>", "a", "b", "</s>"]
        assert [at for each in made for at in each["text_offset"]] == [0, 0, 1, 2]


async def test_offsets_of_output_count_from_the_returned_text() -> None:
    async with serving() as served:
        served.engine.answer = lambda request: spoken("é!x")
        _, reply = await served.post(URL, {"prompt": "ab", "logprobs": 0})
        assert reply["choices"][0]["logprobs"]["text_offset"] == [0, 0, 1, 2]


async def test_a_prompt_that_ends_inside_a_character() -> None:
    async with serving() as served:
        served.engine.answer = lambda request: Answer([b"\xa9", b"!"], "length")
        body = {"prompt": [97, 0xC3], "echo": True}
        _, reply = await served.post(URL, body)
        assert reply["choices"][0]["text"] == "aé!"
        body = {"prompt": [97, 0xC3], "echo": True, "max_tokens": 0}
        _, reply = await served.post(URL, body)
        assert reply["choices"][0]["text"] == "a�"


async def test_streamed_echo_is_the_same_in_pieces() -> None:
    async with serving() as served:
        served.engine.answer = lambda request: spoken("cdé")
        body = {"prompt": "ab", "echo": True, "logprobs": 1, "max_tokens": 5}
        _, reply = await served.post(URL, body)
        whole = reply["choices"][0]
        chunks = await served.chunks(URL, {**body, "stream": True})
        choices = [choice for chunk in chunks for choice in chunk["choices"]]
        assert "".join(choice["text"] for choice in choices) == whole["text"]
        parts = [choice["logprobs"] for choice in choices if choice["logprobs"]]
        for name, values in whole["logprobs"].items():
            assert [value for part in parts for value in part[name]] == values
        assert len(parts) > 1


async def test_streamed_echo_without_output() -> None:
    async with serving() as served:
        body = {"prompt": "ab", "echo": True, "max_tokens": 0, "stream": True}
        chunks = await served.chunks(URL, body)
        assert "".join(c["choices"][0]["text"] for c in chunks) == "ab"
        assert chunks[-1]["choices"][0]["finish_reason"] == "length"


async def test_skip_special_tokens_off_shows_them() -> None:
    async with serving() as served:
        served.engine.answer = lambda request: Answer([(258, 97)], "length")
        _, reply = await served.post(URL, {"prompt": "a", "skip_special_tokens": False})
        assert reply["choices"][0]["text"] == "<end>a"
        _, reply = await served.post(URL, {"prompt": "a"})
        assert reply["choices"][0]["text"] == "a"


async def test_token_ids_for_each_choice() -> None:
    async with serving() as served:
        served.engine.answer = lambda request: spoken("x")
        _, reply = await served.post(URL, {"prompt": ["a", "b"], "return_token_ids": True})
        assert [c["token_ids"] for c in reply["choices"]] == [[120], [120]]
        assert [c["prompt_token_ids"] for c in reply["choices"]] == [[BOS, 97], [BOS, 98]]
        body = {"prompt": ["a", "b"], "return_token_ids": True, "stream": True}
        seen = {}
        for chunk in await served.chunks(URL, body):
            for choice in chunk["choices"]:
                is_first = choice["index"] not in seen
                assert is_first == ("prompt_token_ids" in choice)
                seen.setdefault(choice["index"], choice.get("prompt_token_ids"))
        assert seen == {0: [BOS, 97], 1: [BOS, 98]}


async def test_a_stream_has_every_token_id_also_those_without_text() -> None:
    async with serving() as served:
        events = [(120,), (EOS,), (0xC3,), (EOS, END)]
        served.engine.answer = lambda request: Answer(events, "length")
        body = {"prompt": "a", "max_tokens": 5, "ignore_eos": True, "return_token_ids": True}
        _, reply = await served.post(URL, body)
        whole = reply["choices"][0]["token_ids"]
        assert whole == [120, EOS, 0xC3, EOS, END]
        chunks = await served.chunks(URL, {**body, "stream": True})
        parts = [c.get("token_ids", []) for chunk in chunks for c in chunk["choices"]]
        assert [token for part in parts for token in part] == whole


@pytest.mark.parametrize("stream", [False, True])
async def test_a_timeout_counts_while_the_model_loads(stream: bool) -> None:
    fleet, now = FakeFleet(), ManualClock(100.0)
    fleet.open.clear()
    async with serving(fleet=fleet, clock=Clock(monotonic=now)) as served:
        body = {"prompt": "a", "timeout": 0.1, "stream": stream}
        status, reply = await served.post(URL, body)
        assert (status, reply["error"]["code"]) == (422, "deadline_exceeded")
        assert reply["error"]["param"] == "timeout"
        told = "the timeout of 0.1 s is over: the model was still being loaded"
        assert reply["error"]["message"] == told
        assert (fleet.num_leases, fleet.num_waiting, served.engine.requests) == (0, 0, [])
        task = asyncio.create_task(served.post(URL, body | {"timeout": 60, "stream": False}))
        while not fleet.num_waiting:
            await asyncio.sleep(0.01)
        now.advance(7.0)
        fleet.open.set()
        assert (await task)[0] == 200
        (request,) = served.engine.requests
        # The wait is part of the timeout, and not of the time in the queue.
        assert (request.timeout, request.arrival, request.deadline) == (60, 107.0, 160.0)


SALTS = [("", "1 to 256 characters"), ("x" * 257, "1 to 256 characters")]


@pytest.mark.parametrize(("salt", "word"), SALTS)
async def test_a_salt_has_bounds(salt: str, word: str) -> None:
    async with serving() as served:
        error = await served.error(URL, {"prompt": "a", "cache_salt": salt})
        assert error["param"] == "cache_salt" and word in error["message"]
        assert served.engine.requests == []


async def test_a_salt_reaches_the_engine_and_is_text() -> None:
    async with serving() as served:
        for salt in ("x", "é" * 256, None):
            assert (await served.post(URL, {"prompt": "a", "cache_salt": salt}))[0] == 200
            assert served.engine.requests[-1].cache_salt == (salt or "")
        for wrong in (1, True, ["x"], {"a": 1}):
            error = await served.error(URL, {"prompt": "a", "cache_salt": wrong})
            assert error["param"] == "cache_salt"

"""POST /v1/chat/completions in one piece: fields, messages, usage, logprobs, stop strings."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from server_fakes import (
    BOS,
    EOS,
    Answer,
    FakeFleet,
    byte_text_model,
    fake_info,
    serving,
    spoken,
)

from quantd.daemon.errors import ContextLengthExceeded, QueueFull
from quantd.daemon.types import TokenEvent, TokenLogprob

CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "hi"}]}


def prompt_text(prompt: tuple[int, ...]) -> str:
    assert prompt[0] == BOS
    return bytes(prompt[1:]).decode()


async def test_the_whole_reply() -> None:
    async with serving() as served:
        status, reply = await served.post(CHAT, {**HELLO, "model": "tiny"})
        assert status == 200
        assert reply.pop("id").startswith("chatcmpl-")
        assert reply.pop("created") > 1_700_000_000
        num_prompt = len("[user]hi[assistant]") + 1
        assert reply == {
            "object": "chat.completion",
            "model": "org/tiny",
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": "ok", "refusal": None},
                    "logprobs": None,
                    "finish_reason": "stop",
                    "stop_reason": None,
                }
            ],
            "usage": {
                "prompt_tokens": num_prompt,
                "completion_tokens": 3,
                "total_tokens": num_prompt + 3,
                "prompt_tokens_details": {"cached_tokens": 0},
                "completion_tokens_details": {"reasoning_tokens": 0},
            },
        }
        assert served.fleet.num_leases == 0


async def test_all_roles_and_text_parts_reach_the_template() -> None:
    messages = [
        {"role": "system", "content": "s"},
        {"role": "developer", "content": "d"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
            ],
        },
        {"role": "tool", "tool_call_id": "1", "content": "t"},
    ]
    async with serving() as served:
        status, _ = await served.post(CHAT, {"messages": messages})
        assert status == 200
        assert prompt_text(served.engine.requests[0].prompt) == (
            "[system]s[system]d[user]a\nb[assistant][tool]t[assistant]"
        )


async def test_continue_final_message() -> None:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "an"}]
    async with serving() as served:
        body = {"messages": messages, "continue_final_message": True}
        assert (await served.post(CHAT, body))[0] == 200
        assert prompt_text(served.engine.requests[0].prompt) == "[user]q[assistant]an"


async def test_every_sampling_field_arrives() -> None:
    body = {
        **HELLO,
        "max_completion_tokens": 20.0,
        "max_tokens": 7,
        "temperature": 0,
        "top_p": 0.5,
        "seed": -1,
        "presence_penalty": 1,
        "frequency_penalty": -1.5,
        "logit_bias": {"65": -100, "66": 2.5},
        "top_k": 4,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "min_tokens": 2,
        "stop_token_ids": [65],
        "allowed_token_ids": [65, 66],
        "bad_words": ["x"],
        "priority": -3,
        "logprobs": True,
        "top_logprobs": 2,
        "request_id": "mine",
    }
    async with serving() as served:
        status, reply = await served.post(CHAT, body)
        assert status == 200
        assert reply["id"] == "chatcmpl-mine"
        request = served.engine.requests[0]
        assert request.id == "chatcmpl-mine-0"
        assert request.priority == -3
        sampling = request.sampling
        assert (sampling.max_tokens, sampling.min_tokens, sampling.top_k) == (20, 2, 4)
        assert (sampling.temperature, sampling.top_p, sampling.min_p) == (0.0, 0.5, 0.1)
        assert (sampling.presence_penalty, sampling.frequency_penalty) == (1.0, -1.5)
        assert sampling.repetition_penalty == 1.2
        assert sampling.logit_bias == ((65, -100.0), (66, 2.5))
        assert sampling.stop_token_ids == (EOS, 65)
        assert sampling.allowed_token_ids == (65, 66)
        assert sampling.bad_words == ((ord("x"),), (ord(" "), ord("x")))
        assert (sampling.logprobs, sampling.prompt_logprobs) == (2, None)
        assert sampling.seed == 2**64 - 1


async def test_absent_max_tokens_is_to_the_end_of_the_context() -> None:
    async with serving() as served:
        await served.post(CHAT, {**HELLO, "ignore_eos": True, "max_tokens": None})
        request = served.engine.requests[0]
        assert request.sampling.max_tokens == 512 - len(request.prompt)
        assert request.sampling.stop_token_ids == ()


async def test_accepted_and_ignored_fields() -> None:
    body = {
        **HELLO,
        "user": "u",
        "metadata": {"a": "b"},
        "store": True,
        "service_tier": "auto",
        "prompt_cache_key": "k",
        "safety_identifier": "s",
        "prediction": {"type": "content", "content": "x"},
        "verbosity": "low",
        "parallel_tool_calls": False,
        "reasoning_effort": "low",
        "tools": [],
        "tool_choice": "auto",
        "response_format": {"type": "text"},
        "modalities": ["text"],
        "stop": [],
        "logit_bias": {},
        "best_of": 1,
        "never_heard_of": {"deep": [1]},
    }
    async with serving() as served:
        status, reply = await served.post(CHAT, body)
        assert status == 200, reply
        assert reply["service_tier"] == "default"


async def test_nulls_are_defaults() -> None:
    names = (
        "model max_tokens max_completion_tokens temperature top_p n stop seed stream logprobs "
        "stream_options presence_penalty frequency_penalty logit_bias top_logprobs tools "
        "response_format user top_k min_p stop_token_ids chat_template_kwargs functions"
    ).split()
    async with serving() as served:
        status, reply = await served.post(CHAT, {**HELLO, **dict.fromkeys(names)})
        assert status == 200, reply


UNSERVED: list[tuple[str, Any]] = [
    ("functions", [{"name": "f"}]),
    ("function_call", {"name": "f"}),
    ("guided_whitespace_pattern", " "),
    ("modalities", ["text", "audio"]),
    ("audio", {"voice": "x"}),
    ("moderation", {"model": "omni-moderation-latest"}),
    ("web_search_options", {"a": 1}),
    ("web_search_options", {}),
    ("prompt_logprobs", 0),
    ("use_beam_search", True),
    ("length_penalty", 2.0),
    ("chat_template", "x"),
    ("documents", [{}]),
]


@pytest.mark.parametrize(("field", "value"), UNSERVED)
async def test_what_is_not_served_is_refused_by_name(field: str, value: Any) -> None:
    async with serving() as served:
        error = await served.error(CHAT, {**HELLO, field: value})
        assert error["param"] == field
        assert error["code"] == "unsupported_parameter"
        assert field in error["message"]
        assert served.engine.requests == []


BAD: list[tuple[str, Any, str, str]] = [
    # field, value, param, a word of the message
    ("temperature", -0.1, "temperature", "between 0 and 2"),
    ("temperature", 2.5, "temperature", "2.5"),
    ("temperature", "hot", "temperature", "str"),
    ("top_p", 0, "top_p", "above 0"),
    ("top_p", 1.01, "top_p", "1.01"),
    ("top_k", -2, "top_k", "-2"),
    ("top_k", 10**30, "top_k", "between"),
    ("top_k", 1.5, "top_k", "integer"),
    ("min_p", 2, "min_p", "between 0 and 1"),
    ("repetition_penalty", 0, "repetition_penalty", "between 0.01 and 100"),
    ("presence_penalty", 3, "presence_penalty", "between -2 and 2"),
    ("frequency_penalty", -3, "frequency_penalty", "between -2 and 2"),
    ("n", 0, "n", "between 1 and 128"),
    ("n", 129, "n", "129"),
    ("n", True, "n", "bool"),
    ("best_of", 2, "best_of", "equal to n"),
    ("max_tokens", 0, "max_tokens", "between 1"),
    ("max_tokens", -1, "max_tokens", "-1"),
    ("max_tokens", 1e300, "max_tokens", "between"),
    ("max_completion_tokens", 0, "max_completion_tokens", "between 1"),
    ("max_completion_tokens", "9", "max_completion_tokens", "integer"),
    ("min_tokens", -1, "min_tokens", "between 0"),
    ("min_tokens", 10_000, "min_tokens", "max_tokens"),
    ("seed", 2**64, "seed", "64-bit"),
    ("seed", 0.5, "seed", "integer"),
    ("stop", "", "stop", "1 to"),
    ("stop", ["a", ""], "stop", "1 to"),
    ("stop", ["a"] * 65, "stop", "65"),
    ("stop", ["x" * 2000], "stop", "2000"),
    ("stop", [1], "stop[0]", "str"),
    ("stop", {"a": 1}, "stop", "object"),
    ("logit_bias", {"x": 1}, "logit_bias", "'x'"),
    ("logit_bias", {"1": 101}, "logit_bias[1]", "between -100 and 100"),
    ("logit_bias", {"260": 1}, "logit_bias", "[0, 260)"),
    ("logit_bias", {"1": None}, "logit_bias", "null"),
    ("logit_bias", [1], "logit_bias", "array"),
    ("stop_token_ids", [-1], "stop_token_ids", "-1"),
    ("stop_token_ids", [10**40], "stop_token_ids", "vocabulary"),
    ("allowed_token_ids", [], "allowed_token_ids", "at least 1"),
    ("allowed_token_ids", [300], "allowed_token_ids", "300"),
    ("bad_words", [""], "bad_words", "1 to 1024"),
    ("bad_words", ["x"] * 1025, "bad_words", "1025 words; the limit is 1024"),
    ("top_logprobs", 2, "top_logprobs", "logprobs"),
    ("top_logprobs", 21, "top_logprobs", "between 0 and 20"),
    ("logprobs", 3, "logprobs", "bool"),
    ("stream", "yes", "stream", "bool"),
    ("stream_options", {"include_usage": True}, "stream_options", "stream"),
    ("priority", 2**40, "priority", "between"),
    ("request_id", "a b", "request_id", "letters"),
    ("truncate_prompt_tokens", 0, "truncate_prompt_tokens", "between 1"),
    ("chat_template_kwargs", {"messages": []}, "chat_template_kwargs.messages", "messages"),
    (
        "chat_template_kwargs",
        {"add_generation_prompt": False},
        "chat_template_kwargs.add_generation_prompt",
        "body",
    ),
    ("continue_final_message", True, "continue_final_message", "assistant"),
    ("model", 3, "model", "str"),
    ("messages", [], "messages", "at least 1"),
    ("messages", None, "messages", "null"),
    ("messages", "hi", "messages", "str"),
    ("messages", [{}], "messages[0].role", "required"),
    ("messages", [{"role": "user"}], "messages[0].content", "null"),
    ("messages", [{"role": "wizard", "content": "x"}], "messages[0].role", "wizard"),
    ("messages", [{"role": "user", "content": 3}], "messages[0].content", "int"),
    ("messages", [{"role": "user", "content": ["x"]}], "messages[0].content[0]", "str"),
    (
        "messages",
        [{"role": "user", "content": [{"type": "text"}]}],
        "messages[0].content[0].text",
        "required",
    ),
    (
        "messages",
        [{"role": "user", "content": [{"type": "poem"}]}],
        "messages[0].content[0].type",
        "poem",
    ),
    (
        "messages",
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        "messages",
        "image_url",
    ),
    (
        "messages",
        [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}],
        "messages",
        "input_audio",
    ),
    (
        "messages",
        [{"role": "assistant", "function_call": {"name": "f"}}],
        "messages[0].function_call",
        "not supported",
    ),
]


@pytest.mark.parametrize(("field", "value", "param", "word"), BAD)
async def test_bad_fields(field: str, value: Any, param: str, word: str) -> None:
    async with serving() as served:
        error = await served.error(CHAT, {**HELLO, field: value})
        assert error["param"] == param
        assert word in error["message"]
        assert error["type"] == "invalid_request_error"
        assert served.engine.requests == []


async def test_a_model_without_a_template() -> None:
    async with serving(fleet=FakeFleet(text=byte_text_model(None))) as served:
        error = await served.error(CHAT, HELLO)
        assert error["param"] == "messages"


async def test_n_choices_have_seeds_of_their_own() -> None:
    async with serving() as served:
        served.engine.answer = lambda request: spoken(request.id[-1] * 2)
        status, reply = await served.post(CHAT, {**HELLO, "n": 3, "seed": 7})
        assert status == 200
        assert [c["index"] for c in reply["choices"]] == [0, 1, 2]
        assert [c["message"]["content"] for c in reply["choices"]] == ["00", "11", "22"]
        seeds = [request.sampling.seed for request in served.engine.requests]
        assert seeds[0] == 7
        assert len(set(seeds)) == 3
        usage = reply["usage"]
        assert usage["prompt_tokens"] == len("[user]hi[assistant]") + 1
        assert usage["completion_tokens"] == 6
        await served.post(CHAT, {**HELLO, "n": 3, "seed": 7})
        assert [r.sampling.seed for r in served.engine.requests[3:]] == seeds


async def test_without_a_seed_each_request_draws_one() -> None:
    async with serving() as served:
        await served.post(CHAT, HELLO)
        await served.post(CHAT, HELLO)
        first, second = served.engine.requests
        assert first.sampling.seed != second.sampling.seed


async def test_refused_choice_aborts_those_before_it() -> None:
    async with serving() as served:
        served.engine.answer = lambda request: None
        served.engine.refuse = lambda request: (
            QueueFull("the queue is full", retry_after=2.5) if request.id.endswith("-2") else None
        )
        async with served.session.post(CHAT, json={**HELLO, "n": 3}) as response:
            assert response.status == 429
            assert response.headers["Retry-After"] == "3"
        assert len(served.engine.aborted) == 2
        assert served.fleet.num_leases == 0


async def test_stop_string_ends_and_counts_to_its_last_token() -> None:
    async with serving() as served:
        served.engine.answer = lambda request: Answer(
            [b"one. two", b"STOP and more", *([b"."] * 50)], "length"
        )
        status, reply = await served.post(CHAT, {**HELLO, "stop": ["STOP", "unused"]})
        choice = reply["choices"][0]
        assert choice["message"]["content"] == "one. two"
        assert choice["finish_reason"] == "stop"
        assert choice["stop_reason"] == "STOP"
        assert reply["usage"]["completion_tokens"] == len("one. twoSTOP")
        assert len(served.engine.stopped) == 1 and not served.engine.aborted


async def test_stop_string_is_kept_when_asked_for() -> None:
    async with serving() as served:
        served.engine.answer = lambda request: spoken("a.b.c")
        body = {**HELLO, "stop": ".", "include_stop_str_in_output": True}
        _, reply = await served.post(CHAT, body)
        assert reply["choices"][0]["message"]["content"] == "a."


async def test_own_stop_token_is_named_and_not_shown() -> None:
    async with serving() as served:
        served.engine.answer = lambda request: Answer([b"ab", b"X"], "stop")
        _, reply = await served.post(CHAT, {**HELLO, "stop_token_ids": [ord("X")]})
        choice = reply["choices"][0]
        assert choice["message"]["content"] == "ab"
        assert choice["stop_reason"] == ord("X")
        assert reply["usage"]["completion_tokens"] == 3


async def test_a_complete_grammar_ends_with_a_token_that_is_shown() -> None:
    async with serving() as served:
        served.engine.answer = lambda request: Answer([b"{", b"}"], "stop", complete=True)
        _, reply = await served.post(CHAT, {**HELLO, "logprobs": True})
        choice = reply["choices"][0]
        assert choice["message"]["content"] == "{}"
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", None)
        assert [entry["token"] for entry in choice["logprobs"]["content"]] == ["{", "}"]
        assert reply["usage"]["completion_tokens"] == 2


async def test_logprobs_of_characters_and_their_bytes() -> None:
    async with serving() as served:
        served.engine.answer = lambda request: spoken("aé", "stop")
        _, reply = await served.post(CHAT, {**HELLO, "logprobs": True, "top_logprobs": 1})
        logprobs = reply["choices"][0]["logprobs"]
        assert logprobs["refusal"] is None
        content = logprobs["content"]
        assert [entry["token"] for entry in content] == ["a", "\\xc3", "\\xa9"]
        assert [entry["bytes"] for entry in content] == [[0x61], [0xC3], [0xA9]]
        assert content[0]["logprob"] == -0.97
        assert content[0]["top_logprobs"] == [{"token": "\x00", "logprob": 0.0, "bytes": [0]}]


async def test_logprobs_without_top_and_with_ids_as_names() -> None:
    async with serving() as served:
        served.engine.answer = lambda request: spoken("a")
        body = {**HELLO, "logprobs": True, "return_tokens_as_token_ids": True}
        _, reply = await served.post(CHAT, body)
        content = reply["choices"][0]["logprobs"]["content"]
        assert content == [
            {"token": "token_id:97", "logprob": -0.97, "bytes": [97], "top_logprobs": []}
        ]


async def test_logprobs_end_where_the_text_ends() -> None:
    async with serving() as served:
        served.engine.answer = lambda request: Answer([b"ab<", b"/", b"x>"], "length")
        _, reply = await served.post(CHAT, {**HELLO, "logprobs": True, "stop": "</x>"})
        choice = reply["choices"][0]
        assert choice["message"]["content"] == "ab"
        assert [entry["token"] for entry in choice["logprobs"]["content"]] == ["a", "b"]
        assert reply["usage"]["completion_tokens"] == 6


async def test_impossible_logprob_is_a_number() -> None:
    async with serving() as served:
        served.engine.answer = lambda request: None

        async def answer() -> None:
            await served.engine.submitted.wait()
            served.engine.streams[0].push((97,), [TokenLogprob(97, float("-inf"))])
            served.engine.streams[0].finish("length")

        task = asyncio.create_task(answer())
        _, reply = await served.post(CHAT, {**HELLO, "logprobs": True})
        await task
        assert reply["choices"][0]["logprobs"]["content"][0]["logprob"] == -9999.0


async def test_token_ids_come_with_the_stop_token() -> None:
    async with serving() as served:
        _, reply = await served.post(CHAT, {**HELLO, "return_token_ids": True})
        assert reply["choices"][0]["token_ids"] == [ord("o"), ord("k"), EOS]
        assert reply["prompt_token_ids"] == list(served.engine.requests[0].prompt)
        body = {**HELLO, "return_token_ids": True, "n": 2, "stream": True}
        first, *others = await served.chunks(CHAT, body)
        assert first["prompt_token_ids"] == reply["prompt_token_ids"]
        assert not any("prompt_token_ids" in chunk for chunk in others)


async def test_an_engine_error_is_a_503() -> None:
    async with serving() as served:
        served.engine.answer = lambda request: Answer([b"a"], "error", "the worker died")
        async with served.session.post(CHAT, json=HELLO) as response:
            assert response.status == 503
            assert "Retry-After" in response.headers
            body = await response.json()
        assert body["error"]["message"] == "the worker died"
        assert body["error"]["type"] == "service_unavailable"


async def test_unknown_model() -> None:
    async with serving() as served:
        status, reply = await served.post(CHAT, {**HELLO, "model": "gpt-9"})
        assert status == 404
        assert reply["error"]["code"] == "model_not_found"
        assert reply["error"]["param"] == "model"


async def test_truncated_prompt_keeps_its_end() -> None:
    async with serving() as served:
        await served.post(CHAT, {**HELLO, "truncate_prompt_tokens": 4})
        assert bytes(served.engine.requests[0].prompt) == b"ant]"


async def test_cached_tokens_are_those_of_the_first_choice() -> None:
    class Events:
        def __init__(self) -> None:
            self._left = [TokenEvent(tokens=(97,), finish_reason="length", num_cached_tokens=5)]

        async def __anext__(self) -> TokenEvent:
            return self._left.pop()

        def abort(self) -> None:
            pass

    async with serving() as served:
        served.engine.submit = lambda request: Events()  # type: ignore[method-assign,assignment,return-value]
        _, reply = await served.post(CHAT, {**HELLO, "n": 2})
        assert reply["usage"]["prompt_tokens_details"] == {"cached_tokens": 5}


async def test_a_long_prompt_is_encoded_all_the_same() -> None:
    async with serving(fleet=FakeFleet(info=fake_info(100_000))) as served:
        body = {"messages": [{"role": "user", "content": "x" * 30_000}]}
        status, reply = await served.post(CHAT, body)
        assert status == 200
        assert reply["usage"]["prompt_tokens"] == 30_000 + len("[user][assistant]") + 1


async def test_errors_of_admission_name_the_field_of_this_api() -> None:
    async with serving() as served:
        served.engine.refuse = lambda request: ContextLengthExceeded("too long", param="prompt")
        error = await served.error(CHAT, HELLO)
        assert (error["param"], error["code"]) == ("messages", "context_length_exceeded")

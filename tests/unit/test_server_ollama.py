"""Ollama's API over a scripted engine: fields, options, lines, errors, models that come and go."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from fakes import ManualClock
from gguf_bytes import ARRAY, STRING, U32, Gguf, pair, string, strings, tensor, u32
from hypothesis import given
from hypothesis import strategies as st
from server_fakes import (
    Answer,
    FakeFleet,
    Served,
    byte_text_model,
    fake_info,
    push,
    serving,
    spoken,
)

from quantd.daemon.errors import QueueFull
from quantd.daemon.server.auth import ApiKeys
from quantd.daemon.server.choice import Delta
from quantd.daemon.server.context import Clock
from quantd.daemon.server.ollama.events import AnswerLines, chat_shape
from quantd.daemon.server.ollama.facts import facts_of
from quantd.daemon.server.ollama.options import keep_alive_seconds
from quantd.daemon.server.ollama.run import Watch
from quantd.daemon.text.answer import CallArguments, CallStart, Content, Part, Reasoning
from quantd.daemon.text.answer import whole as whole_parts
from quantd.daemon.types import Pooling

TEMPLATE = (
    "{% for tool in tools or [] %}[tool]{{ tool | tojson }}{% endfor %}"
    "{% for message in messages %}[{{ message.role }}]"
    "{% if message.reasoning_content %}({{ message.reasoning_content }}){% endif %}"
    "{{ message.content }}"
    "{% if message.role == 'tool' %}<{{ message.name }} {{ message.tool_call_id }}>{% endif %}"
    "{% for call in message.tool_calls or [] %}"
    "<tool_call>{{ call.id }} {{ call.function.arguments | tojson }}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    "{% if reasoning_effort %}{{ reasoning_effort }}{% endif %}"
    "{% if enable_thinking %}<think>\n{% endif %}{# <tool_call> arguments </think> #}"
)
USER = {"role": "user", "content": "hi"}
ASK: dict[str, Any] = {"model": "tiny", "messages": [USER]}
PROMPT: dict[str, Any] = {"model": "tiny", "prompt": "hi"}
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALL = 'I look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
WALL = 1_700_000_000.5
AT = "2023-11-14T22:13:20.500000Z"


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    fleet = FakeFleet(text=byte_text_model(TEMPLATE))
    async with serving(fleet=fleet, clock=Clock(wall=lambda: WALL)) as served:
        yield served


async def whole(served: Served, path: str = "/api/chat", **fields: Any) -> dict[str, Any]:
    ask = ASK if path == "/api/chat" else PROMPT
    status, reply = await served.post(path, {"stream": False, **ask, **fields})
    assert status == 200, reply
    return reply  # type: ignore[no-any-return]


async def lines(served: Served, path: str = "/api/chat", **fields: Any) -> list[dict[str, Any]]:
    ask = ASK if path == "/api/chat" else PROMPT
    async with served.session.post(path, json={**ask, **fields}) as response:
        assert response.status == 200, await response.text()
        assert response.content_type == "application/x-ndjson"
        text = await response.text()
    assert text.endswith("\n")
    return [json.loads(line) for line in text[:-1].split("\n")]


async def refused(served: Served, path: str = "/api/chat", **fields: Any) -> str:
    ask = PROMPT if path == "/api/generate" else ASK if path == "/api/chat" else {}
    status, reply = await served.post(path, {**ask, **fields})
    assert status == 400, reply
    assert set(reply) == {"error"} and not served.engine.requests
    return str(reply["error"])


def prompt_of(served: Served) -> str:
    return bytes(token for token in served.engine.requests[-1].prompt if token < 256).decode()


# --- answers -------------------------------------------------------------------------------------


async def test_a_chat_in_one_object(served: Served) -> None:
    reply = await whole(served)
    durations = [reply.pop(f"{name}_duration") for name in ("total", "load")]
    assert durations[0] >= durations[1] >= 0
    assert reply == {
        "model": "org/tiny",
        "created_at": AT,
        "message": {"role": "assistant", "content": "ok"},
        "done": True,
        "done_reason": "stop",
        "prompt_eval_count": len(served.engine.requests[0].prompt),
        "prompt_eval_duration": 0,
        "eval_count": 3,
        "eval_duration": 0,
    }
    assert prompt_of(served) == "[user]hi[assistant]"


async def test_lines_are_the_default(served: Served) -> None:
    *texts, last = await lines(served)
    assert texts == [
        {
            "model": "org/tiny",
            "created_at": AT,
            "message": {"role": "assistant", "content": letter},
            "done": False,
        }
        for letter in "ok"
    ]
    assert last["done"] and last["done_reason"] == "stop" and last["eval_count"] == 3
    assert last["message"] == {"role": "assistant", "content": ""}
    assert [line["done"] for line in await lines(served, stream=None)] == [False, False, True]


async def test_what_was_measured() -> None:
    clock = ManualClock(100.0)
    fleet = FakeFleet()
    fleet.engine.times = (101.5, 102.0)

    def answer(request: Any) -> Answer:
        clock.advance(3.0)
        return spoken("ok", "stop")

    fleet.engine.answer = answer
    async with serving(fleet=fleet, clock=Clock(monotonic=clock)) as served:
        reply = await whole(served)
        names = ("total", "load", "prompt_eval", "eval")
        seconds = [reply[f"{name}_duration"] / 1e9 for name in names]
        assert seconds == [3.0, 0.0, 0.5, 1.0]


async def test_loading_is_measured_apart() -> None:
    clock = ManualClock(100.0)
    fleet = FakeFleet()
    opened = fleet.open.wait

    async def wait() -> Any:
        clock.advance(2.5)
        return await opened()

    fleet.open.wait = wait  # type: ignore[method-assign, assignment]
    async with serving(fleet=fleet, clock=Clock(monotonic=clock)) as served:
        reply = await whole(served)
        assert (reply["load_duration"], reply["total_duration"]) == (2.5e9, 2.5e9)


async def test_a_prompt_through_the_template(served: Served) -> None:
    reply = await whole(served, "/api/generate", system="Be brief.")
    assert (reply["response"], reply["done_reason"], reply["eval_count"]) == ("ok", "stop", 3)
    assert "message" not in reply and "context" not in reply
    assert prompt_of(served) == "[system]Be brief.[user]hi[assistant]"
    texts = await lines(served, "/api/generate")
    assert [line["response"] for line in texts] == ["o", "k", ""]


async def test_a_raw_prompt(served: Served) -> None:
    served.engine.answer = lambda request: spoken("<think>a</think>b", "stop")
    reply = await whole(served, "/api/generate", raw=True)
    assert reply["response"] == "<think>a</think>b" and "thinking" not in reply
    assert served.engine.requests[-1].prompt == (256, *b"hi")
    texts = await lines(served, "/api/generate", raw=True, format="json")
    assert "".join(line["response"] for line in texts) == "<think>a</think>b"
    assert served.engine.requests[-1].sampling.grammar is not None


async def test_how_it_ends(served: Served) -> None:
    served.engine.answer = lambda request: spoken("one two", "length")
    assert (await whole(served))["done_reason"] == "length"
    assert (await lines(served))[-1]["done_reason"] == "length"
    reply = await whole(served, options={"stop": [" tw"]})
    assert (reply["done_reason"], reply["message"]["content"]) == ("stop", "one")


async def test_log_probabilities(served: Served) -> None:
    reply = await whole(served, logprobs=True, top_logprobs=2)
    first, second = reply["logprobs"]
    assert (first["token"], first["logprob"], len(first["top_logprobs"])) == ("o", -1.11, 2)
    made = await lines(served, logprobs=True)
    streamed = [entry for line in made for entry in line.get("logprobs", ())]
    assert [entry["token"] for entry in streamed] == ["o", "k"]
    assert second["token"] == "k" and "logprobs" not in await whole(served)
    raw = await whole(served, "/api/generate", raw=True, logprobs=True)
    assert [entry["token"] for entry in raw["logprobs"]] == ["o", "k"]


# --- thinking and tools --------------------------------------------------------------------------


async def test_thinking(served: Served) -> None:
    served.engine.answer = lambda request: spoken("a</think>b", "stop")
    reply = await whole(served, think=True)
    assert reply["message"] == {"role": "assistant", "content": "b", "thinking": "a"}
    assert prompt_of(served).endswith("<think>\n")
    reply = await whole(served, "/api/generate", think="high")
    assert (reply["thinking"], reply["response"]) == ("a", "b")
    assert prompt_of(served).endswith("[assistant]high<think>\n")
    texts = [line["message"] for line in await lines(served, think=True)]
    assert [text.get("thinking") for text in texts] == ["a", None, None]
    served.engine.answer = lambda request: spoken("<think>a</think>b", "stop")
    assert (await whole(served))["message"]["thinking"] == "a"
    assert (await whole(served, think=False))["message"]["content"] == "b"
    assert prompt_of(served) == "[user]hi[assistant]"


async def test_a_model_that_does_not_think() -> None:
    async with serving() as served:
        error = await refused(served, think="low")
        assert error == "The model 'org/tiny' does not support thinking"
        assert (await whole(served, think=False))["done"]
        assert "'maybe'" in (await served.post("/api/chat", {**ASK, "think": "maybe"}))[1]["error"]


async def test_a_call_comes_whole(served: Served) -> None:
    served.engine.answer = lambda request: spoken(CALL, "stop")
    reply = await whole(served, tools=[WEATHER])
    [call] = reply["message"]["tool_calls"]
    assert call.pop("id")
    assert call == {"function": {"index": 0, "name": "weather", "arguments": {"city": "Rome"}}}
    assert (reply["message"]["content"], reply["done_reason"]) == ("I look.", "stop")
    assert "Tells the weather." in prompt_of(served)
    made = [line["message"] for line in await lines(served, tools=[WEATHER])]
    assert "".join(message["content"] for message in made) == "I look."
    [streamed] = [call for message in made for call in message.get("tool_calls", ())]
    assert streamed["function"] == call["function"]


async def test_a_call_that_is_cut_off_is_left_out(served: Served) -> None:
    served.engine.answer = lambda request: spoken(CALL[:-20], "length")
    reply = await whole(served, tools=[WEATHER])
    assert reply["message"] == {"role": "assistant", "content": "I look."}
    assert reply["done_reason"] == "length"
    made = await lines(served, tools=[WEATHER])
    assert not any("tool_calls" in line["message"] for line in made)
    assert made[-1]["done_reason"] == "length"


async def test_half_a_mark_is_nothing_streamed_or_not(served: Served) -> None:
    served.engine.answer = lambda request: spoken("<tool_call>", "length")
    assert (await whole(served, tools=[WEATHER]))["message"]["content"] == ""
    made = await lines(served, tools=[WEATHER])
    assert "".join(line["message"]["content"] for line in made) == ""


async def test_calls_and_results_of_before(served: Served) -> None:
    call: Any = {"function": {"name": "weather", "arguments": {"city": "Rome"}}}
    other: Any = {"function": {"name": "time", "arguments": {}}}
    turns = [
        USER,
        {"role": "assistant", "thinking": "hm", "tool_calls": [call, other, call]},
        {"role": "tool", "tool_name": "time", "content": "noon"},
        {"role": "tool", "content": "sunny"},
        {"role": "tool", "tool_call_id": "call00002", "content": "rainy"},
        {"role": "tool", "tool_name": "weather", "content": "late"},
    ]
    await whole(served, messages=turns)
    assert prompt_of(served) == (
        '[user]hi[assistant](hm)<tool_call>call00000 {"city": "Rome"}<tool_call>call00001 {}'
        '<tool_call>call00002 {"city": "Rome"}[tool]noon<time call00001>'
        "[tool]sunny<weather call00000>[tool]rainy<weather call00002>[tool]late<weather >"
        "[assistant]"
    )
    own = {"role": "assistant", "content": "", "tool_calls": [call | {"id": "mine"}]}
    await whole(served, messages=[USER, own, {"role": "tool", "content": "sunny"}])
    assert "<tool_call>mine " in prompt_of(served) and "<weather mine>" in prompt_of(served)


async def test_an_answer_that_was_begun_goes_on(served: Served) -> None:
    await whole(served, messages=[USER, {"role": "assistant", "content": "Well,"}])
    assert prompt_of(served) == "[user]hi[assistant]Well,"


async def test_formats(served: Served) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    for format, source in (("json", {"type": "object"}), (schema, schema)):
        await whole(served, "/api/generate", raw=True, format=format)
        grammar = served.engine.requests[-1].sampling.grammar
        assert grammar is not None and json.loads(grammar.source) == source
    await whole(served, format=schema)
    assert served.engine.requests[-1].sampling.grammar is not None
    for nothing in ("", None):
        await whole(served, format=nothing)
        assert served.engine.requests[-1].sampling.grammar is None


_PARTS = st.one_of(
    st.text("ab", min_size=1).map(Content),
    st.text("ab", min_size=1).map(Reasoning),
    st.tuples(st.text("xy", min_size=1), st.dictionaries(st.text("kl"), st.integers())),
)


@given(st.lists(_PARTS, max_size=8), st.data())
def test_lines_say_what_the_whole_answer_says(said: list[Any], data: st.DataObject) -> None:
    """However the text comes in pieces, and the pieces in deltas."""
    parts: list[Part] = []
    for part in said:
        if isinstance(part, Content | Reasoning):
            parts += [type(part)(letter) for letter in part.text]
            continue
        name, arguments = part
        number = sum(isinstance(one, CallStart) for one in parts)
        parts.append(CallStart(number, f"c{number}", name))
        parts += [CallArguments(number, letter) for letter in json.dumps(arguments)]
    cuts = [0, *sorted(data.draw(st.lists(st.integers(0, len(parts))))), len(parts)]
    deltas = [Delta(0, parts=parts[a:b]) for a, b in itertools.pairwise(cuts)]
    deltas[-1].finish_reason = "stop"
    made: Any = SimpleNamespace(
        model="m",
        submitter=SimpleNamespace(takes_parts=True),
        options=SimpleNamespace(base=SimpleNamespace(logprobs=None)),
        text=None,
    )
    lines = AnswerLines(chat_shape, Watch(Clock()), Clock(wall=lambda: WALL), made)
    text = b"".join(map(lines.encode, deltas)).decode()
    messages = [json.loads(line)["message"] for line in text.splitlines()]
    answer = whole_parts(parts)
    assert "".join(message["content"] for message in messages) == answer.content
    assert "".join(message.get("thinking", "") for message in messages) == answer.reasoning
    calls = [call for message in messages for call in message.get("tool_calls", ())]
    assert [call["function"] for call in calls] == [
        {"index": i, "name": call.name, "arguments": json.loads(call.arguments)}
        for i, call in enumerate(answer.calls)
    ]


# --- options -------------------------------------------------------------------------------------


async def test_options_reach_the_engine(served: Served) -> None:
    options = {
        "num_predict": 7,
        "temperature": 0.5,
        "top_k": 0,
        "top_p": 1,
        "min_p": 0.1,
        "seed": 5,
        "repeat_penalty": 1.5,
        "presence_penalty": 1,
        "frequency_penalty": -1,
        "num_ctx": 512,
        "typical_p": 1.0,
        "mirostat": 0,
        "num_gpu": 99,
        "num_thread": 4,
        "use_mmap": True,
        "whatever": {},
    }
    await whole(served, options=options)
    sampling = served.engine.requests[-1].sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_k) == (7, 0.5, 0)
    assert (sampling.top_p, sampling.min_p, sampling.seed) == (1.0, 0.1, 5)
    assert sampling.repetition_penalty == 1.5
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (1.0, -1.0)
    await whole(served, "/api/generate", options={"repeat_penalty": 1.5, "repeat_last_n": 0})
    assert served.engine.requests[-1].sampling.repetition_penalty == 1.0


async def test_defaults_are_ollamas(served: Served) -> None:
    for path in ("/api/chat", "/api/generate"):
        await whole(served, path, options={"seed": -1})
        sampling = served.engine.requests[-1].sampling
        assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.8, 40, 0.9)
        assert (sampling.repetition_penalty, sampling.min_p) == (1.0, 0.0)
    first, second = (request.sampling.seed for request in served.engine.requests)
    assert first != second


@pytest.mark.parametrize("number", [None, -1, -2, 100_000])
async def test_the_context_ends_every_answer(served: Served, number: int | None) -> None:
    for fields in ({}, {"raw": True}):
        await whole(served, "/api/generate", options={"num_predict": number}, **fields)
        request = served.engine.requests[-1]
        assert request.sampling.max_tokens == 512 - len(request.prompt)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_predict": 0}, "options.num_predict must be at least 1, or -1 or -2 for no limit"),
        ({"num_predict": 1.5}, "options.num_predict must be an integer, got 1.5"),
        ({"num_ctx": 513}, "options.num_ctx must be at most 512, this model's context, got 513"),
        ({"num_ctx": 0}, "options.num_ctx must be between 1 and"),
        ({"temperature": 3}, "options.temperature must be between 0 and 2, got 3"),
        ({"temperature": "hot"}, "options.temperature: Expected float | null, got str"),
        ({"top_p": 0}, "options.top_p must be above 0"),
        ({"repeat_penalty": 0}, "options.repeat_penalty must be between 0.01 and 100, got 0"),
        ({"stop": ["x"] * 65}, "options.stop has 65 strings"),
        ({"stop": [""]}, "options.stop: a stop string has 1 to"),
        ({"seed": 1 << 70}, "options.seed"),
        ({"mirostat": 1}, "options.mirostat is not supported"),
        ({"tfs_z": 0.5}, "options.tfs_z is not supported"),
    ],
)
async def test_wrong_options(served: Served, options: Any, message: str) -> None:
    for path in ("/api/chat", "/api/generate"):
        assert message in await refused(served, path, options=options)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"messages": [{**USER, "images": ["aGk="]}]}, "messages[0].images: images are not"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "messages[0].role must be one of"),
        ({"format": "xml"}, "format must be 'json' or a JSON schema as an object, got 'xml'"),
        ({"format": {"type": "object", "not": {}}}, "format cannot be followed"),
        ({"think": "very"}, "think must be true, false, 'low', 'medium' or 'high', got 'very'"),
        ({"keep_alive": "soon"}, "keep_alive must be seconds, or a duration like"),
        ({"tools": [{"type": "function"}]}, "tools[0].function must be an object"),
        ({"top_logprobs": 1}, "top_logprobs needs logprobs"),
        ({"messages": 3}, "messages: Expected array"),
    ],
)
async def test_wrong_chats(served: Served, fields: Any, message: str) -> None:
    assert message in await refused(served, **fields)
    assert message in await refused(served, stream=False, **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"suffix": "x"}, "suffix is not supported"),
        ({"template": "x"}, "template is not supported"),
        ({"context": [1, 2]}, "context is not supported by this server"),
        ({"images": ["aGk="]}, "images: images are not supported"),
        ({"raw": True, "system": "x"}, "system cannot be given beside raw"),
        ({"raw": True, "think": True}, "think cannot be given beside raw"),
    ],
)
async def test_wrong_prompts(served: Served, fields: Any, message: str) -> None:
    assert message in await refused(served, "/api/generate", **fields)


async def test_what_asks_for_nothing_is_no_error(served: Served) -> None:
    nothing: dict[str, Any] = {"suffix": "", "template": "", "context": [], "images": []}
    reply = await whole(served, "/api/generate", system="", format="", think=None, **nothing)
    assert reply["response"] == "ok" and prompt_of(served) == "[user]hi[assistant]"


async def test_a_prompt_that_is_too_long_is_not_cut() -> None:
    async with serving(fleet=FakeFleet(info=fake_info(16))) as served:
        # The scripted engine admits all; what is asked for has no room.
        await whole(served, messages=[{"role": "user", "content": "x" * 40}])
        request = served.engine.requests[-1]
        assert len(request.prompt) > 16 and request.sampling.max_tokens == 1


# --- errors --------------------------------------------------------------------------------------


async def test_errors_have_ollamas_shape(served: Served) -> None:
    status, reply = await served.post("/api/chat", {**ASK, "model": "nope"})
    assert (status, reply) == (404, {"error": "The model 'nope' does not exist."})
    assert await served.get("/api/nothing") == (404, {"error": "no such URL: GET /api/nothing"})
    status, reply = await served.get("/api/chat")
    assert status == 405 and set(reply) == {"error"}
    async with served.session.post("/api/chat", data=b"{") as response:
        assert response.status == 400 and "not JSON" in (await response.json())["error"]
    served.engine.refuse = lambda request: QueueFull("full", retry_after=3.0)
    async with served.session.post("/api/chat", json=ASK) as response:
        assert (response.status, response.headers["Retry-After"]) == (429, "3")
        assert await response.json() == {"error": "full"}


async def test_an_error_before_and_after_the_first_line(served: Served) -> None:
    served.engine.answer = lambda request: Answer([()], "error", "worker died")
    status, reply = await served.post("/api/chat", ASK)
    assert (status, reply) == (503, {"error": "worker died"})
    served.engine.answer = lambda request: None
    served.engine.submitted.clear()
    posting = asyncio.create_task(served.session.post("/api/chat", json=ASK))
    await served.engine.submitted.wait()
    # A second lease beside it could wait for an unload that waits for the first.
    assert served.fleet.num_leases == 1
    push(served.engine.requests[-1], served.engine.streams[-1], b"o")
    async with await posting as response:
        first = json.loads(await response.content.readline())
        assert first["message"]["content"] == "o"
        served.engine.streams[-1].finish("error", "worker died")
        assert json.loads(await response.content.readline()) == {"error": "worker died"}
        assert await response.content.read() == b""


async def test_a_silent_stream_stays_silent() -> None:
    """A comment or a blank line is no JSON, so nothing is sent in between, and nothing waits to."""
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        await asyncio.Event().wait()

    fleet = FakeFleet()
    async with serving(fleet=fleet, clock=Clock(sleep=sleep)) as served:
        assert [line["done"] for line in await lines(served)] == [False, False, True]
        assert slept == []
        await served.events("/v1/chat/completions", {**ASK, "stream": True})
        assert len(slept) == 1


async def test_keys_and_what_needs_none() -> None:
    async with serving(keys=ApiKeys([("me", "sk-1")])) as served:
        status, reply = await served.post("/api/chat", ASK)
        assert status == 401 and set(reply) == {"error"}
        headers = {"Authorization": "Bearer sk-1"}
        status, _ = await served.post("/api/chat", {**ASK, "stream": False}, headers=headers)
        assert status == 200
        assert (await served.get("/api/version"))[0] == 200
        assert (await served.get("/api/tags"))[0] == 401
        for method in ("GET", "HEAD"):
            async with served.session.request(method, "/") as response:
                assert response.status == 200
                assert await response.text() == ("quantd is running" if method == "GET" else "")


async def test_what_needs_the_registry_is_not_served(served: Served) -> None:
    for path in ("pull", "push", "create", "copy", "blobs/sha256:0"):
        status, reply = await served.post(f"/api/{path}", {"model": "tiny"})
        assert status == 501 and reply["error"].startswith(f"POST /api/{path} is not served")
    async with served.session.delete("/api/delete", json={"model": "tiny"}) as response:
        assert response.status == 501
    async with served.session.head("/api/blobs/sha256:0") as response:
        assert response.status == 501


# --- models that come and go ---------------------------------------------------------------------


async def test_an_empty_request_loads_and_unloads(served: Served) -> None:
    calls = served.fleet.calls
    for path, said in (
        ("/api/chat", {"message": {"role": "assistant", "content": ""}}),
        ("/api/generate", {"response": ""}),
    ):
        base = {"model": "org/tiny", "created_at": AT, "done": True, **said}
        reply = await served.post(path, {"model": "tiny:latest"})
        assert reply == (200, base | {"done_reason": "load"})
        assert calls == []
        reply = await served.post(path, {"model": "tiny", "keep_alive": "10m"})
        assert reply == (200, base | {"done_reason": "load"})
        for zero in (0, "0", "0s"):
            reply = await served.post(path, {"model": "tiny", "keep_alive": zero})
            assert reply == (200, base | {"done_reason": "unload"})
        assert calls == ["keep org/tiny 600", *["unload org/tiny"] * 3]
        calls.clear()
    served.fleet.loaded = lambda: []  # type: ignore[method-assign]
    status, reply = await served.post("/api/chat", {"model": "tiny", "keep_alive": 0})
    assert (status, reply["done_reason"], calls) == (200, "unload", [])
    status, reply = await served.post("/api/chat", {"model": "nope"})
    assert status == 404


async def test_a_request_says_how_long_the_model_stays(served: Served) -> None:
    await whole(served, keep_alive=-1)
    await lines(served, "/api/generate", keep_alive="1h30m")
    await whole(served, keep_alive=0)
    assert served.fleet.calls == ["keep org/tiny -1", "keep org/tiny 5400", "keep org/tiny 0"]


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None),
        (300, 300.0),
        (0.5, 0.5),
        (-0.1, -1.0),
        ("5m", 300.0),
        ("1h2m3.5s", 3723.5),
        ("250ms", 0.25),
        ("-1m", -1.0),
        ("0", 0.0),
        ("9999999h", 365 * 86400.0),
    ],
)
def test_durations(value: float | str | None, seconds: float | None) -> None:
    assert keep_alive_seconds(value) == seconds


async def test_names_have_tags(served: Served) -> None:
    assert (await whole(served, model="org/tiny:latest"))["model"] == "org/tiny"
    status, _ = await served.post("/api/chat", {**ASK, "model": "tiny:7b"})
    assert status == 404


# --- looking -------------------------------------------------------------------------------------


async def test_lists_and_version(tmp_path: Path) -> None:
    _folder(tmp_path)
    info = msgspec.structs.replace(
        fake_info(),
        num_parameters=7_615_616_512,
        weight_bytes=1000,
        quantizers=(("gguf", 3), ("dense", 1)),
        device="cuda:0",
    )
    fleet = FakeFleet(path=str(tmp_path), info=info, keep_alive=60.0, idle_seconds=10.0)
    async with serving(fleet=fleet, clock=Clock(wall=lambda: WALL)) as served:
        [own, alias] = (await served.get("/api/tags"))[1]["models"]
        assert (own["name"], own["model"]) == ("org/tiny:latest", "org/tiny:latest")
        assert alias["name"] == "tiny:latest" and alias["digest"] == own["digest"]
        assert own["size"] == sum(file.stat().st_size for file in tmp_path.iterdir())
        assert len(own["digest"]) == 64 and own["modified_at"].endswith("Z")
        assert own["details"] == {
            "parent_model": "",
            "format": "safetensors",
            "family": "qwen3",
            "families": ["qwen3"],
            "parameter_size": "7.62B",
            "quantization_level": "GGUF",
        }
        [loaded] = (await served.get("/api/ps"))[1]["models"]
        assert (loaded["size"], loaded["size_vram"]) == (1000, 1000)
        assert loaded["expires_at"] == "2023-11-14T22:14:10.500000Z"
        assert loaded["context_length"] == 512 and loaded["details"] == own["details"]
        fleet.keep_alive = -1.0
        [loaded] = (await served.get("/api/ps"))[1]["models"]
        assert loaded["expires_at"].startswith("9999-")
        version = (await served.get("/api/version"))[1]
        assert set(version) == {"version", "quantd"}
    assert fleet.num_leases == 0 and fleet.calls == []


async def test_show(tmp_path: Path) -> None:
    _folder(tmp_path)
    info = msgspec.structs.replace(fake_info(), num_parameters=5)
    async with serving(fleet=FakeFleet(path=str(tmp_path), info=info)) as served:
        for body in ({"model": "tiny"}, {"name": "org/tiny:latest", "verbose": True}):
            status, shown = await served.post("/api/show", body)
            assert status == 200
            assert shown["template"] == TEMPLATE
            assert shown["capabilities"] == ["completion", "tools", "thinking"]
            assert shown["model_info"] == {
                "general.architecture": "qwen3",
                "general.parameter_count": 5,
                "qwen3.context_length": 512,
                "qwen3.embedding_length": 64,
                "qwen3.block_count": 2,
            }
        assert await refused(served, "/api/show") == "model: this field is required"
        assert (await served.post("/api/show", {"model": "nope"}))[0] == 404


async def test_show_of_what_is_not_in_memory(tmp_path: Path) -> None:
    _folder(tmp_path, architectures=["Qwen3Model"])
    fleet = FakeFleet(path=str(tmp_path))
    statuses = [status._replace(info=None) for status in fleet.models()]
    fleet.models = lambda: statuses  # type: ignore[method-assign]
    async with serving(fleet=fleet) as served:
        _, shown = await served.post("/api/show", {"model": "tiny"})
        assert shown["capabilities"] == ["embedding"]
        assert shown["details"]["parameter_size"] == ""
        assert (await served.get("/api/ps"))[1] == {"models": []}
        statuses[0] = statuses[0]._replace(task="generate", tool_dialect="none")
        _, shown = await served.post("/api/show", {"model": "tiny"})
        assert shown["capabilities"] == ["completion", "thinking"]
        statuses[0] = statuses[0]._replace(path=str(tmp_path / "gone"))
        _, shown = await served.post("/api/show", {"model": "tiny"})
        assert (shown["template"], shown["model_info"]) == ("", {})


async def test_show_of_a_model_that_gives_vectors(tmp_path: Path) -> None:
    _folder(tmp_path)
    for task, said in (("embed", ["embedding"]), ("rerank", [])):
        pooling = Pooling(task=task, size=4)  # type: ignore[arg-type]
        info = msgspec.structs.replace(fake_info(), pooling=pooling)
        async with serving(fleet=FakeFleet(path=str(tmp_path), info=info)) as served:
            _, shown = await served.post("/api/show", {"model": "tiny"})
            assert shown["capabilities"] == said
            error = await refused(served)
            assert "generates no text: use /api/embed" in error or task == "rerank"


def _folder(path: Path, **fields: Any) -> None:
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "max_position_embeddings": 4096,
        "hidden_size": 64,
        "num_hidden_layers": 2,
    }
    (path / "config.json").write_text(json.dumps(config | fields))
    (path / "chat_template.jinja").write_text(TEMPLATE)
    (path / "model.safetensors").write_bytes(b"x" * 100)


def test_facts_of_a_gguf_file(tmp_path: Path) -> None:
    pairs = [
        pair("general.architecture", STRING, string("llama")),
        pair("general.file_type", U32, u32(15)),
        pair("llama.context_length", U32, u32(2048)),
        pair("tokenizer.chat_template", STRING, string("{{ messages }}<tool_call>arguments")),
        pair("tokenizer.ggml.tokens", ARRAY, strings(["a", "b"])),
    ]
    path = tmp_path / "model.gguf"
    tensors = [tensor("a", (8, 4)), tensor("b", (8,), offset=128)]
    path.write_bytes(Gguf(pairs=pairs, tensors=tensors, data=b"x" * 256).encode())
    for where in (path, tmp_path):
        facts = facts_of(where)
        assert (facts.format, facts.family, facts.size) == ("gguf", "llama", path.stat().st_size)
        assert facts.info == {
            "general.architecture": "llama",
            "general.parameter_count": 40,
            "general.file_type": 15,
            "llama.context_length": 2048,
        }
        assert facts.templates == {"default": "{{ messages }}<tool_call>arguments"}
        assert facts.level == "F32"
    path.write_bytes(b"GGUF")
    assert facts_of(path).format == ""


def test_facts_follow_the_files(tmp_path: Path) -> None:
    _folder(tmp_path)
    before = facts_of(tmp_path)
    assert before.info["qwen3.context_length"] == 4096 and before.task == "generate"
    _folder(tmp_path, model_type="llama", architectures=["BertForSequenceClassification"])
    after = facts_of(tmp_path)
    assert (after.family, after.task) == ("llama", "rerank") and after.digest != before.digest
    for broken in ("{", "[]", '{"text_config": 1}', '{"architectures": 3}'):
        (tmp_path / "config.json").write_text(broken)
        facts = facts_of(tmp_path)
        assert (facts.format, facts.info, len(facts.digest)) == ("", {}, 64)
    assert facts_of(tmp_path / "gone").size == 0 and len(facts_of(tmp_path / "gone").digest) == 64


# --- embeddings ----------------------------------------------------------------------------------


async def test_embeddings_need_a_model_for_them(served: Served) -> None:
    error = await refused(served, "/api/embed", model="tiny", input="x")
    assert "is not an embedding model" in error
    assert await refused(served, "/api/embed", model="tiny") == "input: this field is required"
    for empty in ("", []):
        status, reply = await served.post("/api/embed", {"model": "tiny", "input": empty})
        assert (status, reply) == (200, {"model": "org/tiny", "embeddings": []})
    status, reply = await served.post("/api/embeddings", {"model": "tiny", "prompt": ""})
    assert (status, reply) == (200, {"embedding": []})

"""Tools and reasoning over /v1/chat/completions, with a scripted engine."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from server_fakes import EOS, Answer, FakeFleet, Served, byte_text_model, fake_info, serving, spoken

from quantd.daemon.types import Request

CHAT = "/v1/chat/completions"
TEMPLATE = (
    "{% for tool in tools or [] %}[tool]{{ tool | tojson }}{% endfor %}"
    "{% for message in messages %}[{{ message.role }}]{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function.arguments | tojson }}"
    "{% endfor %}{% endfor %}[assistant]{% if think %}<think>\n{% endif %}"
    "{# <tool_call> arguments </think> #}"
)
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "n": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
NOW: dict[str, Any] = {"type": "function", "function": {"name": "now"}}
ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "tools": [WEATHER, NOW]}
CALLS = (
    'I look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Zü\\"rich}"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
)


def loose(tool: dict[str, Any]) -> dict[str, Any]:
    return {**tool, "function": {**tool["function"], "strict": False}}


def with_parameters(parameters: object) -> list[dict[str, Any]]:
    return [NOW, {"type": "function", "function": {"name": "f", "parameters": parameters}}]


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async with serving(fleet=FakeFleet(text=byte_text_model(TEMPLATE))) as served:
        served.engine.answer = lambda request: spoken(CALLS, "stop")
        yield served


async def reply_to(served: Served, body: dict[str, Any]) -> dict[str, Any]:
    status, reply = await served.post(CHAT, body)
    assert status == 200, reply
    return reply  # type: ignore[no-any-return]


def prompt_of(served: Served) -> str:
    return bytes(token for token in served.engine.requests[-1].prompt if token < 256).decode()


def added_up(chunks: list[dict[str, Any]], index: int = 0) -> dict[str, Any]:
    """The message that a client makes of a choice's deltas, as the SDKs do it."""
    message: dict[str, Any] = {"content": "", "reasoning": "", "tool_calls": []}
    for chunk in chunks:
        for choice in chunk["choices"]:
            if choice["index"] != index:
                continue
            delta = choice["delta"]
            message["content"] += delta.get("content") or ""
            message["reasoning"] += delta.get("reasoning") or ""
            assert delta.get("reasoning") == delta.get("reasoning_content")
            for call in delta.get("tool_calls", ()):
                if "id" in call:
                    assert call["index"] == len(message["tool_calls"])
                    assert call["type"] == "function" and call["function"]["name"]
                    message["tool_calls"].append(json.loads(json.dumps(call)))
                else:
                    assert set(call) == {"index", "function"}
                    assert set(call["function"]) == {"arguments"}
                    function = message["tool_calls"][call["index"]]["function"]
                    function["arguments"] += call["function"]["arguments"]
            message["finish_reason"] = choice["finish_reason"] or message.get("finish_reason")
    return message


def bare(calls: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(call["function"]["name"], call["function"]["arguments"]) for call in calls]


EXPECTED = [("weather", '{"city": "Zü\\"rich}"}'), ("now", "{}")]


async def test_calls(served: Served) -> None:
    reply = await reply_to(served, ASK)
    choice = reply["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    message = choice["message"]
    assert message["content"] == "I look."
    assert bare(message["tool_calls"]) == EXPECTED
    ids = [call["id"] for call in message["tool_calls"]]
    assert len(set(ids)) == 2 and all(one.startswith("call_") for one in ids)
    assert {call["type"] for call in message["tool_calls"]} == {"function"}
    assert "reasoning" not in message and "tool_call_retries" not in choice
    assert reply["usage"]["completion_tokens"] == len(CALLS.encode()) + 1


async def test_content_is_null_beside_calls_alone(served: Served) -> None:
    alone = CALLS[CALLS.index("<") :]
    served.engine.answer = lambda request: spoken(alone, "stop")
    message = (await reply_to(served, ASK))["choices"][0]["message"]
    assert message["content"] is None and len(message["tool_calls"]) == 2
    served.engine.answer = lambda request: spoken("", "stop")
    message = (await reply_to(served, ASK))["choices"][0]["message"]
    assert message["content"] == "" and "tool_calls" not in message


@pytest.mark.parametrize("size", [1, 3, 1000])
async def test_a_stream_says_the_same(served: Served, size: int) -> None:
    raw = CALLS.encode()
    events = [raw[i : i + size] for i in range(0, len(raw), size)]
    served.engine.answer = lambda request: Answer([*events, (EOS,)], "stop")
    chunks = await served.chunks(CHAT, {**ASK, "stream": True, "n": 2})
    for index in (0, 1):
        message = added_up(chunks, index)
        assert message["content"] == "I look."
        assert bare(message["tool_calls"]) == EXPECTED
        assert message["finish_reason"] == "tool_calls"


async def test_a_call_that_is_cut_off(served: Served) -> None:
    cut = CALLS[: CALLS.index("rich")]
    served.engine.answer = lambda request: spoken(cut, "length")
    choice = (await reply_to(served, ASK))["choices"][0]
    assert choice["finish_reason"] == "length"
    assert bare(choice["message"]["tool_calls"]) == [("weather", '{"city": "Zü\\"')]
    message = added_up(await served.chunks(CHAT, {**ASK, "stream": True}))
    assert message["finish_reason"] == "length"
    assert bare(message["tool_calls"]) == [("weather", '{"city": "Zü\\"')]


async def test_a_stop_string_ends_calls_too(served: Served) -> None:
    choice = (await reply_to(served, {**ASK, "stop": "rich"}))["choices"][0]
    assert choice["stop_reason"] == "rich"
    assert choice["finish_reason"] == "stop", "half a call is not to be run"
    assert bare(choice["message"]["tool_calls"]) == [("weather", '{"city": "Zü\\"')]
    streamed = added_up(await served.chunks(CHAT, {**ASK, "stop": "rich", "stream": True}))
    assert bare(streamed["tool_calls"]) == bare(choice["message"]["tool_calls"])
    assert streamed["finish_reason"] == "stop"


async def test_a_stop_string_behind_a_whole_call(served: Served) -> None:
    choice = (await reply_to(served, {**ASK, "stop": "</tool_call>"}))["choices"][0]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("tool_calls", "</tool_call>")
    assert bare(choice["message"]["tool_calls"]) == EXPECTED[:1]


async def test_logprobs_are_of_all_tokens(served: Served) -> None:
    body = {**ASK, "logprobs": True, "return_token_ids": True}
    choice = (await reply_to(served, body))["choices"][0]
    assert bytes(choice["token_ids"][:-1]) == CALLS.encode()
    chunks = await served.chunks(CHAT, {**body, "stream": True})
    streamed = [
        entry
        for chunk in chunks
        for entry in (chunk["choices"][0].get("logprobs") or {"content": ()})["content"]
    ]
    assert streamed == choice["logprobs"]["content"]
    assert bare(added_up(chunks)["tool_calls"]) == EXPECTED


# --- what the prompt shows, and what the output is held to ----------------------------------


async def test_the_prompt_has_the_tools_as_they_came(served: Served) -> None:
    await reply_to(served, ASK)
    prompt = prompt_of(served)
    assert prompt.count("[tool]") == 2
    shown = json.loads(prompt.split("[tool]")[1])
    assert shown == WEATHER and list(shown) == list(WEATHER)


async def test_no_choice_is_no_tool(served: Served) -> None:
    message = (await reply_to(served, {**ASK, "tool_choice": "none"}))["choices"][0]
    assert message["message"]["content"] == CALLS and message["finish_reason"] == "stop"
    assert "[tool]" not in prompt_of(served)
    assert served.engine.requests[-1].sampling.grammar is None


def grammar_of(request: Request) -> str:
    assert request.sampling.grammar is not None
    assert request.sampling.grammar.kind == "lark"
    return request.sampling.grammar.source


@pytest.mark.parametrize(
    "choice, names",
    [
        (None, {"weather", "now"}),
        ("auto", {"weather", "now"}),
        ("required", {"weather", "now"}),
        ({"type": "function", "function": {"name": "now"}}, {"now"}),
        (
            {
                "type": "allowed_tools",
                "allowed_tools": {"mode": "auto", "tools": [WEATHER]},
            },
            {"weather"},
        ),
    ],
)
async def test_choices(served: Served, choice: object, names: set[str]) -> None:
    await reply_to(served, {**ASK, "tool_choice": choice})
    source = grammar_of(served.engine.requests[-1])
    assert {name for name in ("weather", "now") if f'\\"{name}\\"' in source} == names
    is_free = choice in (None, "auto") or (
        isinstance(choice, dict) and choice["type"] == "allowed_tools"
    )
    assert ("TEXT" in source) == is_free
    assert [grammar.source for grammar in served.fleet.prepared] == [source]
    assert prompt_of(served).count("[tool]") == 2


async def test_only_what_may_be_called_is_a_call(served: Served) -> None:
    choice = {"type": "function", "function": {"name": "now"}}
    message = (await reply_to(served, {**ASK, "tool_choice": choice}))["choices"][0]["message"]
    assert bare(message["tool_calls"]) == [("now", "{}")]
    assert "weather" in message["content"]


async def test_one_call_at_most(served: Served) -> None:
    await reply_to(served, ASK)
    await reply_to(served, {**ASK, "parallel_tool_calls": False})
    many, one = (grammar_of(request) for request in served.engine.requests)
    assert ")*" in many and ")*" not in one.replace("(?s:.*)", "")


async def test_strict_is_the_default_and_can_be_left(served: Served) -> None:
    await reply_to(served, {**ASK, "tools": [loose(WEATHER), NOW]})
    source = grammar_of(served.engine.requests[-1])
    assert '"city"' not in source and '{"type": "object"' in source
    await reply_to(served, {**ASK, "tools": [loose(WEATHER), loose(NOW)]})
    assert served.engine.requests[-1].sampling.grammar is None
    strange = {"type": "object", "properties": {"a": {"not": {}}}}
    tools = [loose(tool) for tool in with_parameters(strange)]
    await reply_to(served, {**ASK, "tools": tools})


async def test_tools_beside_a_response_format(served: Served) -> None:
    schema = {"type": "object", "properties": {"answer": {"type": "integer"}}}
    format = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    await reply_to(served, {**ASK, "response_format": format})
    source = grammar_of(served.engine.requests[-1])
    assert '"answer"' in source and "weather" in source and "TEXT" not in source
    body = {**ASK, "structured_outputs": {"grammar": 'start: "a"'}}
    error = await served.error(CHAT, body)
    assert error["param"] == "structured_outputs.grammar"
    assert "cannot be combined" in error["message"]


async def test_what_the_model_cannot_follow(served: Served) -> None:
    served.fleet.grammar_error = "no special token of that name"
    error = await served.error(CHAT, ASK)
    assert error["param"] == "tools" and "special token" in error["message"]


async def test_schemas_that_are_too_much_together(served: Served) -> None:
    tools = []
    for name in "abc":
        schema = {"type": "object", "properties": {"a": {"description": name * 100_000}}}
        tools.append({"type": "function", "function": {"name": name, "parameters": schema}})
    served.fleet.info = fake_info(1 << 20)
    error = await served.error(CHAT, {**ASK, "tools": tools})
    assert error["param"] == "tools" and "the limit is 262144" in error["message"]
    assert served.fleet.prepared == []


async def test_a_model_that_takes_no_tools() -> None:
    async with serving() as served:
        error = await served.error(CHAT, ASK)
        assert error["param"] == "tools" and error["code"] == "unsupported_parameter"
        assert "tool_dialect" in error["message"]
        status, _ = await served.post(CHAT, {**ASK, "tool_choice": "none"})
        assert status == 200


# --- what is wrong -----------------------------------------------------------------------------


def errors() -> Iterator[tuple[dict[str, Any], str, str]]:
    """body, param, a word of the message"""
    deep: dict[str, Any] = {"type": "object", "properties": {"a": {"not": {}}}}
    f = {"type": "function", "function": {"name": "f"}}
    yield {"tools": with_parameters(deep)}, "tools[1].function.parameters", "not"
    yield {"tools": with_parameters([1])}, "tools[1].function.parameters", "object"
    yield {"tools": with_parameters({"type": "array"})}, "tools[1].function.parameters", "array"
    unique = {"properties": {"a": {"type": "array", "uniqueItems": True}}}
    yield {"tools": with_parameters(unique)}, "tools[1].function.parameters", "uniqueItems"
    yield {"tools": with_parameters({"$ref": "#/nowhere"})}, "tools[1].function.parameters", "nowh"
    yield {"tools": [NOW, f, NOW]}, "tools[2].function.name", "twice"
    yield {"tools": [{"type": "custom", "custom": {}}]}, "tools[0].type", "custom"
    yield {"tools": [{"type": "function"}]}, "tools[0].function", "object"
    yield {"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name", "None"
    for name in ("", "a b", "x" * 129, "é", 3):
        tool = {"type": "function", "function": {"name": name}}
        yield {"tools": [tool]}, "tools[0].function.name", "1 to 128"
    bad = {"type": "function", "function": {"name": "f", "strict": "no"}}
    yield {"tools": [bad]}, "tools[0].function.strict", "no"
    yield {"tools": [f] * 257}, "tools", "256"
    yield {"tools": "x"}, "tools", "array"
    yield {"tools": ["x"]}, "tools", "object"
    yield {"tool_choice": f}, "tool_choice", "'f'"
    yield {"tool_choice": "sometimes"}, "tool_choice", "sometimes"
    yield {"tool_choice": {"type": "function"}}, "tool_choice", "name"
    yield {"tool_choice": {"type": "allowed_tools"}}, "tool_choice", "allowed_tools"
    for mode, tools in (("none", [NOW]), ("auto", []), ("auto", [f]), ("auto", ["now"])):
        allowed = {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}
        yield {"tool_choice": allowed}, "tool_choice", ""
    yield {"tools": [], "tool_choice": "required"}, "tool_choice", "needs tools"
    yield {"tools": None, "tool_choice": f}, "tool_choice", "needs tools"


@pytest.mark.parametrize("body, param, word", list(errors()))
async def test_what_is_wrong_is_named(
    served: Served, body: dict[str, Any], param: str, word: str
) -> None:
    error = await served.error(CHAT, {**ASK, **body})
    assert error["param"].startswith(param)
    assert word in error["message"]
    assert served.engine.requests == []


async def test_a_conversation_with_calls_comes_back(served: Served) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "now", "arguments": '{"a": "é"}'}}
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "noon"},
    ]
    await reply_to(served, {**ASK, "messages": messages})
    end = '[user]hi[assistant]<tool_call>{"a": "é"}[tool]noon[assistant]'
    assert prompt_of(served).endswith(end)
    for function, param in (
        ({"arguments": "{}"}, "messages[1].tool_calls[0].function.name"),
        ({"name": "now", "arguments": "{"}, "messages"),
    ):
        messages[1]["tool_calls"] = [{"id": "1", "type": "function", "function": function}]
        error = await served.error(CHAT, {**ASK, "messages": messages})
        assert error["param"] == param and "messages[1].tool_calls[0]" in error["message"]


async def test_tokenize_counts_tools(served: Served) -> None:
    _, plain = await served.post("/tokenize", {"messages": ASK["messages"]})
    _, tools = await served.post("/tokenize", {"messages": ASK["messages"], "tools": [WEATHER]})
    assert tools["count"] > plain["count"] + 100


# --- calls that are not valid -------------------------------------------------------------------

LOOSE: dict[str, Any] = {**ASK, "tools": [loose(WEATHER), loose(NOW)]}


@pytest.mark.parametrize(
    "bad",
    [
        '<tool_call>\n{"name": "other", "arguments": {}}\n</tool_call>',
        "<tool_call>\nweather(city)\n</tool_call>",
        '<tool_call>\n{"name": "weather", "arguments": {"city": Oslo}}\n</tool_call>',
    ],
)
async def test_an_invalid_call_is_made_again_once_under_a_grammar(served: Served, bad: str) -> None:
    def answer(request: Request) -> Answer:
        return spoken(bad if request.sampling.grammar is None else CALLS, "stop")

    served.engine.answer = answer
    reply = await reply_to(served, {**LOOSE, "seed": 7})
    choice = reply["choices"][0]
    assert bare(choice["message"]["tool_calls"]) == EXPECTED
    assert choice["tool_call_retries"] == 1
    first, second = served.engine.requests
    assert first.prompt == second.prompt and first.id != second.id
    assert first.sampling.seed == second.sampling.seed == 7
    assert "weather" in grammar_of(second) and '"city"' not in grammar_of(second)
    spent = len(bad.encode()) + 1 + len(CALLS.encode()) + 1
    assert reply["usage"]["completion_tokens"] == spent
    async with served.session.get("/metrics") as response:
        assert 'quantd_tool_call_retries_total{model="org/tiny"} 1.0' in await response.text()


async def test_nothing_is_lost_where_nothing_is_made_again(served: Served) -> None:
    bad = '<tool_call>\n{"name": "other", "arguments": {}}\n</tool_call>'
    served.engine.answer = lambda request: spoken(bad, "stop")
    message = added_up(await served.chunks(CHAT, {**LOOSE, "stream": True}))
    assert (message["content"], message["finish_reason"]) == (bad, "stop")
    assert len(served.engine.requests) == 1
    served.engine.answer = lambda request: spoken(bad[:-3], "length")
    choice = (await reply_to(served, LOOSE))["choices"][0]
    assert choice["message"]["content"] == bad[:-3] and "tool_call_retries" not in choice
    assert len(served.engine.requests) == 2
    served.engine.answer = lambda request: spoken(CALLS, "stop")
    choice = (await reply_to(served, {**LOOSE, "stop": "rich"}))["choices"][0]
    assert choice["finish_reason"] == "stop" and "tool_call_retries" not in choice
    assert len(served.engine.requests) == 3
    served.engine.answer = lambda request: spoken(bad, "stop")
    choice = (await reply_to(served, LOOSE))["choices"][0]
    assert (choice["message"]["content"], choice["tool_call_retries"]) == (bad, 1)
    assert len(served.engine.requests) == 5


async def test_an_invalid_call_that_cannot_be_made_again(served: Served) -> None:
    bad = "<tool_call>x</tool_call>"
    served.engine.answer = lambda request: spoken(bad, "stop")
    served.fleet.grammar_error = "no fixed text for each token"
    choice = (await reply_to(served, LOOSE))["choices"][0]
    assert choice["message"]["content"] == bad and "tool_call_retries" not in choice


async def test_only_the_choice_with_the_invalid_call_is_made_again(served: Served) -> None:
    def answer(request: Request) -> Answer:
        is_bad = request.id.endswith("-1")
        return spoken("<tool_call>x</tool_call>" if is_bad else CALLS, "stop")

    served.engine.answer = answer
    choices = (await reply_to(served, {**LOOSE, "n": 3}))["choices"]
    assert [choice.get("tool_call_retries") for choice in choices] == [None, 1, None]
    assert all(bare(choice["message"]["tool_calls"]) == EXPECTED for choice in choices)


# --- reasoning ---------------------------------------------------------------------------------

THOUGHT = "\nIt is é\n</think>\n\n"
THINK: dict[str, Any] = {
    "messages": ASK["messages"],
    "chat_template_kwargs": {"think": True},
    "stream_options": {"include_usage": True},
    "stream": True,
}


async def test_reasoning_that_the_prompt_opens(served: Served) -> None:
    served.engine.answer = lambda request: spoken(THOUGHT + "Hello", "stop")
    whole = {key: value for key, value in THINK.items() if not key.startswith("stream")}
    reply = await reply_to(served, whole)
    message = reply["choices"][0]["message"]
    assert message["content"] == "Hello"
    assert message["reasoning"] == message["reasoning_content"] == "It is é"
    details = reply["usage"]["completion_tokens_details"]
    assert details["reasoning_tokens"] == len(THOUGHT.encode()) - 2
    chunks = await served.chunks(CHAT, THINK)
    streamed = added_up(chunks)
    assert (streamed["reasoning"], streamed["content"]) == ("It is é", "Hello")
    assert chunks[-1]["usage"] == reply["usage"]
    assert served.engine.requests[-1].sampling.grammar is None


async def test_reasoning_that_is_hidden_is_counted(served: Served) -> None:
    served.engine.answer = lambda request: spoken(THOUGHT + "Hello", "stop")
    chunks = await served.chunks(CHAT, {**THINK, "include_reasoning": False})
    streamed = added_up(chunks)
    assert (streamed["reasoning"], streamed["content"]) == ("", "Hello")
    assert chunks[-1]["usage"]["completion_tokens_details"]["reasoning_tokens"] > 0
    whole = {key: value for key, value in THINK.items() if not key.startswith("stream")}
    reply = await reply_to(served, {**whole, "include_reasoning": False})
    assert "reasoning" not in reply["choices"][0]["message"]


async def test_reasoning_that_is_cut_off(served: Served) -> None:
    served.engine.answer = lambda request: spoken("It is", "length")
    whole = {key: value for key, value in THINK.items() if not key.startswith("stream")}
    reply = await reply_to(served, whole)
    message = reply["choices"][0]["message"]
    assert (message["content"], message["reasoning"]) == (None, "It is")
    assert reply["usage"]["completion_tokens_details"]["reasoning_tokens"] == 5


async def test_a_stop_string_ends_reasoning_too_and_never_shows(served: Served) -> None:
    whole = {key: value for key, value in THINK.items() if not key.startswith("stream")}
    for stop, reasoning in ((" is", "It"), ("\u00e9", "It is ")):
        served.engine.answer = lambda request: spoken(THOUGHT + "Hello", "stop")
        choice = (await reply_to(served, {**whole, "stop": stop}))["choices"][0]
        message = choice["message"]
        assert (message["reasoning"], message["content"]) == (reasoning, None)
        assert choice["finish_reason"] == "stop"
        streamed = added_up(await served.chunks(CHAT, {**THINK, "stop": stop}))
        assert (streamed["reasoning"], streamed["content"]) == (reasoning, "")


async def test_reasoning_then_a_call(served: Served) -> None:
    served.engine.answer = lambda request: spoken(THOUGHT + CALLS, "stop")
    reply = await reply_to(served, {**ASK, "chat_template_kwargs": {"think": True}})
    message = reply["choices"][0]["message"]
    assert (message["reasoning"], message["content"]) == ("It is é", "I look.")
    assert bare(message["tool_calls"]) == EXPECTED
    assert "until" in grammar_of(served.engine.requests[-1])


async def test_a_response_format_lets_reasoning_pass(served: Served) -> None:
    whole = {key: value for key, value in THINK.items() if not key.startswith("stream")}
    await reply_to(served, {**whole, "response_format": {"type": "json_object"}})
    assert "</think>" in grammar_of(served.engine.requests[-1]).replace("\\", "")

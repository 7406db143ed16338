"""/v1/responses and /v1/conversations over a scripted engine: context, chains, keeping, owners."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from batch_fakes import Time, at_work, contents, create, wait
from server_fakes import Answer, FakeFleet, Served, byte_text_model, push, serving, spoken

from quantd.daemon.config import StoreSettings
from quantd.daemon.errors import QueueFull, Unavailable
from quantd.daemon.server.auth import ApiKeys
from quantd.daemon.types import Request

URL = "/v1/responses"
CALL = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"}
TOOL = {"type": "function", "name": "f"}
ALLOWED = {"type": "allowed_tools", "mode": "auto"}
TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}]{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function.arguments | tojson }}"
    "{% endfor %}{% endfor %}[assistant]{# tools <tool_call> arguments #}"
)
SMALL = 100_000


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
async def served(tmp_path: Path, time: Time) -> AsyncIterator[Served]:
    async with at_work(tmp_path, time) as served:
        yield served


async def ask(served: Served, input: Any, **fields: Any) -> dict[str, Any]:
    status, reply = await served.post(URL, {"model": "tiny", "input": input} | fields)
    assert status == 200, reply
    made: dict[str, Any] = reply
    return made


def prompt(served: Served, index: int = -1) -> str:
    """What the engine was given, as text."""
    ids = served.engine.requests[index].prompt
    return bytes(token for token in ids if token < 256).decode()


async def stream(served: Served, path: str, body: Any = None) -> list[dict[str, Any]]:
    method = "GET" if body is None else "POST"
    async with served.session.request(method, path, json=body) as response:
        assert response.status == 200, await response.text()
        text = await response.text()
    return [
        json.loads(each.split("data: ", 1)[1])
        for each in text.split("\n\n")
        if each.startswith("event: ")
    ]


def text_of(response: dict[str, Any]) -> str:
    return "".join(
        part["text"]
        for item in response["output"]
        if item["type"] == "message"
        for part in item["content"]
    )


# --- one response ---------------------------------------------------------------------------------


async def test_the_whole_object(served: Served) -> None:
    reply = await ask(
        served,
        "hi",
        instructions="be brief",
        temperature=0.5,
        metadata={"k": "v"},
        max_output_tokens=50,
        user="u",
    )
    assert prompt(served) == "[system]be brief[user]hi[assistant]"
    assert served.engine.requests[0].sampling.temperature == 0.5
    assert served.engine.requests[0].sampling.max_tokens == 50
    assert reply["id"].startswith("resp_") and reply["object"] == "response"
    assert (reply["status"], reply["model"], text_of(reply)) == ("completed", "org/tiny", "ok")
    assert reply["usage"] == {
        "input_tokens": len(served.engine.requests[0].prompt),
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": 3,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": len(served.engine.requests[0].prompt) + 3,
    }
    assert reply["metadata"] == {"k": "v"} and reply["instructions"] == "be brief"
    assert reply["error"] is None and reply["incomplete_details"] is None
    assert await served.get(f"{URL}/{reply['id']}") == (200, reply)


async def test_an_answer_that_was_cut_off_says_so(served: Served) -> None:
    served.engine.answer = lambda request: spoken("abc", "length")
    reply = await ask(served, "hi", max_output_tokens=3)
    assert reply["status"] == "incomplete" and reply["completed_at"] is None
    assert reply["incomplete_details"] == {"reason": "max_output_tokens"}
    assert reply["output"][0]["status"] == "incomplete"


async def test_a_stream_has_the_same_end(served: Served) -> None:
    body = {"input": "hi", "stream": True}
    events = await stream(served, URL, body)
    assert events[0]["type"] == "response.created"
    assert events[0]["response"]["status"] == "in_progress"
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    deltas = "".join(e["delta"] for e in events if e["type"] == "response.output_text.delta")
    final = events[-1]["response"]
    assert events[-1]["type"] == "response.completed"
    assert deltas == text_of(final) == "ok"
    assert await served.get(f"{URL}/{final['id']}") == (200, final)


async def test_log_probabilities(served: Served) -> None:
    reply = await ask(served, "hi", include=["message.output_text.logprobs"], top_logprobs=2)
    logprobs = reply["output"][0]["content"][0]["logprobs"]
    assert [entry["token"] for entry in logprobs] == ["o", "k"]
    assert len(logprobs[0]["top_logprobs"]) == 2
    events = await stream(served, URL, {"input": "hi", "stream": True, "top_logprobs": 1})
    deltas = [e["logprobs"] for e in events if e["type"] == "response.output_text.delta"]
    assert [entry["token"] for entries in deltas for entry in entries] == ["o", "k"]


ITEMS: list[dict[str, Any]] = [
    {"role": "developer", "content": "terse"},
    {"role": "user", "content": [{"type": "input_text", "text": "weather?"}]},
    {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
    {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": "{}"},
    {"type": "function_call", "call_id": "c2", "name": "time", "arguments": '{"a":1}'},
    {"type": "function_call_output", "call_id": "c1", "output": "sun"},
    {
        "type": "function_call_output",
        "call_id": "c2",
        "output": [{"type": "input_text", "text": "noon"}],
    },
    {
        "type": "message",
        "role": "assistant",
        "id": "msg_given",
        "status": "completed",
        "content": [{"type": "output_text", "text": "sunny noon", "annotations": []}],
    },
    {"role": "user", "content": "and now?"},
]


async def test_items_become_messages(served: Served) -> None:
    reply = await ask(served, ITEMS)
    assert prompt(served) == (
        "[system]terse[user]weather?[assistant][tool]sun[tool]noon"
        "[assistant]sunny noon[user]and now?[assistant]"
    )
    _, page = await served.get(f"{URL}/{reply['id']}/input_items?order=asc&limit=50")
    assert [item["type"] for item in page["data"]] == [
        item.get("type", "message") for item in ITEMS
    ]
    assert page["data"][7]["id"] == "msg_given"
    assert page["data"][3]["call_id"] == "c1" and page["data"][3]["status"] == "completed"
    first = page["data"][0]["id"]
    assert (page["first_id"], page["has_more"]) == (first, False)
    _, page = await served.get(f"{URL}/{reply['id']}/input_items?order=asc&limit=2&after={first}")
    assert [item["type"] for item in page["data"]] == ["message", "reasoning"]
    assert page["has_more"]
    _, page = await served.get(f"{URL}/{reply['id']}/input_items")
    assert page["data"][0]["role"] == "user" and page["data"][-1]["role"] == "developer"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role"),
        ({"input": [{"type": "web_search_call", "id": "x"}]}, "input[0].type"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input[0].content[0]",
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_text"}]}]},
            "input[0].content[0].text",
        ),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input[0].call_id"),
        ({"input": [3]}, "input[0]"),
        ({"input": [{**CALL, "arguments": "{x"}]}, "input[0].arguments"),
        ({"input": [{**CALL, "arguments": "[" * 100_000}]}, "input[0].arguments"),
        ({"input": [{**CALL, "name": ""}]}, "input[0].name"),
        ({"tools": [TOOL], "tool_choice": {**ALLOWED, "tools": 5}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {**ALLOWED, "tools": None}}, "tool_choice"),
        ({"input": 3}, "input"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "file_search"}]}, "tools[0].type"),
        ({"tool_choice": {"type": "file_search"}}, "tool_choice.type"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"context_management": [{"type": "compaction"}]}, "context_management"),
        ({"moderation": {"model": "m"}}, "moderation"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"truncation": "some"}, "truncation"),
        ({"include": ["file_search_call.results"]}, "include"),
        ({"reasoning": {"summary": "detailed"}}, "reasoning.summary"),
        ({"conversation": "conv_x", "previous_response_id": "resp_x"}, "previous_response_id"),
        ({"background": True, "store": False}, "background"),
        ({"metadata": {"k": "v" * 600}}, "metadata"),
        ({"n": 2}, "n"),
        ({"max_tokens": 5}, "max_tokens"),
    ],
)
async def test_a_wrong_field_is_named(served: Served, fields: dict[str, Any], param: str) -> None:
    error = await served.error(URL, {"model": "tiny", "input": "x"} | fields)
    assert error["param"] == param
    assert served.engine.requests == []


async def test_a_refusal_of_the_engine_has_this_apis_names(served: Served) -> None:
    error = await served.error(URL, {"model": "tiny"})
    assert error["param"] == "input" and "input" in error["message"]
    served.engine.refuse = lambda request: QueueFull("full", retry_after=1.0)
    assert (await served.post(URL, {"input": "x"}))[0] == 429
    assert (await served.post(URL, {"input": "x", "model": "none"}))[0] == 404


async def test_a_failure_in_the_middle_is_an_event_and_kept(served: Served) -> None:
    served.engine.answer = lambda request: Answer([b"a", b"b"], "error", "the worker died")
    events = await stream(served, URL, {"input": "hi", "stream": True})
    assert events[-1]["type"] == "response.failed"
    failed = events[-1]["response"]
    assert failed["error"] == {"code": "server_error", "message": "the worker died"}
    assert await served.get(f"{URL}/{failed['id']}") == (200, failed)
    status, reply = await served.post(URL, {"input": "hi"})
    assert (status, reply["error"]["message"]) == (503, "the worker died")


async def test_a_client_that_leaves_leaves_nothing(served: Served) -> None:
    served.engine.answer = lambda request: None
    async with served.session.post(URL, json={"input": "hi", "stream": True}) as response:
        await response.content.readuntil(b"\n\n")
    await served.engine.abort_seen.wait()
    while served.fleet.num_leases:
        await asyncio.sleep(0)
    assert await served.state.store.responses.unfinished() == []


async def test_how_many_tokens_it_would_be(served: Served) -> None:
    status, reply = await served.post(
        f"{URL}/input_tokens", {"input": ITEMS, "instructions": "x", "model": "tiny"}
    )
    assert status == 200
    made = await ask(served, ITEMS, instructions="x")
    assert reply == {
        "input_tokens": made["usage"]["input_tokens"],
        "object": "response.input_tokens",
    }
    assert len(served.engine.requests) == 1


# --- chains ---------------------------------------------------------------------------------------


async def test_a_chain_has_all_but_the_instructions(served: Served) -> None:
    first = await ask(served, "one", instructions="be brief")
    second = await ask(served, "two", previous_response_id=first["id"])
    assert prompt(served) == "[user]one[assistant]ok[user]two[assistant]"
    await ask(served, "three", previous_response_id=second["id"], instructions="new")
    assert prompt(served) == (
        "[system]new[user]one[assistant]ok[user]two[assistant]ok[user]three[assistant]"
    )
    assert second["previous_response_id"] == first["id"]


async def test_calls_and_their_outputs_stay_in_a_chain(served: Served) -> None:
    first = await ask(served, ITEMS[:4])
    output = {"type": "function_call_output", "call_id": "c1", "output": "sun"}
    await ask(served, [output], previous_response_id=first["id"])
    assert "[tool]sun" in prompt(served)
    assert prompt(served).startswith("[system]terse[user]weather?[assistant]")


async def test_a_call_that_was_cut_off_does_not_end_the_conversation(tmp_path: Path) -> None:
    fleet = FakeFleet(text=byte_text_model(TEMPLATE))
    async with at_work(tmp_path, fleet=fleet) as served:
        said = 'I ask.<tool_call>{"name": "f", "arguments": {"a'
        served.engine.answer = lambda request: spoken(said, "length")
        made = await conversation(served)
        first = await ask(served, "one", tools=[TOOL], conversation=made["id"])
        assert first["output"][1]["status"] == "incomplete"
        assert first["output"][1]["arguments"] == '{"a'
        expected = "[user]one[assistant]I ask.[user]two[assistant]"
        await ask(served, "two", conversation=made["id"])
        assert prompt(served) == expected
        await ask(served, "two", previous_response_id=first["id"])
        assert prompt(served) == expected
        again = [{"role": "user", "content": "one"}, *first["output"]]
        await ask(served, [*again, {"role": "user", "content": "two"}])
        assert prompt(served) == expected


async def test_a_call_that_a_stop_string_has_cut_off_is_incomplete(tmp_path: Path) -> None:
    fleet = FakeFleet(text=byte_text_model(TEMPLATE))
    async with at_work(tmp_path, fleet=fleet) as served:
        said = '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
        served.engine.answer = lambda request: spoken(said, "stop")
        [call] = (await ask(served, "one", tools=[TOOL], stop=": 1"))["output"]
        assert (call["arguments"], call["status"]) == ('{"a"', "incomplete")
        [call] = (await ask(served, "one", tools=[TOOL], stop="</tool"))["output"]
        assert (call["arguments"], call["status"]) == ('{"a": 1}', "completed")


async def test_what_was_said_before_is_not_said_twice(served: Served) -> None:
    first = await ask(served, "one")
    more = {"role": "user", "content": "two"}
    for before in (first["output"], [{"type": "item_reference", "id": first["output"][0]["id"]}]):
        body = {"input": [more, *before], "previous_response_id": first["id"]}
        error = await served.error(URL, body)
        assert (error["param"], error["code"]) == ("input[1]", "duplicate_item")
        assert first["output"][0]["id"] in error["message"]
        error = await served.error(f"{URL}/input_tokens", body)
        assert error["code"] == "duplicate_item"
    assert len(served.engine.requests) == 1


async def test_two_children_of_one_parent(served: Served) -> None:
    first = await ask(served, "one")
    left = await ask(served, "left", previous_response_id=first["id"])
    right = await ask(served, "right", previous_response_id=first["id"])
    await ask(served, "on", previous_response_id=left["id"])
    assert prompt(served) == "[user]one[assistant]ok[user]left[assistant]ok[user]on[assistant]"
    await ask(served, "on", previous_response_id=right["id"])
    assert "left" not in prompt(served) and "right" in prompt(served)


async def test_what_is_not_kept_cannot_be_followed(served: Served) -> None:
    first = await ask(served, "one", store=False)
    assert first["store"] is False
    assert (await served.get(f"{URL}/{first['id']}"))[0] == 404
    status, reply = await served.post(URL, {"input": "two", "previous_response_id": first["id"]})
    assert (status, reply["error"]["code"]) == (404, "previous_response_not_found")
    assert reply["error"]["param"] == "previous_response_id"


async def test_deleting_takes_the_content_away(served: Served) -> None:
    first = await ask(served, "secret words")
    second = await ask(served, "two", previous_response_id=first["id"])
    async with served.session.delete(f"{URL}/{first['id']}") as response:
        assert await response.json() == {
            "id": first["id"],
            "object": "response",
            "deleted": True,
        }
    for path in (f"{URL}/{first['id']}", f"{URL}/{first['id']}/input_items"):
        assert (await served.get(path))[0] == 404
    assert (await served.get(f"{URL}/{second['id']}"))[0] == 200
    status, reply = await served.post(URL, {"input": "three", "previous_response_id": second["id"]})
    assert (status, reply["error"]["code"]) == (404, "previous_response_not_found")
    assert first["id"] in reply["error"]["message"]
    rows = await served.state.store.database.run(
        lambda db: db.execute("SELECT count(*) FROM items WHERE body LIKE '%secret%'").fetchone()
    )
    assert rows == (0,)


async def test_a_reference_stands_for_its_item(served: Served) -> None:
    first = await ask(served, "one")
    reference = {"type": "item_reference", "id": first["output"][0]["id"]}
    await ask(served, [reference, {"role": "user", "content": "go on"}])
    assert prompt(served) == "[assistant]ok[user]go on[assistant]"
    status, _ = await served.post(URL, {"input": [{"type": "item_reference", "id": "msg_no"}]})
    assert status == 404


async def test_a_chain_survives_a_restart(tmp_path: Path) -> None:
    async with at_work(tmp_path) as served:
        first = await ask(served, "one")
    async with at_work(tmp_path) as served:
        await ask(served, "two", previous_response_id=first["id"])
        assert prompt(served) == "[user]one[assistant]ok[user]two[assistant]"


async def test_what_is_deleted_is_forgotten_by_the_models(served: Served) -> None:
    first = await ask(served, "one")
    assert [request.mark for request in served.engine.requests] == [first["id"]]
    await ask(served, "two", store=False)
    assert served.engine.requests[-1].mark == ""
    async with served.session.delete(f"{URL}/{first['id']}"):
        assert served.fleet.calls == [f"forget {first['id']}"]
    _, made = await served.post("/v1/conversations", {})
    await ask(served, "three", conversation=made["id"])
    assert served.engine.requests[-1].mark == made["id"]
    path = f"/v1/conversations/{made['id']}"
    _, page = await served.get(f"{path}/items")
    served.fleet.calls.clear()
    async with served.session.delete(f"{path}/items/{page['data'][0]['id']}"):
        assert served.fleet.calls == [f"forget {made['id']}"]
    async with served.session.delete(path):
        assert served.fleet.calls == [f"forget {made['id']}"] * 2


async def test_what_time_and_room_take_away_is_forgotten_too(tmp_path: Path) -> None:
    time = Time()
    async with at_work(tmp_path, time, responses_bytes=SMALL, responses_seconds=1e6) as served:
        first = await ask(served, "first")
        time.now += 1_000_001
        second = await ask(served, "x" * 1000)
        assert served.fleet.calls == [f"forget {first['id']}"]
        while f"forget {second['id']}" not in served.fleet.calls:
            time.now += 4000
            await ask(served, "x" * 1000)
        assert (await served.get(f"{URL}/{second['id']}"))[0] == 404


async def test_one_that_is_not_kept_is_not_marked_for_ever(served: Served) -> None:
    served.engine.answer = lambda request: None
    async with served.session.post(URL, json={"input": "hi", "stream": True}) as response:
        await response.content.readuntil(b"\n\n")
    await wait_for(lambda: served.fleet.calls)
    assert served.fleet.calls == [f"unmark {served.engine.requests[0].mark}"]


# --- truncation -----------------------------------------------------------------------------------


async def test_only_auto_drops_turns_and_says_which(served: Served) -> None:
    """The fake model has 512 tokens."""
    items: list[dict[str, Any]] = [{"role": "system", "content": "stay", "id": "sys"}]
    for turn in range(10):
        items.append({"role": "user", "content": "q" * 60, "id": f"q{turn}"})
        items.append({"role": "assistant", "content": "a" * 20, "id": f"a{turn}"})
    items.append({"role": "user", "content": "last", "id": "q10"})
    await ask(served, items)  # the scripted engine takes any length
    assert len(served.engine.requests[0].prompt) > 512
    reply = await ask(served, items, truncation="auto", max_output_tokens=40)
    assert reply["truncation"] == "auto"
    num_tokens = len(served.engine.requests[1].prompt)
    assert num_tokens <= 512 - 40
    dropped = reply["dropped_items"]
    assert dropped == [f"{kind}{turn}" for turn in range(len(dropped) // 2) for kind in "qa"]
    assert prompt(served).startswith("[system]stay[user]q")
    assert prompt(served).endswith("[user]last[assistant]")
    one_more = len("[user][assistant]") + 80
    assert num_tokens + one_more > 512 - 40, "no turn is dropped that fits"
    assert "dropped_items" not in await ask(served, "short", truncation="auto")


# --- in the background ----------------------------------------------------------------------------


async def ended(served: Served, id: str) -> dict[str, Any]:
    while True:
        _, response = await served.get(f"{URL}/{id}")
        if response["status"] not in ("queued", "in_progress"):
            made: dict[str, Any] = response
            return made
        await asyncio.sleep(0.002)


async def test_in_the_background(served: Served) -> None:
    reply = await ask(served, "hi", background=True)
    assert reply["status"] == "queued" and reply["background"] is True
    response = await ended(served, reply["id"])
    assert (response["status"], text_of(response)) == ("completed", "ok")
    await ask(served, "two", previous_response_id=reply["id"])
    assert prompt(served) == "[user]hi[assistant]ok[user]two[assistant]"
    status, error = await served.get(f"{URL}/{reply['id']}?stream=true")
    assert (status, error["error"]["param"]) == (400, "stream")


def wait_for(condition: Callable[[], Any]) -> Any:
    async def poll() -> None:
        while not condition():
            await asyncio.sleep(0.002)

    return poll()


async def test_a_stream_that_broke_is_picked_up_again(served: Served) -> None:
    served.engine.answer = lambda request: None
    body = {"input": "hi", "background": True, "stream": True}
    async with served.session.post(URL, json=body) as response:
        first = json.loads((await response.content.readuntil(b"\n\n")).split(b"data: ", 1)[1])
        await wait_for(lambda: served.engine.streams)
        push(served.engine.requests[0], served.engine.streams[0], b"a")
        for _ in range(5):
            seen = json.loads((await response.content.readuntil(b"\n\n")).split(b"data: ", 1)[1])
    id = first["response"]["id"]
    assert first["type"] == "response.created" and seen["delta"] == "a"
    # The client has left; the response goes on.
    push(served.engine.requests[0], served.engine.streams[0], b"b")
    rest = asyncio.create_task(
        stream(served, f"{URL}/{id}?stream=true&starting_after={seen['sequence_number']}")
    )
    await asyncio.sleep(0.01)
    push(served.engine.requests[0], served.engine.streams[0], b"c")
    served.engine.streams[0].finish("length")
    events = await rest
    assert events[0]["sequence_number"] == seen["sequence_number"] + 1
    assert "".join(e.get("delta", "") for e in events) == "bc"
    assert events[-1]["type"] == "response.incomplete"
    # And once more, from the disk.
    again = await stream(served, f"{URL}/{id}?stream=true")
    assert [e["sequence_number"] for e in again] == list(range(len(again)))
    assert again[-len(events) :] == events and again[0]["type"] == "response.created"
    assert again[1]["type"] == "response.queued"


async def test_cancel(served: Served) -> None:
    served.engine.answer = lambda request: None
    reply = await ask(served, "hi", background=True)
    await wait_for(lambda: served.engine.streams)
    push(served.engine.requests[0], served.engine.streams[0], b"part")
    await asyncio.sleep(0.01)
    status, response = await served.post(f"{URL}/{reply['id']}/cancel", {})
    assert (status, response["status"], text_of(response)) == (200, "cancelled", "part")
    assert served.engine.streams[0].is_finished
    assert await served.post(f"{URL}/{reply['id']}/cancel", {}) == (200, response)
    plain = await ask_ok(served)
    assert (await served.post(f"{URL}/{plain['id']}/cancel", {}))[0] == 400


async def ask_ok(served: Served) -> dict[str, Any]:
    served.engine.answer = lambda request: spoken("ok", "stop")
    return await ask(served, "plain")


async def test_one_that_is_being_made_cannot_be_followed_and_can_be_deleted(
    served: Served,
) -> None:
    served.engine.answer = lambda request: None
    reply = await ask(served, "hi", background=True)
    await wait_for(lambda: served.engine.streams)
    status, error = await served.post(URL, {"input": "x", "previous_response_id": reply["id"]})
    assert (status, error["error"]["code"]) == (400, "previous_response_not_finished")
    async with served.session.delete(f"{URL}/{reply['id']}") as response:
        assert response.status == 200
    assert served.engine.streams[0].is_finished
    assert (await served.get(f"{URL}/{reply['id']}"))[0] == 404


async def test_a_restart_ends_what_was_being_made(tmp_path: Path) -> None:
    async with at_work(tmp_path) as served:
        served.engine.answer = lambda request: None
        reply = await ask(served, "hi", background=True)
        await wait_for(lambda: served.engine.streams)
    async with at_work(tmp_path) as served:
        response = await ended(served, reply["id"])
        assert response["status"] == "failed"
        assert "stopped" in response["error"]["message"]
        _, page = await served.get(f"{URL}/{reply['id']}/input_items")
        assert page["data"][0]["content"][0]["text"] == "hi"


async def test_a_failure_in_the_background(served: Served) -> None:
    served.engine.refuse = lambda request: Unavailable("no worker")
    reply = await ask(served, "hi", background=True)
    response = await ended(served, reply["id"])
    assert response["error"] == {"code": "server_error", "message": "no worker"}


async def test_a_full_queue_is_waited_for_in_order(served: Served, time: Time) -> None:
    refused: list[Request] = []

    def refuse(request: Request) -> QueueFull | None:
        refused.append(request)
        return QueueFull("full", retry_after=3.0) if len(refused) <= 7 else None

    served.engine.refuse = refuse
    made = [await ask(served, f"{number}", background=True) for number in range(4)]
    assert [reply["status"] for reply in made] == ["queued"] * 4
    responses = [await ended(served, reply["id"]) for reply in made]
    assert [text_of(response) for response in responses] == ["ok"] * 4
    first_tries = list(dict.fromkeys(request.id for request in refused))
    assert [id[: len(made[0]["id"])] for id in first_tries] == [reply["id"] for reply in made]
    assert len({request.id for request in refused[:8]}) == 1, "the others wait behind the first"
    assert time.slept.count(3.0) == 7
    assert served.state.background.queue._locks == {}


async def test_while_it_waits_it_is_queued_and_can_be_cancelled(served: Served, time: Time) -> None:
    served.engine.refuse = lambda request: QueueFull("full", retry_after=60.0)
    reply = await ask(served, "hi", background=True)
    other = await ask(served, "other", background=True)
    await wait_for(lambda: 60.0 in time.slept)
    assert (await served.get(f"{URL}/{reply['id']}"))[1]["status"] == "queued"
    _, cancelled = await served.post(f"{URL}/{reply['id']}/cancel", {})
    assert cancelled["status"] == "cancelled"
    served.engine.refuse = lambda request: None
    time.move(60)
    assert (await ended(served, other["id"]))["status"] == "completed"


async def test_it_waits_no_longer_than_its_timeout(served: Served) -> None:
    served.engine.refuse = lambda request: QueueFull("full", retry_after=3.0)
    reply = await ask(served, "hi", background=True, timeout=2.0)
    response = await ended(served, reply["id"])
    assert "the queue was full" in response["error"]["message"]


async def test_too_many_in_the_background_are_refused(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantd.daemon.server.responses.background.MAX_RUNNING", 2)
    served.engine.answer = lambda request: None
    for _ in range(2):
        await ask(served, "hi", background=True)
    status, reply = await served.post(URL, {"input": "x", "background": True})
    assert (status, reply["error"]["code"]) == (429, "queue_full")
    assert "limit is 2" in reply["error"]["message"]


async def test_what_cannot_begin_is_said_at_once(served: Served) -> None:
    body = {"input": "x", "background": True, "previous_response_id": "resp_no"}
    assert (await served.post(URL, body))[0] == 404


# --- conversations --------------------------------------------------------------------------------


async def conversation(served: Served, **fields: Any) -> dict[str, Any]:
    status, reply = await served.post("/v1/conversations", fields)
    assert status == 200, reply
    made: dict[str, Any] = reply
    return made


async def test_a_conversation_grows(served: Served) -> None:
    made = await conversation(
        served, items=[{"role": "system", "content": "terse"}], metadata={"a": "b"}
    )
    assert made["object"] == "conversation" and made["metadata"] == {"a": "b"}
    path = f"/v1/conversations/{made['id']}"
    reply = await ask(served, "one", conversation=made["id"])
    assert reply["conversation"] == {"id": made["id"]}
    await ask(served, "two", conversation={"id": made["id"]})
    assert prompt(served) == ("[system]terse[user]one[assistant]ok[user]two[assistant]")
    _, page = await served.get(f"{path}/items?order=asc")
    assert [item["role"] for item in page["data"]] == [
        "system",
        "user",
        "assistant",
        "user",
        "assistant",
    ]
    _, page = await served.post(
        f"{path}/items", {"items": [{"role": "user", "content": "by hand"}]}
    )
    added = page["data"][0]
    assert await served.get(f"{path}/items/{added['id']}") == (200, added)
    async with served.session.delete(f"{path}/items/{added['id']}") as response:
        assert (await response.json())["id"] == made["id"]
    assert (await served.get(f"{path}/items/{added['id']}"))[0] == 404
    _, changed = await served.post(path, {"metadata": {"c": "d"}})
    assert changed["metadata"] == {"c": "d"}
    assert await served.get(path) == (200, changed)
    async with served.session.delete(path) as response:
        assert (await response.json())["deleted"] is True
    assert (await served.get(path))[0] == 404
    assert (await served.post(URL, {"input": "x", "conversation": made["id"]}))[0] == 404
    assert (await served.get(f"{URL}/{reply['id']}"))[0] == 200


async def test_pages_of_a_conversation_walk_it_in_both_directions(served: Served) -> None:
    items = [{"role": "user", "content": f"{number}"} for number in range(7)]
    made = await conversation(served, items=items)
    for order, expected in (("asc", "0123456"), ("desc", "6543210"), ("", "6543210")):
        seen, after, has_more = "", "", True
        while has_more:
            query = f"limit=3{order and '&order=' + order}{after and '&after=' + after}"
            _, page = await served.get(f"/v1/conversations/{made['id']}/items?{query}")
            seen += "".join(item["content"][0]["text"] for item in page["data"])
            after, has_more = page["last_id"], page["has_more"]
        assert seen == expected


async def test_responses_in_one_conversation_take_turns(served: Served) -> None:
    made = await conversation(served)
    running = 0

    def play(request: Request) -> Answer:
        return spoken("ok", "stop")

    served.engine.answer = play
    replies = await asyncio.gather(
        *(ask(served, f"{number}", conversation=made["id"]) for number in range(6))
    )
    assert len({reply["id"] for reply in replies}) == 6 and running == 0
    prompts = sorted((prompt(served, index) for index in range(6)), key=len)
    for shorter, longer in zip(prompts, prompts[1:], strict=False):
        assert longer.startswith(shorter + "ok[user]"), "one has not seen another"
    assert served.state.turns._locks == {}


async def test_an_item_of_another_content_is_not_dropped_for_its_id(served: Served) -> None:
    item = {"role": "user", "content": "one", "id": "msg_1"}
    made = await conversation(served, items=[item])
    body = {"items": [{"role": "user", "content": "zero"}, {**item, "content": "two"}]}
    error = await served.error(f"/v1/conversations/{made['id']}/items", body)
    assert (error["param"], error["code"]) == ("items[1].id", "duplicate_item")
    _, page = await served.get(f"/v1/conversations/{made['id']}/items")
    assert [each["content"][0]["text"] for each in page["data"]] == ["one"], "all or none"


async def test_a_wrong_item_of_a_conversation(served: Served) -> None:
    error = await served.error("/v1/conversations", {"items": [{"role": "x", "content": "y"}]})
    assert error["param"] == "items[0].role"
    many = [{"role": "user", "content": "y"}] * 21
    assert (await served.error("/v1/conversations", {"items": many}))["param"] == "items"


# --- owners, bounds, batches ----------------------------------------------------------------------


async def test_a_key_sees_its_own_only(tmp_path: Path) -> None:
    keys = ApiKeys([("alice", "key-a"), ("bob", "key-b")])
    async with serving(store=StoreSettings(path=tmp_path), keys=keys) as served:
        alice = {"headers": {"Authorization": "Bearer key-a"}}
        bob = {"headers": {"Authorization": "Bearer key-b"}}
        _, made = await served.post(URL, {"input": "hi"}, **alice)
        _, talk = await served.post("/v1/conversations", {}, **alice)
        for path in (
            f"{URL}/{made['id']}",
            f"{URL}/{made['id']}/input_items",
            f"/v1/conversations/{talk['id']}",
            f"/v1/conversations/{talk['id']}/items",
        ):
            assert (await served.get(path, **bob))[0] == 404
            assert (await served.get(path, **alice))[0] == 200
        reference = {"type": "item_reference", "id": made["output"][0]["id"]}
        for body in (
            {"input": "x", "previous_response_id": made["id"]},
            {"input": "x", "conversation": talk["id"]},
            {"input": [reference]},
        ):
            assert (await served.post(URL, body, **bob))[0] == 404
        assert (await served.post(f"{URL}/{made['id']}/cancel", {}, **bob))[0] == 404
        async with served.session.delete(f"{URL}/{made['id']}", **bob) as response:
            assert response.status == 404


async def test_the_least_recently_used_goes_first(tmp_path: Path) -> None:
    time = Time()
    async with at_work(tmp_path, time, responses_bytes=SMALL) as served:
        first = await ask(served, "first")
        child = await ask(served, "child", previous_response_id=first["id"])
        other = await ask(served, "other")
        for number in range(60):
            time.now += 4000
            await ask(served, "x" * 1000, metadata={"n": str(number)})
            if number % 10 == 0:  # in use, and with it what it follows on
                await ask(served, "again", previous_response_id=child["id"])
        assert (await served.get(f"{URL}/{other['id']}"))[0] == 404
        assert (await served.get(f"{URL}/{first['id']}"))[0] == 200
        kept, rows, items = await served.state.store.database.run(
            lambda db: (
                db.execute("SELECT num_bytes FROM kept").fetchone()[0],
                db.execute("SELECT sum(num_bytes) FROM responses").fetchone()[0],
                db.execute(
                    "SELECT count(*) FROM items WHERE holder NOT IN (SELECT id FROM responses)"
                ).fetchone()[0],
            )
        )
        assert kept == rows <= SMALL and items == 0


async def test_what_nobody_uses_goes_with_time(tmp_path: Path) -> None:
    time = Time()
    async with at_work(tmp_path, time, responses_seconds=86400.0) as served:
        first = await ask(served, "first")
        talk = await conversation(served)
        time.now += 86_399
        assert (await served.get(f"{URL}/{first['id']}"))[0] == 200
        time.now += 86_399
        assert (await served.get(f"{URL}/{first['id']}"))[0] == 200
        assert (await served.get(f"/v1/conversations/{talk['id']}"))[0] == 404
        time.now += 86_401
        assert (await served.get(f"{URL}/{first['id']}"))[0] == 404


async def test_responses_in_a_batch(served: Served) -> None:
    lines = [
        {"custom_id": id, "method": "POST", "url": URL, "body": {"model": "tiny", "input": id}}
        for id in ("a", "b")
    ]
    batch = await wait(served, await create(served, lines, endpoint=URL))
    assert batch["request_counts"]["completed"] == 2 and batch["usage"]["output_tokens"] == 6
    results = await contents(served, batch["output_file_id"])
    response = results["a"]["response"]["body"]
    assert text_of(response) == "ok"
    await ask(served, "on", previous_response_id=response["id"])
    assert prompt(served) == "[user]a[assistant]ok[user]on[assistant]"


async def test_without_a_store_a_response_that_is_not_kept_is_fine() -> None:
    async with serving() as served:
        assert (await served.post(URL, {"input": "hi", "store": False}))[0] == 200
        status, reply = await served.post(URL, {"input": "hi"})
        assert (status, reply["error"]["code"]) == (503, "store_unavailable")

"""Responses and conversations by the official SDK, unchanged, against the daemon.

`test_other_sdks.py` runs this file once more, with the SDK's former generation.
"""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
from harness import Daemon, Server
from pydantic import BaseModel

pytestmark = pytest.mark.xdist_group("clients")

QUESTION = "Sort these numbers: 42, 7, 19"
ASK: dict[str, Any] = {"model": "demo", "temperature": 0, "max_output_tokens": 24}
LONG: dict[str, Any] = ASK | {"max_output_tokens": 8000, "extra_body": {"ignore_eos": True}}


def connect(server: Server, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=240)


@pytest.fixture(scope="module")
def client(demo_server: Server) -> Iterator[openai.OpenAI]:
    with connect(demo_server) as client:
        yield client


def ended(client: openai.OpenAI, id: str) -> Any:
    deadline = time.monotonic() + 240
    while (response := client.responses.retrieve(id)).status in ("queued", "in_progress"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return response


def test_it_says_what_the_chat_says(client: openai.OpenAI) -> None:
    response = client.responses.create(input=QUESTION, **ASK)
    said = client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": QUESTION}],
        temperature=0,
        max_completion_tokens=24,
    )
    assert response.output_text == said.choices[0].message.content
    assert response.usage is not None and said.usage is not None
    assert response.usage.input_tokens == said.usage.prompt_tokens
    assert response.usage.output_tokens == said.usage.completion_tokens
    assert response.status == "completed" and response.object == "response"
    kept = client.responses.retrieve(response.id)
    assert kept.output == response.output and kept.usage == response.usage
    counted = client.responses.input_tokens.count(model="demo", input=QUESTION)
    assert counted.input_tokens == response.usage.input_tokens


def test_streamed(client: openai.OpenAI) -> None:
    plain = client.responses.create(input=QUESTION, **ASK)
    with client.responses.stream(input=QUESTION, **ASK) as stream:
        events = list(stream)
        final = stream.get_final_response()
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    text = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    assert text == final.output_text == plain.output_text


def test_the_second_turn_computes_what_is_new(client: openai.OpenAI) -> None:
    opening = "Tell me about quantd. " * 8
    first = client.responses.create(input=opening, **ASK)
    second = client.responses.create(input="And in one word?", previous_response_id=first.id, **ASK)
    assert first.usage is not None and second.usage is not None
    used = first.usage.input_tokens + first.usage.output_tokens
    cached = second.usage.input_tokens_details.cached_tokens
    assert cached >= first.usage.input_tokens // 16 * 16
    assert second.usage.input_tokens > used - 2
    # The same conversation by hand is the same prompt.
    by_hand = client.chat.completions.create(
        model="demo",
        messages=[
            {"role": "user", "content": opening},
            {"role": "assistant", "content": first.output_text},
            {"role": "user", "content": "And in one word?"},
        ],
        temperature=0,
        max_completion_tokens=24,
    )
    assert by_hand.usage is not None
    assert by_hand.usage.prompt_tokens == second.usage.input_tokens
    assert by_hand.choices[0].message.content == second.output_text


def test_a_function_call_and_its_output_stay_in_the_chain(client: openai.OpenAI) -> None:
    """The call is the client's own: whether a model calls is tested where tools are."""
    call = {
        "type": "function_call",
        "call_id": "call_1",
        "name": "weather",
        "arguments": '{"city": "Oslo"}',
    }
    question = {"role": "user", "content": "How is the weather in Oslo?"}
    first = client.responses.create(input=[question, call], **ASK)  # type: ignore[list-item]
    output = {"type": "function_call_output", "call_id": "call_1", "output": "sunny"}
    second = client.responses.create(
        input=[output],  # type: ignore[list-item]
        previous_response_id=first.id,
        **ASK,
    )
    items = [*client.responses.input_items.list(first.id, order="asc")]
    assert [item.type for item in items] == ["message", "function_call"]
    items = [*client.responses.input_items.list(second.id)]
    assert [item.type for item in items] == ["function_call_output"]
    branch = client.responses.create(input="Hm?", previous_response_id=first.id, **ASK)
    assert branch.previous_response_id == second.previous_response_id == first.id


class City(BaseModel):
    """Nothing in it can become long: the model is a small one."""

    size: Literal["small", "large"]
    is_capital: bool


WEATHER: dict[str, Any] = {
    "type": "function",
    "name": "get_weather",
    "description": "Get the weather",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": True,
}
CALL: dict[str, Any] = ASK | {"max_output_tokens": 200, "tools": [WEATHER]}


def test_the_model_calls_and_is_answered(client: openai.OpenAI) -> None:
    first = client.responses.create(input="What is the weather in Paris?", **CALL)
    [call] = [item for item in first.output if item.type == "function_call"]
    assert (call.name, json.loads(call.arguments)) == ("get_weather", {"city": "Paris"})
    output = {
        "type": "function_call_output",
        "call_id": call.call_id,
        "output": '{"weather": "sunny"}',
    }
    second = client.responses.create(
        input=[output],  # type: ignore[list-item]
        previous_response_id=first.id,
        **CALL,
    )
    assert "sunny" in second.output_text
    # The chat API, told the same, says the same to the same prompt.
    function = {name: value for name, value in WEATHER.items() if name != "type"}
    said = client.chat.completions.create(
        model="demo",
        messages=[
            {"role": "user", "content": "What is the weather in Paris?"},
            {
                "role": "assistant",
                "tool_calls": [
                    {
                        "id": call.call_id,
                        "type": "function",
                        "function": {"name": call.name, "arguments": call.arguments},
                    }
                ],
            },
            {"role": "tool", "tool_call_id": call.call_id, "content": '{"weather": "sunny"}'},
        ],
        tools=[{"type": "function", "function": function}],  # type: ignore[list-item]
        temperature=0,
        max_completion_tokens=200,
    )
    assert said.usage is not None and second.usage is not None
    assert said.choices[0].message.content == second.output_text
    assert said.usage.prompt_tokens == second.usage.input_tokens
    # Asked statelessly, with the items that were given: once more the same.
    third = client.responses.create(
        input=[  # type: ignore[list-item]
            {"role": "user", "content": "What is the weather in Paris?"},
            *[item.model_dump(exclude_none=True) for item in first.output],
            output,
        ],
        store=False,
        **CALL,
    )
    assert third.output_text == second.output_text


def test_a_streamed_call(client: openai.OpenAI) -> None:
    plain = client.responses.create(input="What is the weather in Paris?", **CALL)
    with client.responses.stream(input="What is the weather in Paris?", **CALL) as stream:
        events = list(stream)
        final = stream.get_final_response()
    kinds = [event.type for event in events]
    assert "response.function_call_arguments.delta" in kinds
    at = kinds.index("response.function_call_arguments.done")
    assert kinds[at + 1] == "response.output_item.done"
    deltas = [e.delta for e in events if e.type == "response.function_call_arguments.delta"]
    [call] = [item for item in final.output if item.type == "function_call"]
    [expected] = [item for item in plain.output if item.type == "function_call"]
    assert "".join(deltas) == call.arguments == expected.arguments


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "get_weather"}])
def test_a_call_that_is_asked_for(client: openai.OpenAI, choice: Any) -> None:
    response = client.responses.create(
        input="What is 3 + 4?", tool_choice=choice, parallel_tool_calls=False, **CALL
    )
    assert [item.type for item in response.output if item.type != "message"] == ["function_call"]
    none = client.responses.create(
        input="What is the weather in Paris?", tool_choice="none", **CALL
    )
    assert [item.type for item in none.output] == ["message"]


def test_a_schema_is_followed_and_parsed(client: openai.OpenAI) -> None:
    response = client.responses.parse(
        input="Paris", text_format=City, **(ASK | {"max_output_tokens": 200})
    )
    assert isinstance(response.output_parsed, City)
    with client.responses.stream(
        input="Paris", text_format=City, **(ASK | {"max_output_tokens": 200})
    ) as stream:
        assert stream.get_final_response().output_parsed == response.output_parsed
    with pytest.raises(openai.BadRequestError) as caught:
        schema = {"type": "object", "properties": {"x": {"type": "nothing"}}}
        format = {"type": "json_schema", "name": "x", "schema": schema}
        client.responses.create(input="x", text={"format": format}, **ASK)  # type: ignore
    assert (caught.value.param or "").startswith("text.format")


def test_branches_deletion_and_what_is_not_kept(client: openai.OpenAI) -> None:
    first = client.responses.create(input=QUESTION, **ASK)
    for text in ("Once more", "In reverse"):
        branch = client.responses.create(input=text, previous_response_id=first.id, **ASK)
        assert branch.status in ("completed", "incomplete")
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)
    unkept = client.responses.create(input=QUESTION, store=False, **ASK)
    for id in (first.id, unkept.id):
        with pytest.raises(openai.NotFoundError) as caught:
            client.responses.create(input="x", previous_response_id=id, **ASK)
        assert caught.value.code == "previous_response_not_found"


STORY = "Tell me what you know of these cities: " + ", ".join(
    f"{name} with {number} people" for number, name in enumerate(["Oslo", "Paris", "Rome"] * 8, 11)
)


RUN = uuid.uuid4().hex


def cached(response: Any) -> int:
    return int(response.usage.input_tokens_details.cached_tokens)


def salted(salt: str) -> dict[str, Any]:
    """Nobody else shares its blocks, and no earlier run of the same test at the same daemon."""
    return ASK | {"extra_body": {"cache_salt": f"{salt} {RUN}", "ignore_eos": True}}


def test_what_is_deleted_leaves_the_cache(client: openai.OpenAI) -> None:
    fields = salted("deleted")
    first = client.responses.create(input=STORY, **fields)
    second = client.responses.create(input="Why?", previous_response_id=first.id, **fields)
    assert cached(second) > 100
    client.responses.delete(second.id)
    again = client.responses.create(input="Why?", previous_response_id=first.id, **fields)
    assert cached(again) == cached(second), "the first turn's blocks are the first response's"
    client.responses.delete(first.id)
    client.responses.delete(again.id)
    assert cached(client.responses.create(input=STORY, **fields)) == 0

    conversation = client.conversations.create()
    fields = salted("deleted conversation")
    for text in (STORY, "Why?"):
        said = client.responses.create(input=text, conversation=conversation.id, **fields)
    assert cached(said) > 100
    # What anybody else has in the cache stays.
    client.responses.create(input=STORY, store=False, **salted("another"))
    client.conversations.delete(conversation.id)
    assert cached(client.responses.create(input=STORY, store=False, **fields)) == 0
    assert cached(client.responses.create(input=STORY, store=False, **salted("another"))) > 100


def test_a_chain_whose_blocks_had_to_leave_goes_on_the_same(
    serve: Callable[..., Daemon], client: openai.OpenAI
) -> None:
    """In a pool that holds few of them; the host has the others."""
    arguments = ["--kv-bytes", "4MiB", "--host-kv-bytes", "32MiB", "--max-context", "480"]
    small = serve("demo", "--dtype", "float32", "--threads", "1", *arguments)
    with connect(small) as tight:
        firsts = [
            [each.responses.create(input=f"{n}. {STORY}", **salted("x")) for n in range(6)]
            for each in (client, tight)
        ]
        for wide, narrow in zip(*firsts, strict=True):
            pair = [
                each.responses.create(input="Why?", previous_response_id=said.id, **salted("x"))
                for each, said in ((client, wide), (tight, narrow))
            ]
            assert pair[0].output_text == pair[1].output_text
            # To compute a block again may be measured to be cheaper than to fetch it.
            assert cached(pair[0]) >= cached(pair[1]) and cached(pair[0]) > 100
    assert small.metric('quantd_spill_bytes_total{direction="out",tier="host"}') > 0
    kv = json.loads(small.get("/admin/state", unix=True)[1])["engines"]["demo"]["kv"]
    assert kv["fetches"] + kv["recomputes"] > 0


TWO_MODELS = """
[models.one]
path = "embedded:demo"
dtype = "float32"
threads = 1
[models.two]
path = "embedded:demo"
dtype = "float32"
threads = 1
quantization = "int8"
"""


def test_a_chain_goes_on_with_another_model(serve: Callable[..., Daemon], tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(TWO_MODELS)
    daemon = serve("--config", str(tmp_path / "config.toml"))
    fields: dict[str, Any] = {"temperature": 0, "max_output_tokens": 24}
    with connect(daemon) as client:
        first = client.responses.create(model="one", input=STORY, **fields)
        second = client.responses.create(
            model="two", input="Why?", previous_response_id=first.id, **fields
        )
        turns: Any = [
            {"role": "user", "content": STORY},
            {"role": "assistant", "content": first.output_text},
            {"role": "user", "content": "Why?"},
        ]
        alone = client.responses.create(model="two", input=turns, store=False, **fields)
        assert (second.model, second.output_text) == ("two", alone.output_text)
        # Blocks are of one model: those of the first turn are nothing to the second one.
        assert cached(second) == 0 and cached(alone) > 100
        third = client.responses.create(
            model="one", input="And?", previous_response_id=second.id, **fields
        )
        assert third.model == "one" and cached(third) > 100


def test_hosted_tools_are_refused_by_name(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(input="x", tools=[{"type": "web_search"}], **ASK)
    assert caught.value.param == "tools[0].type"


def test_background_reconnect_and_cancel(client: openai.OpenAI) -> None:
    made = client.responses.create(input=QUESTION, background=True, **ASK)
    assert made.status == "queued"
    plain = client.responses.create(input=QUESTION, **ASK)
    assert ended(client, made.id).output_text == plain.output_text

    stream = client.responses.create(input=QUESTION, background=True, stream=True, **LONG)
    seen = []
    for event in stream:
        seen.append(event)
        if len(seen) == 12:
            break
    stream.response.close()
    id = seen[0].response.id  # type: ignore[union-attr]
    assert client.responses.retrieve(id).status == "in_progress"
    last = seen[-1].sequence_number
    again = client.responses.retrieve(id, stream=True, starting_after=last)
    following = next(iter(again))
    assert following.sequence_number == last + 1
    again.response.close()
    cancelled = client.responses.cancel(id)
    assert cancelled.status == "cancelled" and cancelled.output_text
    assert client.responses.cancel(id).status == "cancelled"
    replay = [*client.responses.retrieve(id, stream=True)]
    assert [event.sequence_number for event in replay] == list(range(len(replay)))


def test_conversations(client: openai.OpenAI) -> None:
    conversation = client.conversations.create(
        items=[{"type": "message", "role": "system", "content": "Be brief."}],
        metadata={"topic": "numbers"},
    )
    assert client.conversations.retrieve(conversation.id) == conversation
    first = client.responses.create(input=QUESTION, conversation=conversation.id, **ASK)
    assert first.conversation is not None and first.conversation.id == conversation.id
    client.responses.create(input="In reverse", conversation=conversation.id, **ASK)
    items = [*client.conversations.items.list(conversation.id, order="asc", limit=2)]
    assert [item.role for item in items] == [  # type: ignore[union-attr]
        "system",
        "user",
        "assistant",
        "user",
        "assistant",
    ]
    assert items[2].id == first.output[0].id
    added = client.conversations.items.create(
        conversation.id, items=[{"type": "message", "role": "user", "content": "by hand"}]
    )
    item = client.conversations.items.retrieve(added.data[0].id, conversation_id=conversation.id)
    assert item == added.data[0]
    client.conversations.items.delete(item.id, conversation_id=conversation.id)
    with pytest.raises(openai.NotFoundError):
        client.conversations.items.retrieve(item.id, conversation_id=conversation.id)
    assert client.conversations.update(conversation.id, metadata={"a": "b"}).metadata == {"a": "b"}
    assert client.conversations.delete(conversation.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.responses.create(input="x", conversation=conversation.id, **ASK)


def test_writes_to_one_conversation_take_turns(client: openai.OpenAI) -> None:
    conversation = client.conversations.create()
    failures: list[Exception] = []

    def ask(number: int) -> None:
        try:
            client.responses.create(input=f"{number}", conversation=conversation.id, **ASK)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    roles = [
        item.role  # type: ignore[union-attr]
        for item in client.conversations.items.list(conversation.id, order="asc")
    ]
    assert roles == ["user", "assistant"] * 5


TWO = """
[models.demo]
path = "embedded:demo"
dtype = "float32"
threads = 1
[models.other]
path = "embedded:demo-draft"
dtype = "float32"
threads = 1
"""


def test_other_models_restarts_and_owners(serve: Callable[..., Daemon], tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(f'[server]\napi_keys_file = "keys"\n{TWO}')
    (tmp_path / "keys").write_text("alice:sk-a\nbob:sk-b\n")
    start = ("--config", str(tmp_path / "config.toml"), "--store-path", str(tmp_path / "state"))
    daemon = serve(*start)
    with connect(daemon, "sk-a") as alice:
        first = alice.responses.create(input=QUESTION, **ASK)
        talk = alice.conversations.create()
        second = alice.responses.create(
            input="Again", previous_response_id=first.id, **(ASK | {"model": "other"})
        )
        assert second.model == "other"
        running = alice.responses.create(input=QUESTION, background=True, **LONG)
        deadline = time.monotonic() + 240
        while alice.responses.retrieve(running.id).status == "queued":
            assert time.monotonic() < deadline
            time.sleep(0.02)
    daemon.process.kill()
    daemon.process.wait()
    daemon = serve(*start)
    with connect(daemon, "sk-a") as alice, connect(daemon, "sk-b") as bob:
        third = alice.responses.create(input="On", previous_response_id=second.id, **ASK)
        assert third.model == "demo" and third.previous_response_id == second.id
        assert ended(alice, running.id).status == "failed"
        for call in (
            lambda: bob.responses.retrieve(first.id),
            lambda: bob.responses.delete(first.id),
            lambda: bob.responses.cancel(running.id),
            lambda: bob.responses.input_items.list(first.id),
            lambda: bob.responses.create(input="x", previous_response_id=first.id, **ASK),
            lambda: bob.responses.create(input="x", conversation=talk.id, **ASK),
            lambda: bob.conversations.retrieve(talk.id),
            lambda: bob.conversations.items.list(talk.id),
            lambda: bob.conversations.delete(talk.id),
        ):
            with pytest.raises(openai.NotFoundError):
                call()

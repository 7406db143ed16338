"""The safety filter through every face, over a scripted engine."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from batch_fakes import Time, at_work, contents, create, line, wait
from server_fakes import EOS, Answer, FakeFleet, Served, byte_text_model, serving, spoken

from quantd.daemon.config import (
    GuardSettings,
    ModelSettings,
    PolicySettings,
    RuleSettings,
    SafetySettings,
    Settings,
    StoreSettings,
)
from quantd.daemon.errors import ConfigError, Unavailable
from quantd.daemon.safety.policy import compile_policies
from quantd.daemon.server.anthropic.event_types import MessageDelta
from quantd.daemon.server.auth import ApiKeys
from quantd.daemon.server.chunks import (
    ChatChunk,
    ChatChunkChoice,
    CompletionChunk,
    CompletionChunkChoice,
)
from quantd.daemon.server.ollama.reply_types import ChatAnswer
from quantd.daemon.server.state import read_policies
from quantd.daemon.types import Request

CHAT, TEXT, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/messages"
RESPONSES, MODERATIONS = "/v1/responses", "/v1/moderations"
TEMPLATE = (
    "{% for tool in tools or [] %}[tool]{{ tool | tojson }}{% endfor %}"
    "{% for message in messages %}[{{ message.role }}]{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function.arguments | tojson }}"
    "{% endfor %}{% endfor %}[assistant]{% if enable_thinking %}<think>\n{% endif %}"
    "{# <tool_call> arguments </think> #}"
)
RULES = {
    "slurs": RuleSettings(name="slurs", words=("bad thing", "bad")),
    "pii": RuleSettings(name="pii", pii=("email", "card")),
    "long": RuleSettings(name="long", max_chars=40),
}
TOOL = {
    "type": "function",
    "function": {
        "name": "mail",
        "description": "Mails to a@b.de.",
        "parameters": {"type": "object", "properties": {"to": {"type": "string"}}},
        "strict": False,
    },
}

CALLED = {
    "role": "assistant",
    "tool_calls": [{"id": "c", "function": {"name": "do a bad thing", "arguments": "{}"}}],
}


def safety(*policies: PolicySettings, guard: GuardSettings | None = None) -> SafetySettings:
    return SafetySettings(
        rules=RULES,
        guards={} if guard is None else {guard.name: guard},
        policies={policy.name: policy for policy in policies},
    )


def policy(**fields: Any) -> PolicySettings:
    return PolicySettings(**{"name": "main", **fields})


BLOCK_OUTPUT = safety(policy(output={"slurs": "block", "pii": "redact"}))
BLOCK_INPUT = safety(policy(input={"slurs": "block", "pii": "redact"}))


@asynccontextmanager
async def filtering(
    given: SafetySettings, says: str = "ok", **options: Any
) -> AsyncIterator[Served]:
    fleet = FakeFleet(text=byte_text_model(TEMPLATE))
    async with serving(fleet=fleet, safety=given, **options) as served:
        served.engine.answer = lambda request: spoken(says, "stop")
        yield served


def ask(text: str = "hi", **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], **fields}


def prompt_of(served: Served) -> str:
    return bytes(token for token in served.engine.requests[-1].prompt if token < 256).decode()


async def ok(served: Served, path: str, body: dict[str, Any], **options: Any) -> dict[str, Any]:
    status, reply = await served.post(path, body, **options)
    assert status == 200, reply
    return reply  # type: ignore[no-any-return]


async def metrics(served: Served) -> str:
    async with served.session.get("/metrics") as response:
        return await response.text()


# --- output ---------------------------------------------------------------------------------------


SAYS = "Mail a@b.de, you b\u0430\u200bd thing! More."
SHOWN = "Mail [pii], you "
FOUND = {
    "pii": {"detected": True, "filtered": True},
    "slurs": {"detected": True, "filtered": True},
}


async def test_a_chat_is_cut_before_what_is_blocked() -> None:
    async with filtering(BLOCK_OUTPUT, SAYS) as served:
        [choice] = (await ok(served, CHAT, ask()))["choices"]
        assert choice["message"]["content"] == SHOWN
        assert choice["finish_reason"] == "content_filter" and choice["stop_reason"] is None
        assert choice["content_filter_results"] == FOUND
        assert served.engine.stopped and not served.engine.aborted, "the engine's work has ended"
        assert served.fleet.num_leases == 0
        text = await metrics(served)
        for action, category in (("block", "slurs"), ("redact", "pii")):
            labels = f'action="{action}",category="{category}",policy="main",stage="output"'
            assert f"quantd_safety_total{{{labels}}} 1.0" in text


@pytest.mark.parametrize("size", [1, 2, 3, 5, 1000])
async def test_a_stream_says_the_same_however_it_comes(size: int) -> None:
    raw = SAYS.encode()
    events = [raw[i : i + size] for i in range(0, len(raw), size)]
    async with filtering(BLOCK_OUTPUT) as served:
        served.engine.answer = lambda request: Answer(events, "length")
        chunks = await served.chunks(CHAT, ask(stream=True))
        choices = [chunk["choices"][0] for chunk in chunks]
        assert "".join(c["delta"].get("content", "") for c in choices) == SHOWN
        assert [c["finish_reason"] for c in choices if c["finish_reason"]] == ["content_filter"]
        assert choices[-1]["content_filter_results"] == FOUND
        texts = await served.chunks(TEXT, {"prompt": "x", "stream": True, "max_tokens": 100})
        assert "".join(t["choices"][0]["text"] for t in texts) == SHOWN
        assert texts[-1]["choices"][0]["finish_reason"] == "content_filter"


async def test_nothing_of_it_is_sent_while_it_may_still_be_blocked() -> None:
    async with filtering(BLOCK_OUTPUT) as served:
        served.engine.answer = lambda request: None
        request = asyncio.ensure_future(served.session.post(CHAT, json=ask(stream=True)))
        await served.engine.submitted.wait()
        stream = served.engine.streams[0]
        for byte in b"So: a bad":
            stream.push((byte,))
        async with await request as response:
            seen = b""
            while b'"content":"So' not in seen:
                seen += await response.content.readany()
            assert b"bad" not in seen
            stream.push(tuple(b" thing"))
            stream.push(tuple(b". And on"))
            seen += await response.content.read()
        assert b"bad" not in seen and b"thing" not in seen
        assert b'"finish_reason":"content_filter"' in seen
        assert stream.is_finished


async def test_choices_are_filtered_one_by_one() -> None:
    async with filtering(BLOCK_OUTPUT) as served:
        says = iter(["fine", "bad"])
        served.engine.answer = lambda request: spoken(next(says), "stop")
        choices = (await ok(served, CHAT, ask(n=2)))["choices"]
        assert [c["message"]["content"] for c in choices] == ["fine", ""]
        assert [c["finish_reason"] for c in choices] == ["stop", "content_filter"]
        assert "content_filter_results" not in choices[0]


async def test_annotations_change_nothing() -> None:
    given = safety(policy(output={"slurs": "annotate", "long": "annotate"}))
    async with filtering(given, SAYS) as served:
        body = ask(logprobs=True)
        [choice] = (await ok(served, CHAT, body))["choices"]
        assert choice["message"]["content"] == SAYS and choice["finish_reason"] == "stop"
        assert choice["content_filter_results"] == {"slurs": {"detected": True, "filtered": False}}
        assert len(choice["logprobs"]["content"]) == len(SAYS.encode())
        chunks = await served.chunks(CHAT, ask(stream=True))
        deltas = [c["choices"][0]["delta"].get("content", "") for c in chunks]
        assert "".join(deltas) == SAYS
        assert len(deltas) > len(SAYS), "nothing is held back"


async def test_log_probabilities_tell_nothing_of_what_was_taken_out() -> None:
    async with filtering(BLOCK_OUTPUT, "fine") as served:
        body = ask(logprobs=True, return_token_ids=True)
        [choice] = (await ok(served, CHAT, body))["choices"]
        assert len(choice["logprobs"]["content"]) == 5 and len(choice["token_ids"]) == 5
        for says in ("a bad thing", "to a@b.de!"):
            served.engine.answer = lambda request, says=says: spoken(says, "stop")
            [choice] = (await ok(served, CHAT, body))["choices"]
            assert choice["logprobs"]["content"] == [] and choice["token_ids"] == []
            chunks = await served.chunks(CHAT, {**body, "stream": True})
            assert not any(c["choices"][0]["logprobs"] for c in chunks)


async def test_tokens_behind_a_block_do_not_count_however_they_came() -> None:
    async with filtering(BLOCK_OUTPUT) as served:
        says = "to a@b.de, a bad thing, and more"
        whole = Answer([says[:4].encode(), says[4:].encode()], "length")
        counts = []
        for answer in (spoken(says), whole, Answer([says.encode()], "length")):
            served.engine.answer = lambda request, answer=answer: answer
            reply = await ok(served, CHAT, ask(logprobs=True))
            assert reply["choices"][0]["message"]["content"] == "to [pii], a "
            counts.append(reply["usage"]["completion_tokens"])
        assert len(set(counts)) == 1 and counts[0] < len(says)


async def test_an_answer_that_is_too_long() -> None:
    given = safety(policy(output={"long": "block"}))
    async with filtering(given, "x" * 50) as served:
        [choice] = (await ok(served, CHAT, ask()))["choices"]
        assert choice["message"]["content"] == "x" * 40
        assert choice["finish_reason"] == "content_filter"


THOUGHT = "<think>\nIt is bad.\n</think>\nFine."
CALL = (
    '<tool_call>\n{"name": "mail", "arguments": {"to": "a@b.de", "t": "\\u0062ad"}}\n</tool_call>'
)


async def test_reasoning_by_option() -> None:
    for reasoning, content, reason in ((True, None, "content_filter"), (False, "Fine.", "stop")):
        given = safety(policy(output={"slurs": "block"}, reasoning=reasoning))
        async with filtering(given, THOUGHT) as served:
            [choice] = (await ok(served, CHAT, ask()))["choices"]
            assert choice["message"]["content"] == content
            assert choice["finish_reason"] == reason
            assert choice["message"]["reasoning"] == ("It is " if reasoning else "It is bad.")


async def test_arguments_of_calls_by_option() -> None:
    for action, arguments, reason in (
        ("redact", '{"to": "a@b.de", "t": "[slurs]"}', "tool_calls"),
        ("block", '{"to": "a@b.de", "t": "', "content_filter"),
    ):
        given = safety(policy(output={"slurs": action}))
        async with filtering(given, CALL) as served:
            [choice] = (await ok(served, CHAT, ask(tools=[TOOL])))["choices"]
            assert choice["finish_reason"] == reason
            [call] = choice["message"]["tool_calls"]
            assert call["function"]["arguments"] == arguments
            assert len(served.engine.requests) == 1, "what is cut off is not made again"
    given = safety(policy(output={"slurs": "block"}, tool_calls=False))
    async with filtering(given, CALL) as served:
        [choice] = (await ok(served, CHAT, ask(tools=[TOOL])))["choices"]
        assert choice["finish_reason"] == "tool_calls"


async def test_an_answer_that_is_json_stays_json() -> None:
    says = '{"to": "\\u0061@b.de", "card": 4111111111111111}'
    async with filtering(BLOCK_OUTPUT, says) as served:
        body = ask(response_format={"type": "json_object"})
        [choice] = (await ok(served, CHAT, body))["choices"]
        assert json.loads(choice["message"]["content"]) == {"to": "[pii]", "card": "[pii]"}


async def test_anthropics_refusal() -> None:
    async with filtering(BLOCK_OUTPUT, SAYS) as served:
        body = ask(model="tiny", max_tokens=100)
        reply = await ok(served, MESSAGES, body)
        assert reply["content"] == [{"type": "text", "text": SHOWN}]
        assert reply["stop_reason"] == "refusal"
        assert reply["content_filter_results"] == FOUND
        events = await served.events(MESSAGES, {**body, "stream": True})
        data = [json.loads(event.split("data: ")[1]) for event in events]
        texts = [d["delta"]["text"] for d in data if d["type"] == "content_block_delta"]
        assert "".join(texts) == SHOWN
        assert data[-2]["delta"]["stop_reason"] == "refusal"
        assert data[-2]["content_filter_results"] == FOUND


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/chat", ask()),
        ("/api/generate", {"prompt": "hi"}),
        ("/api/generate", {"prompt": "hi", "raw": True}),
    ],
)
async def test_ollamas_end(path: str, body: dict[str, Any]) -> None:
    async with filtering(BLOCK_OUTPUT, SAYS) as served:

        def said(reply: dict[str, Any]) -> str:
            text: str = reply["response"] if "response" in reply else reply["message"]["content"]
            return text

        body = {**body, "model": "tiny"}
        reply = await ok(served, path, {**body, "stream": False})
        assert (said(reply), reply["done_reason"]) == (SHOWN, "content_filter")
        assert reply["content_filter_results"] == FOUND
        async with served.session.post(path, json=body) as response:
            lines = [json.loads(line) async for line in response.content]
        assert "".join(map(said, lines)) == SHOWN
        assert lines[-1]["done_reason"] == "content_filter"
        assert lines[-1]["content_filter_results"] == FOUND


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/chat", ask("bad")),
        ("/api/generate", {"prompt": "hi", "system": "bad"}),
        ("/api/generate", {"prompt": "bad", "raw": True}),
        ("/api/embed", {"input": ["fine", "bad"]}),
        ("/api/embeddings", {"prompt": "bad"}),
    ],
)
async def test_ollamas_prompts(path: str, body: dict[str, Any]) -> None:
    async with filtering(BLOCK_INPUT) as served:
        served.fleet.open.clear()  # a lease would never come
        status, reply = await served.post(path, {**body, "model": "tiny"})
        assert status == 400 and "'slurs'" in reply["error"]
        assert not served.engine.requests and served.fleet.num_leases == 0


async def test_an_incomplete_response(tmp_path: Path) -> None:
    store = StoreSettings(path=tmp_path)
    async with filtering(BLOCK_OUTPUT, SAYS, store=store) as served:
        reply = await ok(served, RESPONSES, {"input": "hi"})
        assert reply["status"] == "incomplete"
        assert reply["incomplete_details"] == {"reason": "content_filter"}
        assert reply["output"][0]["content"][0]["text"] == SHOWN
        assert reply["content_filter_results"] == FOUND
        _, kept = await served.get(f"{RESPONSES}/{reply['id']}")
        assert kept == reply
        events = await served.events(RESPONSES, {"input": "hi", "stream": True})
        assert "thing" not in "".join(events)
        assert events[-1].startswith("event: response.incomplete")


async def test_in_a_batch(tmp_path: Path) -> None:
    given = safety(policy(input={"slurs": "block"}, output={"pii": "redact"}))
    async with at_work(tmp_path, safety=given) as served:
        served.engine.answer = lambda request: spoken("to a@b.de", "stop")
        lines = [line("a"), line("b", content="a bad line")]
        batch = await wait(served, await create(served, lines))
        assert batch["request_counts"] == {"total": 2, "completed": 1, "failed": 1}
        results = await contents(served, batch["output_file_id"])
        [choice] = results["a"]["response"]["body"]["choices"]
        assert choice["message"]["content"] == "to [pii]"
        errors = await contents(served, batch["error_file_id"])
        assert errors["b"]["response"]["status_code"] == 400
        assert errors["b"]["response"]["body"]["error"]["code"] == "content_filter"
        assert len(served.engine.requests) == 1


# --- input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        (CHAT, ask("a BAD\nthing"), "messages"),
        (
            CHAT,
            {"messages": [{"role": "system", "content": "bad"}, *ask()["messages"]]},
            "messages",
        ),
        (CHAT, ask(tools=[TOOL], chat_template_kwargs={"x": ["bad"]}), "messages"),
        (CHAT, ask(reasoning_effort="bad"), "messages"),
        (CHAT, {"messages": [CALLED, *ask()["messages"]]}, "messages"),
        (TEXT, {"prompt": ["fine", "b\u200bad"]}, "prompt"),
        (RESPONSES, {"input": "bad", "store": False}, "input"),
        (RESPONSES, {"input": "bad", "store": False, "truncation": "auto"}, "input"),
        ("/v1/embeddings", {"input": ["fine", "bad"]}, "input"),
        ("/v1/rerank", {"query": "bad", "documents": ["x"]}, "documents"),
    ],
)
async def test_a_blocked_prompt_costs_nothing(path: str, body: dict[str, Any], field: str) -> None:
    async with filtering(BLOCK_INPUT) as served:
        served.fleet.open.clear()  # a lease would never come
        error = await served.error(path, body)
        assert error["code"] == "content_filter" and error["param"] == field
        assert "'main'" in error["message"] and "'slurs'" in error["message"]
        assert served.fleet.num_leases == 0 and not served.engine.requests
        labels = 'action="block",category="slurs",policy="main",stage="input"'
        assert f"quantd_safety_total{{{labels}}} 1.0" in await metrics(served)


async def test_anthropics_error_for_a_blocked_prompt() -> None:
    async with filtering(BLOCK_INPUT) as served:
        status, reply = await served.post(MESSAGES, ask("bad", model="tiny", max_tokens=9))
        assert (status, reply["error"]["type"]) == (400, "invalid_request_error")
        assert not served.engine.requests


async def test_a_word_in_two_parts_of_a_message() -> None:
    parts = [{"type": "text", "text": "so bad"}, {"type": "text", "text": "thing"}]
    given = SafetySettings(
        rules={"slurs": RuleSettings(name="slurs", words=("bad thing",))},
        policies={"main": policy(input={"slurs": "block"})},
    )
    async with filtering(given) as served:
        error = await served.error(CHAT, {"messages": [{"role": "user", "content": parts}]})
        assert error["code"] == "content_filter"


async def test_the_model_reads_what_is_redacted() -> None:
    async with filtering(BLOCK_INPUT) as served:
        call = {"id": "1", "function": {"name": "mail", "arguments": '{"to": "c@d.de", "n": 1}'}}
        messages = [
            *ask("I am x@y.org")["messages"],
            {"role": "assistant", "content": None, "tool_calls": [{"type": "function", **call}]},
            {"role": "tool", "tool_call_id": "1", "content": "sent to c@d.de"},
        ]
        reply = await ok(served, CHAT, {"messages": messages, "tools": [TOOL]})
        prompt = prompt_of(served)
        assert "@" not in prompt and prompt.count("[pii]") == 4
        assert reply["prompt_filter_results"] == [
            {
                "prompt_index": 0,
                "content_filter_results": {"pii": {"detected": True, "filtered": True}},
            }
        ]
        chunks = await served.chunks(CHAT, ask("I am x@y.org", stream=True))
        assert chunks[-1]["prompt_filter_results"] == reply["prompt_filter_results"]
        assert all("prompt_filter_results" not in chunk for chunk in chunks[:-1])
        text = await ok(served, TEXT, {"prompt": "x@y.org", "echo": True})
        assert text["choices"][0]["text"] == "[pii]ok"
        assert "content_filter_results" not in reply["choices"][0]


async def test_a_response_with_turns_left_out_is_redacted_too() -> None:
    async with filtering(BLOCK_INPUT) as served:
        body = {"input": "I am x@y.org", "store": False, "truncation": "auto"}
        await ok(served, RESPONSES, body)
        assert "[user]I am [pii][assistant]" in prompt_of(served)


async def test_token_ids_cannot_get_around_it() -> None:
    async with filtering(BLOCK_INPUT) as served:
        for prompt in ([98, 97, 100], [[98, 97, 100]]):
            error = await served.error(TEXT, {"prompt": prompt})
            assert error["param"] == "prompt" and "token ids" in error["message"]
        assert not served.engine.requests


async def test_a_long_prompt() -> None:
    given = safety(policy(input={"long": "block"}))
    async with filtering(given) as served:
        await ok(served, TEXT, {"prompt": "x" * 40})
        assert (await served.error(TEXT, {"prompt": ["x" * 30, "x" * 11]}))[
            "code"
        ] == "content_filter"


# --- which policy ---------------------------------------------------------------------------------


async def test_by_key_and_model() -> None:
    keys = ApiKeys([("alice", "ka"), ("bob", "kb"), ("carl", "kc")])
    given = safety(
        policy(name="free", keys=("alice",)),
        policy(name="other", keys=("b*",), models=("other",), input={"slurs": "block"}),
        policy(name="tiny", keys=("b*",), models=("org/*",), input={"slurs": "annotate"}),
        policy(name="rest", input={"slurs": "block"}),
    )
    async with filtering(given, keys=keys) as served:

        async def post(key: str) -> tuple[int, Any]:
            body = ask("bad", model="tiny")
            return await served.post(CHAT, body, headers={"Authorization": f"Bearer {key}"})

        status, reply = await post("ka")
        assert status == 200 and "prompt_filter_results" not in reply
        status, reply = await post("kb")
        assert status == 200 and "prompt_filter_results" in reply
        assert (await post("kc"))[0] == 400


async def test_an_unknown_model_is_said_to_be_so() -> None:
    async with filtering(BLOCK_INPUT) as served:
        status, reply = await served.post(CHAT, ask("bad", model="none"))
        assert (status, reply["error"]["code"]) == (404, "model_not_found")


async def test_other_policies_in_their_place() -> None:
    """What runs keeps those it began with."""
    async with filtering(BLOCK_OUTPUT) as served:
        served.engine.answer = lambda request: None
        task = asyncio.create_task(ok(served, CHAT, ask()))
        await served.engine.submitted.wait()
        model = ModelSettings(name="org/tiny", path=Path("x"))
        new = Settings(models={"org/tiny": model}, safety=safety(policy(output={"pii": "block"})))
        served.state.policies = read_policies(new)
        served.engine.streams[0].push(tuple(b"a bad a@b.de"))
        served.engine.streams[0].finish("length")
        assert (await task)["choices"][0]["message"]["content"] == "a "
        served.engine.answer = lambda request: spoken("a bad a@b.de", "stop")
        reply = await ok(served, CHAT, ask())
        assert reply["choices"][0]["message"]["content"] == "a bad "


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            safety(policy(input={"hate": "block"})),
            "safety.policies.main.input: 'hate': no rules or guard find such a category; "
            "known: long, pii, slurs",
        ),
        (
            safety(policy(output={"long": "redact"})),
            "safety.policies.main.output: 'long = redact': what a guard or max_chars finds has no",
        ),
        (
            safety(guard=GuardSettings(name="g", model="nope")),
            "safety.guards.g.model: 'nope': there is no such model; there are: org/tiny",
        ),
        (
            SafetySettings(rules={"a": RuleSettings(name="a", patterns=("x", "(?=y)"))}),
            "safety.rules.a.patterns: '(?=y)': invalid perl operator",
        ),
        (
            SafetySettings(rules={"a": RuleSettings(name="a", words=("\u200b",))}),
            "has no visible character",
        ),
        (
            SafetySettings(rules={"a": RuleSettings(name="a", words_file=Path("/nowhere"))}),
            "safety.rules.a.words_file: '/nowhere': cannot be read: No such file",
        ),
    ],
)
def test_what_is_wrong_with_a_policy(given: SafetySettings, message: str) -> None:
    model = ModelSettings(name="org/tiny", path=Path("x"))
    with pytest.raises(ConfigError) as caught:
        compile_policies(Settings(models={"org/tiny": model}, safety=given))
    assert message in str(caught.value)


def test_words_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "words"
    path.write_text("# ours\n\nbad\n worse thing \n")
    rules = {"a": RuleSettings(name="a", words_file=path)}
    policies = {"p": policy(name="p", input={"a": "block"})}
    made = compile_policies(Settings(safety=SafetySettings(rules=rules, policies=policies)))
    screen = made.by_name["p"].input.screen
    assert screen is not None and screen.rules is not None
    assert not screen.rules.is_clean("a worse thing") and screen.rules.is_clean("ours")


def test_without_policies_none_of_it_is_imported() -> None:
    code = (
        "import sys, quantd.daemon.service, quantd.daemon.server.app, quantd.daemon.server.state;"
        "from quantd.daemon.config import Settings; from quantd.daemon.safety import read_policies;"
        "assert read_policies(Settings()) is None;"
        "print([m for m in sys.modules if m == 're2' or m.startswith('quantd.daemon.safety.')])"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert out.stdout == "[]\n"


# --- guards ---------------------------------------------------------------------------------------


def guard(**fields: Any) -> GuardSettings:
    return GuardSettings(
        **{
            "name": "guard",
            "model": "tiny",
            "labels": {"S1": "violence", "S2": "fraud"},
            "window_chars": 64,
            **fields,
        }
    )


Judge = Callable[[str], Answer | None]


def says(served: Served, answer: str, judge: Judge) -> list[str]:
    """The engine plays model and guard; returns what the guard is asked."""
    asked: list[str] = []

    def play(request: Request) -> Answer | None:
        if not request.id.startswith("guard-"):
            return spoken(answer, "stop")
        asked.append(bytes(token for token in request.prompt if token < 256).decode())
        return judge(asked[-1])

    served.engine.answer = play
    return asked


def by_word(text: str) -> Answer:
    if "kill" in text:
        return spoken("\n\nunsafe\nS1,S9", "stop")
    return spoken("unsafe\nS9" if "odd" in text else "safe", "stop")


def failing(text: str) -> Answer:
    return Answer([b"un"], "error", "the worker died")


MODELS = {"tiny": "org/tiny"}


@asynccontextmanager
async def guarded(given: GuardSettings | None = None, **actions: Any) -> AsyncIterator[Served]:
    given = given or guard(model="org/tiny")
    async with filtering(safety(policy(**actions), guard=given)) as served:
        yield served


async def test_a_guard_before_the_model() -> None:
    async with guarded(input={"violence": "block", "guard": "annotate"}) as served:
        asked = says(served, "ok", by_word)
        assert (await served.error(CHAT, ask("kill it")))["code"] == "content_filter"
        assert asked == ["[user]kill it[assistant]"]
        assert len(served.engine.requests) == 1, "the guard's own"
        reply = await ok(served, CHAT, ask("odd"))
        assert reply["prompt_filter_results"][0]["content_filter_results"] == {
            "guard": {"detected": True, "filtered": False}
        }
        reply = await ok(served, CHAT, ask("fine"))
        assert "prompt_filter_results" not in reply
        assert served.fleet.num_leases == 0


async def test_a_guard_sees_what_rules_have_left() -> None:
    async with guarded(input={"pii": "redact", "violence": "block"}) as served:
        asked = says(served, "ok", by_word)
        await ok(served, CHAT, ask("I am x@y.org"))
        assert asked == ["[user]I am [pii][assistant]"]


async def test_a_long_text_is_judged_in_windows() -> None:
    async with guarded(input={"violence": "block"}) as served:
        asked = says(served, "ok", by_word)
        text = "x" * 62 + " kill " + "y" * 80  # a border cuts the word
        assert (await served.error(CHAT, ask(text)))["code"] == "content_filter"
        assert len(asked) == 2
        await ok(served, CHAT, ask("x" * 150))
        assert [len(text) - len("[user][assistant]") for text in asked[2:]] == [64, 128, 128]


async def test_an_answer_is_sent_when_it_was_judged() -> None:
    async with guarded(output={"violence": "block"}) as served:
        asked = says(served, "x" * 62 + " kill " + "y" * 80, by_word)
        for body in (ask("hi"), ask("hi", stream=True)):
            if "stream" in body:
                choices = [c["choices"][0] for c in await served.chunks(CHAT, body)]
                shown = "".join(c["delta"].get("content", "") for c in choices)
            else:
                choices = (await ok(served, CHAT, body))["choices"]
                shown = choices[0]["message"]["content"]
            assert shown == "x" * 62 + " k"
            assert choices[-1]["finish_reason"] == "content_filter"
            assert choices[-1]["content_filter_results"] == {
                "violence": {"detected": True, "filtered": True}
            }
        assert asked[0] == "[user]hi[assistant]" + "x" * 62 + " k[assistant]"


async def test_an_answer_that_passes_is_whole() -> None:
    text = "word " * 40
    async with guarded(output={"violence": "block", "slurs": "block"}) as served:
        says(served, text, by_word)
        chunks = await served.chunks(CHAT, ask(stream=True))
        deltas = [c["choices"][0]["delta"].get("content", "") for c in chunks]
        assert "".join(deltas) == text
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
        assert len([delta for delta in deltas if delta]) == 4, "a window at once"


async def test_a_call_is_held_back_behind_what_is_judged() -> None:
    async with guarded(output={"violence": "block"}) as served:
        says(served, "I kill it.\n" + CALL, by_word)
        [choice] = (await ok(served, CHAT, ask(tools=[TOOL])))["choices"]
        assert choice["message"].get("tool_calls") is None
        assert choice["finish_reason"] == "content_filter"
        says(served, "I look.\n" + CALL, by_word)
        [choice] = (await ok(served, CHAT, ask(tools=[TOOL])))["choices"]
        assert len(choice["message"]["tool_calls"]) == 1


async def test_a_guards_annotation_holds_nothing_back() -> None:
    async with guarded(output={"violence": "annotate"}) as served:
        says(served, "kill it", by_word)
        chunks = await served.chunks(CHAT, ask(stream=True))
        assert len(chunks) > len("kill it")
        assert chunks[-1]["choices"][0]["content_filter_results"] == {
            "violence": {"detected": True, "filtered": False}
        }


@pytest.mark.parametrize(
    "judge", [failing, lambda text: spoken("I think", "stop"), lambda text: spoken("", "stop")]
)
async def test_a_guard_that_fails(judge: Judge) -> None:
    for stage in ("input", "output"):
        closed = guard(model="org/tiny")
        async with guarded(closed, **{stage: {"violence": "block"}}) as served:
            says(served, "ok", judge)
            status, reply = await served.post(CHAT, ask())
            assert status == 503 and "the guard 'guard' has failed" in reply["error"]["message"]
            status, reply = await served.post(CHAT, ask(stream=True))
            assert status == 503, "nothing was sent before it was judged"
            assert 'quantd_safety_guard_failures_total{guard="guard"} 2.0' in await metrics(served)
            assert served.fleet.num_leases == 0
        opened = guard(model="org/tiny", on_failure="allow")
        async with guarded(opened, **{stage: {"violence": "block"}}) as served:
            says(served, "ok", judge)
            reply = await ok(served, CHAT, ask())
            assert reply["choices"][0]["message"]["content"] == "ok"
            assert reply["choices"][0]["finish_reason"] == "stop"


async def test_a_guard_that_takes_too_long() -> None:
    slow = guard(model="org/tiny", timeout_seconds=0.1)
    async with guarded(slow, input={"violence": "block"}) as served:
        says(served, "ok", lambda text: None)
        status, reply = await served.post(CHAT, ask())
        assert status == 503 and "no answer within 0.1 s" in reply["error"]["message"]
        assert served.engine.aborted == [request.id for request in served.engine.requests]


async def test_a_guard_that_cannot_be_loaded() -> None:
    async with guarded(input={"violence": "block"}) as served:
        served.engine.refuse = lambda request: Unavailable("not now")
        status, reply = await served.post(CHAT, ask())
        assert status == 503 and "not now" in reply["error"]["message"]


async def test_a_guard_judges_on_while_the_daemon_drains(monkeypatch: pytest.MonkeyPatch) -> None:
    async with guarded(output={"violence": "block"}) as served:
        asked = says(served, "ok", by_word)

        async def refused(model: str | None) -> Any:
            raise Unavailable("the daemon is shutting down")

        def play(request: Request) -> Answer | None:
            if not request.id.startswith("guard-"):
                monkeypatch.setattr(served.fleet, "lease", refused)
            return judged(request)

        judged, served.engine.answer = served.engine.answer, play
        reply = await ok(served, CHAT, ask())
        assert reply["choices"][0]["message"]["content"] == "ok" and len(asked) == 1
        assert served.fleet.num_leases == 0


async def test_a_guard_with_words_of_its_own() -> None:
    given = guard(
        model="org/tiny", labels={}, safe="No", unsafe="Yes", prompt="Is this bad? <{text}>"
    )
    async with guarded(given, input={"guard": "block"}) as served:
        asked = says(served, "ok", lambda text: spoken("Yes." if "kill" in text else "no", "stop"))
        assert (await served.error(CHAT, ask("kill")))["code"] == "content_filter"
        assert asked == ["[user]Is this bad? <kill>[assistant]"]
        await ok(served, CHAT, ask("fine"))


# --- /v1/moderations ------------------------------------------------------------------------------


async def test_moderations() -> None:
    given = safety(
        policy(input={"slurs": "block", "violence": "annotate"}, output={"pii": "redact"}),
        guard=guard(model="org/tiny"),
    )
    async with filtering(given) as served:
        says(served, "ok", by_word)
        reply = await ok(served, MODERATIONS, {"input": "b\u0430d kill a@b.de"})
        assert reply["id"].startswith("modr-") and reply["model"] == "main"
        [result] = reply["results"]
        assert result["flagged"] is True
        names = [name for name, is_found in result["categories"].items() if is_found]
        assert sorted(names) == ["pii", "slurs", "violence"]
        assert result["category_scores"]["slurs"] == 1.0
        assert result["category_applied_input_types"]["slurs"] == ["text"]
        assert result["categories"]["self-harm/intent"] is False
        reply = await ok(served, MODERATIONS, {"input": ["fine", "bad"], "model": "main"})
        assert [r["flagged"] for r in reply["results"]] == [False, True]
        assert "quantd_safety_total{" not in await metrics(served), "nothing was filtered"


async def test_moderations_by_a_guard_alone() -> None:
    async with filtering(safety(guard=guard(model="org/tiny"))) as served:
        says(served, "ok", by_word)
        parts = [{"type": "text", "text": "ki"}, {"type": "text", "text": "kill"}]
        reply = await ok(served, MODERATIONS, {"input": parts, "model": "guard"})
        [result] = reply["results"]
        assert result["flagged"] and result["categories"]["violence"]
        assert not result["categories"]["fraud"] and not result["categories"]["guard"]


async def test_the_score_is_the_guards() -> None:
    """logprob_of: a token's is -token/100, here the same for all that is on top."""
    given = guard(model="org/tiny", labels={}, safe="\x00", unsafe="\x01")
    async with filtering(safety(guard=given)) as served:
        served.engine.answer = lambda request: Answer([(1,), (EOS,)], "stop")
        reply = await ok(served, MODERATIONS, {"input": "x", "model": "guard"})
        score = reply["results"][0]["category_scores"]["guard"]
        assert 0.0 < score <= 1.0


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"type": "image_url", "image_url": {"url": "x"}}]}, "input[0]"),
        ({"input": [{"type": "text", "text": "a"}, "b"]}, "input[1]"),
    ],
)
async def test_wrong_moderations(body: dict[str, Any], param: str) -> None:
    async with filtering(BLOCK_INPUT) as served:
        assert (await served.error(MODERATIONS, body))["param"] == param


async def test_moderations_by_nothing() -> None:
    async with filtering(BLOCK_INPUT) as served:
        status, reply = await served.post(MODERATIONS, {"input": "x", "model": "nope"})
        assert (status, reply["error"]["param"]) == (404, "model")
        assert "There are: main." in reply["error"]["message"]
    async with serving() as served:
        status, _ = await served.post(MODERATIONS, {"input": "x"})
        assert status == 404


async def test_lines_of_a_batch_are_moderated(tmp_path: Path) -> None:
    given = safety(policy(input={"slurs": "block"}, output={"pii": "redact"}))

    def asking(custom_id: str, **body: Any) -> dict[str, Any]:
        return {"custom_id": custom_id, "method": "POST", "url": MODERATIONS, "body": body}

    async with at_work(tmp_path, safety=given) as served:
        lines = [
            asking("plain", input="a bad line"),
            asking("named", input=["fine", "a@b.de"], model="main"),
            asking("openai", input="fine", model="omni-moderation-latest"),
            asking("wrong", input=[]),
        ]
        batch = await wait(served, await create(served, lines, endpoint=MODERATIONS))
        assert batch["request_counts"] == {"total": 4, "completed": 3, "failed": 1}
        assert batch["usage"]["total_tokens"] == 0
        results = await contents(served, batch["output_file_id"])
        flags = {
            name: [r["flagged"] for r in result["response"]["body"]["results"]]
            for name, result in results.items()
        }
        assert flags == {"plain": [True], "named": [False, True], "openai": [False]}
        [wrong] = (await contents(served, batch["error_file_id"])).values()
        assert wrong["response"]["status_code"] == 400
        assert wrong["response"]["body"]["error"]["param"] == "input"
        assert not served.engine.requests

        lines = [asking("a", input="x", model="nobody"), asking("b", input="x")]
        batch = await wait(served, await create(served, lines, endpoint=MODERATIONS))
        [error] = batch["errors"]["data"]
        assert (error["param"], error["line"]) == ("body.model", 1)
        assert "There are: main." in error["message"]


async def test_a_failing_guard_moderates_nothing() -> None:
    async with filtering(safety(guard=guard(model="org/tiny"))) as served:
        says(served, "ok", failing)
        status, _ = await served.post(MODERATIONS, {"input": "x", "model": "guard"})
        assert status == 503


async def test_a_batch_line_waits_for_a_guard_that_fails(tmp_path: Path) -> None:
    given = safety(policy(input={"violence": "block"}), guard=guard(model="org/tiny"))
    time = Time()
    async with at_work(
        tmp_path, time, FakeFleet(text=byte_text_model(TEMPLATE)), safety=given
    ) as s:
        verdicts = iter([failing("")])
        says(s, "ok", lambda text: next(verdicts, None) or by_word(text))
        batch = await wait(s, await create(s, [line("a")]))
        assert batch["request_counts"]["completed"] == 1
        assert time.slept, "it was tried again"


def _described(data: dict[str, Any], kind: type[msgspec.Struct]) -> bool:
    """Whether the schema's type has all of its members."""
    found = msgspec.to_builtins(msgspec.convert(data, kind))
    return not data.keys() - found.keys()


async def test_streams_say_nothing_that_the_schema_does_not() -> None:
    given = safety(policy(input={"slurs": "annotate"}, output={"slurs": "annotate"}))
    async with filtering(given, SAYS) as served:
        body = ask("a slur: bad", stream=True)
        *_, last = await served.chunks(CHAT, body)
        choice = last["choices"][0]
        assert "content_filter_results" in choice and "prompt_filter_results" in last
        assert _described(last, ChatChunk) and _described(choice, ChatChunkChoice)
        text = {"prompt": "bad", "stream": True, "max_tokens": 100}
        *_, last = await served.chunks(TEXT, text)
        choice = last["choices"][0]
        assert "content_filter_results" in choice and "prompt_filter_results" in last
        assert _described(last, CompletionChunk) and _described(choice, CompletionChunkChoice)
        events = await served.events(MESSAGES, {**body, "model": "tiny", "max_tokens": 100})
        event = json.loads(events[-2].split("data: ")[1])
        assert "prompt_filter_results" in event and _described(event, MessageDelta)
        async with served.session.post("/api/chat", json={**body, "model": "tiny"}) as response:
            *_, last = [json.loads(line) async for line in response.content]
        assert "prompt_filter_results" in last and _described(last, ChatAnswer)

"""The safety filter through the official SDKs, with a model of the daemon as the guard.

The guard is the embedded model: it answers arithmetic with the result, and much else with "I …",
which is all that a guard's configuration needs to know of its answers.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
from harness import Daemon

pytestmark = pytest.mark.xdist_group("clients")

SUM, OTHER, HELLO = "What is 3 + 4?", "What can you do?", "Hello"
_CONFIG = """
[server]
api_keys_file = "keys"
[store]
path = "store"
[models.demo]
path = "embedded:demo"
dtype = "float32"
threads = 1
[models.judge]
path = "embedded:demo"
dtype = "float32"
threads = 1
[models.broken]
path = "nowhere"
preload = false

[safety.rules.name]
words = ["demo model"]
[safety.rules.brand]
words = ["quantd"]
[safety.rules.pii]
pii = ["email"]

[safety.guards.closed]
model = "judge"
timeout_seconds = 240
safe = "I"
unsafe = "3 + 4"
labels = { 7 = "arithmetic" }
[safety.guards.open]
model = "judge"
timeout_seconds = 240
safe = "I"
unsafe = "3 + 4"
on_failure = "allow"
[safety.guards.seven]
model = "judge"
timeout_seconds = 240
prompt = "What is {text}?"
safe = "2 + 2"
unsafe = "3 + 4"
[safety.guards.gone]
model = "broken"

[safety.policies.names]
keys = ["names"]
output = { name = "block" }
[safety.policies.brands]
keys = ["brands"]
input = { pii = "redact" }
output = { brand = "redact" }
[safety.policies.closed]
keys = ["closed"]
input = { arithmetic = "block" }
[safety.policies.open]
keys = ["open"]
input = { open = "block" }
[safety.policies.answers]
keys = ["answers"]
output = { seven = "block" }
[safety.policies.gone]
keys = ["gone"]
input = { gone = "block" }
"""
_KEYS = ("names", "brands", "closed", "open", "answers", "gone", "free")


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    folder = tmp_path_factory.mktemp("safety")
    (folder / "keys").write_text("".join(f"{name}:key-{name}\n" for name in _KEYS))
    (folder / "config.toml").write_text(_CONFIG)
    with Daemon("--config", str(folder / "config.toml"), folder=folder) as daemon:
        yield daemon


@pytest.fixture(scope="module")
def client(daemon: Daemon) -> Callable[[str], openai.OpenAI]:
    """By the name of the key."""

    def client(name: str) -> openai.OpenAI:
        url = f"{daemon.url}/v1"
        return openai.OpenAI(api_key=f"key-{name}", base_url=url, max_retries=0, timeout=240)

    return client


def ask(client: openai.OpenAI, text: str, **fields: Any) -> Any:
    messages = [{"role": "user", "content": text}]
    return client.chat.completions.create(
        model="demo", messages=messages, temperature=0, max_completion_tokens=60, **fields
    )


def test_without_a_policy_all_is_said(client: Callable[[str], openai.OpenAI]) -> None:
    choice = ask(client("free"), HELLO).choices[0]
    assert "demo model of quantd" in choice.message.content
    assert choice.finish_reason == "stop"


def test_a_phrase_over_many_tokens_is_never_sent(client: Callable[[str], openai.OpenAI]) -> None:
    whole = ask(client("names"), HELLO).choices[0]
    assert whole.finish_reason == "content_filter"
    assert whole.message.content == "Hello! I am the "
    assert whole.content_filter_results == {"name": {"filtered": True, "detected": True}}
    chunks = list(ask(client("names"), HELLO, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.message.content
    assert chunks[-1].choices[0].finish_reason == "content_filter"


def test_a_redacted_stream_reads_on(client: Callable[[str], openai.OpenAI]) -> None:
    said = ask(client("free"), HELLO).choices[0].message.content
    chunks = list(ask(client("brands"), HELLO, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == said.replace("quantd", "[brand]") != said
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_the_prompt_is_redacted(client: Callable[[str], openai.OpenAI]) -> None:
    reply = ask(client("brands"), "Repeat: jane@doe.org")
    [result] = reply.prompt_filter_results
    assert result["content_filter_results"] == {"pii": {"filtered": True, "detected": True}}


def test_other_faces(daemon: Daemon, client: Callable[[str], openai.OpenAI]) -> None:
    names = client("names")
    response = names.responses.create(model="demo", input=HELLO, temperature=0)
    assert response.status == "incomplete"
    assert response.incomplete_details and response.incomplete_details.reason == "content_filter"
    assert response.output_text == "Hello! I am the "
    with anthropic.Anthropic(api_key="key-names", base_url=daemon.url, max_retries=0) as other:
        ask: dict[str, Any] = {
            "model": "demo",
            "max_tokens": 60,
            "messages": [{"role": "user", "content": HELLO}],
            "extra_body": {"temperature": 0},
        }
        message = other.messages.create(**ask)
        assert message.stop_reason == "refusal"
        assert [block.text for block in message.content if block.type == "text"] == [
            "Hello! I am the "
        ]
        with other.messages.stream(**ask) as stream:
            final = stream.get_final_message()
        assert final.stop_reason == "refusal"
        assert [block.text for block in final.content if block.type == "text"] == [
            "Hello! I am the "
        ]


def test_a_batch(client: Callable[[str], openai.OpenAI], daemon: Daemon) -> None:
    names = client("names")
    body = {"model": "demo", "messages": [{"role": "user", "content": HELLO}], "temperature": 0}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
    data = json.dumps(line).encode()
    file = names.files.create(file=("in.jsonl", data), purpose="batch")
    batch = names.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
    )
    ended = daemon.wait(
        lambda: (b := names.batches.retrieve(batch.id)).status in ("completed", "failed") and b
    )
    result = json.loads(names.files.content(ended.output_file_id).text)
    [choice] = result["response"]["body"]["choices"]
    assert choice["finish_reason"] == "content_filter"
    assert choice["message"]["content"] == "Hello! I am the "


def test_a_guard_before_the_model(daemon: Daemon, client: Callable[[str], openai.OpenAI]) -> None:
    labels = '{action="block",category="arithmetic",policy="closed",stage="input"}'
    daemon.wait_requests(0)
    before = daemon.metric('quantd_requests_total{model="demo"}')
    blocked = daemon.metric(f"quantd_safety_total{labels}")
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client("closed"), SUM)
    assert caught.value.code == "content_filter" and caught.value.param == "messages"
    assert daemon.metric('quantd_requests_total{model="demo"}') == before
    assert daemon.metric(f"quantd_safety_total{labels}") == blocked + 1
    assert ask(client("closed"), OTHER).choices[0].message.content.startswith("I can")


def test_a_guard_behind_the_model(client: Callable[[str], openai.OpenAI]) -> None:
    """An answer is shown to it in a prompt of its own: "What is 3 + 4 = 7?"."""
    for text, shown, reason in (
        (SUM, "", "content_filter"),
        ("What is 2 + 2?", "2 + 2 = 4", "stop"),
    ):
        choice = ask(client("answers"), text).choices[0]
        assert (choice.message.content, choice.finish_reason) == (shown, reason)
        chunks = list(ask(client("answers"), text, stream=True))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == shown
        assert chunks[-1].choices[0].finish_reason == reason
    with pytest.raises(openai.InternalServerError) as caught:
        ask(client("answers"), OTHER)  # the guard says neither of its words
    assert "'seven'" in caught.value.message


def test_moderations(client: Callable[[str], openai.OpenAI]) -> None:
    free = client("free")
    reply = free.moderations.create(model="closed", input=[SUM, OTHER])
    first, second = reply.results
    assert first.flagged and not second.flagged
    named = first.categories.to_dict()
    assert named["arithmetic"] is True and named["self-harm/intent"] is False
    assert not first.categories.violence and first.category_scores.violence == 0.0
    scores: dict[str, Any] = first.category_scores.to_dict()
    assert 0.5 < scores["arithmetic"] <= 1.0
    assert first.category_applied_input_types.violence == ["text"]
    reply = client("brands").moderations.create(input="I am jane@doe.org")
    assert reply.model == "brands" and reply.results[0].flagged
    with pytest.raises(openai.NotFoundError):
        free.moderations.create(input="x")


def test_moderations_in_a_batch(client: Callable[[str], openai.OpenAI], daemon: Daemon) -> None:
    free = client("free")
    lines = [
        {
            "custom_id": text,
            "method": "POST",
            "url": "/v1/moderations",
            "body": {"model": "closed", "input": text},
        }
        for text in (SUM, OTHER)
    ]
    data = "\n".join(map(json.dumps, lines)).encode()
    file = free.files.create(file=("in.jsonl", data), purpose="batch")
    batch = free.batches.create(
        input_file_id=file.id,
        endpoint="/v1/moderations",
        completion_window="24h",
    )
    ended = daemon.wait(
        lambda: (b := free.batches.retrieve(batch.id)).status in ("completed", "failed") and b
    )
    results = [json.loads(line) for line in free.files.content(ended.output_file_id).iter_lines()]
    replies = {
        result["custom_id"]: openai.types.ModerationCreateResponse.model_validate(
            result["response"]["body"]
        )
        for result in results
    }
    assert {name: reply.results[0].flagged for name, reply in replies.items()} == {
        SUM: True,
        OTHER: False,
    }


def test_a_guard_that_cannot_be_loaded(client: Callable[[str], openai.OpenAI]) -> None:
    with pytest.raises(openai.InternalServerError) as caught:
        ask(client("gone"), OTHER)
    assert caught.value.status_code == 503


@pytest.mark.parametrize("name", ["closed", "open"])
def test_a_guard_whose_worker_dies(
    name: str, daemon: Daemon, client: Callable[[str], openai.OpenAI]
) -> None:
    ask(client(name), OTHER)  # it is there
    models = json.loads(daemon.get("/admin/models", unix=True)[1])["models"]
    [pid] = [model["pid"] for model in models if model["name"] == "judge"]
    os.kill(pid, signal.SIGSTOP)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        asking = pool.submit(ask, client(name), SUM)
        daemon.wait_metric('quantd_requests_running{model="judge"}', 1)
        os.kill(pid, signal.SIGKILL)
        if name == "open":
            assert asking.result().choices[0].message.content == "3 + 4 = 7"
        else:
            with pytest.raises(openai.InternalServerError) as caught:
                asking.result()
            assert caught.value.status_code == 503 and "'closed'" in caught.value.message
    daemon.wait(lambda: daemon.get("/ready", unix=True)[0] == 200)


def test_other_policies_without_a_restart(
    daemon: Daemon, client: Callable[[str], openai.OpenAI]
) -> None:
    config = Path(daemon.folder) / "config.toml"
    config.write_text(_CONFIG.replace('name = "block"', 'name = "(?"'))
    status, _, body = daemon.request("POST", "/admin/reload", unix=True)
    assert status == 400 and b"safety.policies.names.output" in body
    config.write_text(_CONFIG.replace('name = "block"', 'name = "annotate"'))
    changes = daemon.post("/admin/reload", None, unix=True)["changes"]
    assert changes == ["safety has changed"]
    choice = ask(client("names"), HELLO).choices[0]
    assert choice.finish_reason == "stop" and "demo model" in choice.message.content
    config.write_text(_CONFIG)
    daemon.process.send_signal(signal.SIGHUP)
    daemon.wait(lambda: ask(client("names"), HELLO).choices[0].finish_reason == "content_filter")

"""A thin line through all rooms: a real model answers over TCP and over the Unix socket."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from harness import Daemon

CHAT = {
    "model": "demo",
    "messages": [{"role": "user", "content": "What is 17 + 25?"}],
    "temperature": 0,
    "max_tokens": 24,
}


@pytest.mark.parametrize("unix", [False, True])
def test_chat(demo: Daemon, unix: bool) -> None:
    answer = demo.post("/v1/chat/completions", CHAT, unix=unix)
    choice = answer["choices"][0]
    assert choice["message"]["content"] == "17 + 25 = 42"
    assert choice["finish_reason"] == "stop"
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


@pytest.mark.parametrize("unix", [False, True])
def test_stream_is_the_answer_in_pieces(demo: Daemon, unix: bool) -> None:
    whole = demo.post("/v1/chat/completions", CHAT)["choices"][0]["message"]["content"]
    status, headers, body = demo.request(
        "POST", "/v1/chat/completions", CHAT | {"stream": True}, unix=unix
    )
    assert status == 200 and headers["content-type"].startswith("text/event-stream")
    events = [line[6:] for line in body.decode().split("\n\n") if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    deltas = [json.loads(event)["choices"][0]["delta"] for event in events[:-1]]
    assert deltas[0]["role"] == "assistant"
    assert "".join(delta.get("content") or "" for delta in deltas) == whole


def test_lists_its_model(demo: Daemon) -> None:
    models = json.loads(demo.get("/v1/models")[1])["data"]
    assert [model["id"] for model in models] == ["demo"]
    assert models[0]["max_model_len"] == 8192


def test_text_and_token_ids_are_the_same_prompt(demo: Daemon) -> None:
    tokens = demo.post("/tokenize", {"model": "demo", "prompt": "1 + 2 ="})["tokens"]
    body = {"model": "demo", "temperature": 0, "max_tokens": 8}
    by_text = demo.post("/v1/completions", body | {"prompt": "1 + 2 ="})
    by_ids = demo.post("/v1/completions", body | {"prompt": tokens})
    assert by_text["choices"][0]["text"] == by_ids["choices"][0]["text"]


def test_echo_scores_the_prompt(demo: Daemon) -> None:
    body = {"model": "demo", "prompt": "1 + 2 = 3", "echo": True, "logprobs": 1, "max_tokens": 1}
    scored = demo.post("/v1/completions", body)["choices"][0]["logprobs"]
    assert scored["token_logprobs"][0] is None
    assert all(value <= 0 for value in scored["token_logprobs"][1:])
    assert "".join(scored["tokens"]).startswith("1 + 2 = 3")


def test_openai_error_shape_everywhere(demo: Daemon) -> None:
    cases: list[tuple[str, str, bytes | dict[str, object], int]] = [
        ("GET", "/nowhere", b"", 404),
        ("GET", "/v1/chat/completions", b"", 405),
        ("POST", "/v1/chat/completions", b"{", 400),
        ("POST", "/v1/chat/completions", CHAT | {"model": "other"}, 404),
        ("POST", "/v1/chat/completions", CHAT | {"temperature": -1}, 400),
        ("POST", "/v1/chat/completions", CHAT | {"tools": [{"type": "function"}]}, 400),
        ("POST", "/v1/completions", {"model": "demo", "prompt": "a " * 20000}, 400),
    ]
    for method, path, body, expected in cases:
        status, _, data = demo.request(method, path, body)
        assert status == expected, (method, path, data)
        error = json.loads(data)["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["message"]


def test_too_long_a_prompt_names_the_numbers(demo: Daemon) -> None:
    body = {"model": "demo", "prompt": [5] * 9000, "max_tokens": 1}
    status, _, data = demo.request("POST", "/v1/completions", body)
    error = json.loads(data)["error"]
    assert status == 400 and error["code"] == "context_length_exceeded"
    assert "maximum context length is 8192 tokens" in error["message"]
    assert "9000" in error["message"]


def test_the_model_is_on_the_device_that_is_tested(demo: Daemon) -> None:
    (model,) = json.loads(demo.get("/admin/models", unix=True)[1])["models"]
    wanted = os.environ.get("QUANTD_TEST_DEVICE", "cpu")
    assert model["info"]["device"].partition(":")[0] == wanted


def test_administration_is_on_the_unix_socket_only(demo: Daemon) -> None:
    assert demo.get("/admin/models")[0] == 404
    status, body = demo.get("/admin/models", unix=True)
    assert status == 200 and b"demo" in body


def test_the_control_plane_loads_no_torch(demo: Daemon) -> None:
    maps = Path(f"/proc/{demo.process.pid}/maps").read_text()
    assert "libtorch" not in maps and "numpy" not in maps
    [worker] = demo.workers()
    assert "libtorch" in Path(f"/proc/{worker}/maps").read_text()

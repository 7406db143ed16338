"""The official SDK, unchanged, against the daemon."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest
from harness import Daemon
from openai.types.chat import ChatCompletionMessageParam

MESSAGES: list[ChatCompletionMessageParam] = [
    {"role": "user", "content": "Sort these numbers: 42, 7, 19"}
]


@pytest.fixture
def client(demo: Daemon) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{demo.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").owned_by == "quantd"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("org/other")
    assert caught.value.code == "model_not_found"


def test_chat_and_its_stream_agree(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(
        model="demo", messages=MESSAGES, temperature=0, max_completion_tokens=24
    )
    stream = client.chat.completions.create(
        model="demo",
        messages=MESSAGES,
        temperature=0,
        max_completion_tokens=24,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert len({chunk.id for chunk in chunks}) == 1
    deltas = [chunk.choices[0].delta for chunk in chunks[:-1]]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks[:-1]][-1] == whole.choices[0].finish_reason
    assert chunks[-1].choices == []
    usage = chunks[-1].usage
    assert usage is not None and whole.usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens
    assert usage.prompt_tokens == whole.usage.prompt_tokens


def test_stream_helper(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model="demo", messages=MESSAGES, temperature=0, max_completion_tokens=24
    ) as stream:
        pieces = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    assert "".join(pieces) == final.choices[0].message.content


def test_logprobs_belong_to_the_text(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model="demo",
        messages=MESSAGES,
        temperature=0,
        max_completion_tokens=8,
        logprobs=True,
        top_logprobs=3,
    )
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None and logprobs.content
    raw = b"".join(bytes(entry.bytes or []) for entry in logprobs.content)
    assert raw.decode().strip() == (reply.choices[0].message.content or "").strip()
    for entry in logprobs.content:
        assert len(entry.top_logprobs) == 3
        assert entry.logprob <= 0
        assert entry.top_logprobs[0].logprob == max(top.logprob for top in entry.top_logprobs)


def test_choices_and_seed(client: openai.OpenAI) -> None:
    def texts(n: int) -> list[str | None]:
        reply = client.chat.completions.create(
            model="demo", messages=MESSAGES, n=n, seed=5, temperature=1.5, max_completion_tokens=12
        )
        return [choice.message.content for choice in reply.choices]

    three = texts(3)
    assert len(three) == 3
    assert texts(3) == three
    assert texts(1) == three[:1]


def test_completions_with_every_prompt_form(client: openai.OpenAI) -> None:
    def texts(prompt: str | list[str] | list[int] | list[list[int]]) -> list[str]:
        reply = client.completions.create(model="demo", prompt=prompt, temperature=0, max_tokens=6)
        return [choice.text for choice in reply.choices]

    tokens = client.post("/../tokenize", body={"prompt": "1 + 2 ="}, cast_to=dict[str, object])[
        "tokens"
    ]
    assert isinstance(tokens, list)
    one = texts("1 + 2 =")
    assert texts(["1 + 2 =", "1 + 2 ="]) == one * 2
    assert texts(tokens) == one
    assert texts([tokens, tokens]) == one * 2


def test_vllm_extras_travel_in_extra_body(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model="demo",
        messages=MESSAGES,
        max_completion_tokens=10,
        extra_body={"ignore_eos": True, "min_tokens": 10, "top_k": 5, "min_p": 0.01},
    )
    assert reply.usage is not None
    assert reply.usage.completion_tokens == 10
    assert reply.choices[0].finish_reason == "length"


def test_errors_become_the_sdks_classes(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="demo", messages=MESSAGES, temperature=9)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-9", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="demo", prompt=[1] * 20_000, max_tokens=5)
    assert long.value.code == "context_length_exceeded"
    assert "maximum context length is" in str(long.value)


def test_over_the_unix_socket(demo: Daemon) -> None:
    httpx2 = pytest.importorskip("httpx2")
    transport = httpx2.HTTPTransport(uds=str(demo.socket))
    http = openai.DefaultHttpxClient(transport=transport)
    with openai.OpenAI(base_url="http://localhost/v1", api_key="-", http_client=http) as client:
        assert [model.id for model in client.models.list()] == ["demo"]

"""The official SDK, unchanged, against the daemon, over TCP and over the Unix socket.

`test_other_sdks.py` runs this file once more, with the SDK's former generation.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import openai
import pytest
from harness import Server

if int(openai.__version__.split(".")[0]) >= 3:
    import httpx2 as httpx
else:
    import httpx

pytestmark = pytest.mark.xdist_group("clients")

CHAT: dict[str, Any] = {
    "model": "demo",
    "messages": [{"role": "user", "content": "Sort these numbers: 42, 7, 19"}],
    "temperature": 0,
    "max_completion_tokens": 24,
}
LONG: dict[str, Any] = CHAT | {
    "max_completion_tokens": 8000,
    "extra_body": {"ignore_eos": True},
}


@pytest.fixture(scope="module", params=["tcp", "unix"])
def way(request: pytest.FixtureRequest) -> str:
    """How the clients of this test reach the daemon."""
    return str(request.param)


def options(server: Server, way: str, key: str = "none") -> dict[str, Any]:
    base = {"api_key": key, "max_retries": 0, "timeout": 240}
    if way == "tcp":
        return base | {"base_url": f"{server.url}/v1"}
    return base | {"base_url": "http://localhost/v1"}


@contextmanager
def connect(server: Server, way: str, key: str = "none") -> Iterator[openai.OpenAI]:
    made = options(server, way, key)
    if way == "unix":
        transport = httpx.HTTPTransport(uds=str(server.socket))
        made["http_client"] = openai.DefaultHttpxClient(transport=transport)
    with openai.OpenAI(**made) as client:
        yield client


@asynccontextmanager
async def connect_async(server: Server, way: str, key: str = "none") -> Any:
    made = options(server, way, key)
    if way == "unix":
        transport = httpx.AsyncHTTPTransport(uds=str(server.socket))
        made["http_client"] = openai.DefaultAsyncHttpxClient(transport=transport)
    async with openai.AsyncOpenAI(**made) as client:
        yield client


@pytest.fixture(scope="module")
def client(demo_server: Server, way: str) -> Iterator[openai.OpenAI]:
    with connect(demo_server, way) as client:
        yield client


def text_of(chunks: list[Any]) -> str:
    return "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").owned_by == "quantd"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("org/other")
    assert caught.value.code == "model_not_found"


def test_chat_and_its_stream_agree(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(**CHAT)
    asked = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.chat.completions.create(**CHAT, **asked))
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert text_of(chunks) == whole.choices[0].message.content
    *spoken, last = chunks
    reasons = [chunk.choices[0].finish_reason for chunk in spoken]
    assert reasons == [None] * (len(reasons) - 1) + [whole.choices[0].finish_reason]
    usage, streamed = whole.usage, last.usage
    assert usage is not None and streamed is not None and last.choices == []
    # The second time the prompt's blocks were there.
    assert streamed.prompt_tokens_details.cached_tokens > 0
    streamed.prompt_tokens_details = usage.prompt_tokens_details
    assert streamed == usage
    assert 0 < usage.completion_tokens <= 24
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_each_answer_has_its_requests_id(client: openai.OpenAI) -> None:
    first, second = (client.chat.completions.create(**CHAT) for _ in range(2))
    assert first._request_id and first._request_id != second._request_id
    assert first.id != second.id
    raw = client.with_options(default_headers={"x-request-id": "mine"})
    assert raw.chat.completions.create(**CHAT)._request_id == "mine"


def test_stream_helper(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(**CHAT) as stream:
        pieces = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    assert "".join(pieces) == final.choices[0].message.content
    assert final.choices[0].finish_reason in ("stop", "length")


def test_logprobs_belong_to_the_text(client: openai.OpenAI) -> None:
    asked = CHAT | {"max_completion_tokens": 8, "logprobs": True, "top_logprobs": 3}
    choice = client.chat.completions.create(**asked).choices[0]
    assert choice.logprobs is not None and choice.logprobs.content
    raw = b"".join(bytes(entry.bytes or []) for entry in choice.logprobs.content)
    assert raw.decode("utf-8", "replace").strip() == (choice.message.content or "").strip()
    for entry in choice.logprobs.content:
        top = [top.logprob for top in entry.top_logprobs]
        assert len(top) == 3 and top == sorted(top, reverse=True)
        assert entry.logprob <= top[0] <= 0
    chunks = list(client.chat.completions.create(**asked, stream=True))
    streamed = [c.choices[0].logprobs.content for c in chunks if c.choices[0].logprobs]
    assert [e for entries in streamed for e in entries or ()] == choice.logprobs.content


def test_choices_and_seed(client: openai.OpenAI) -> None:
    def texts(n: int) -> list[str | None]:
        asked = CHAT | {"n": n, "seed": 5, "temperature": 1.5, "max_completion_tokens": 12}
        return [
            choice.message.content for choice in client.chat.completions.create(**asked).choices
        ]

    three = texts(3)
    assert len(three) == 3
    assert texts(3) == three
    assert texts(1) == three[:1]


def test_completions_with_every_prompt_form(client: openai.OpenAI, demo_server: Server) -> None:
    def texts(prompt: Any, **more: Any) -> list[str]:
        reply = client.completions.create(
            model="demo", prompt=prompt, temperature=0, max_tokens=6, **more
        )
        return [choice.text for choice in reply.choices]

    tokens = demo_server.post("/tokenize", {"prompt": "1 + 2 ="})["tokens"]
    one = texts("1 + 2 =")
    assert texts(["1 + 2 =", "1 + 2 ="]) == one * 2
    assert texts(tokens) == one
    assert texts([tokens, tokens]) == one * 2
    assert texts("1 + 2 =", echo=True) == [f"1 + 2 ={one[0]}"]


def test_completions_stream_and_logprobs(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "demo", "prompt": "1 + 2 =", "temperature": 0}
    asked |= {"max_tokens": 6, "logprobs": 2}
    choice = client.completions.create(**asked).choices[0]
    chunks = list(client.completions.create(**asked, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == choice.text
    assert choice.logprobs is not None and choice.logprobs.token_logprobs
    names = choice.logprobs.tokens or []
    assert len(names) == len(choice.logprobs.token_logprobs)
    streamed = [c.choices[0].logprobs.tokens for c in chunks if c.choices[0].logprobs]
    assert [name for names in streamed for name in names or ()] == names


def test_vllm_extras_travel_in_extra_body(client: openai.OpenAI) -> None:
    extra = {"ignore_eos": True, "min_tokens": 10, "top_k": 5, "min_p": 0.01}
    reply = client.chat.completions.create(
        **CHAT | {"max_completion_tokens": 10, "extra_body": extra}
    )
    assert reply.usage is not None and reply.usage.completion_tokens == 10
    assert reply.choices[0].finish_reason == "length"


def test_errors_become_the_sdks_classes(client: openai.OpenAI) -> None:
    create = client.chat.completions.create
    with pytest.raises(openai.BadRequestError) as bad:
        create(**CHAT | {"temperature": 9})
    assert bad.value.param == "temperature" and bad.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError) as streamed:
        create(**CHAT | {"temperature": 9}, stream=True)
    assert streamed.value.param == "temperature"
    with pytest.raises(openai.NotFoundError) as missing:
        create(**CHAT | {"model": "gpt-9"})
    assert missing.value.param == "model" and missing.value.request_id
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="demo", prompt=[1] * 20_000, max_tokens=5)
    assert long.value.code == "context_length_exceeded"
    assert "maximum context length is" in str(long.value)
    with pytest.raises(openai.NotFoundError):
        client.images.generate(model="demo", prompt="x")


_SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "x"}}}
_CALL = {"type": "function", "function": {"name": "f"}}
BAD: list[tuple[str, dict[str, Any], str]] = [
    ("chat", {"temperature": "hot"}, "temperature"),
    ("chat", {"temperature": -0.1}, "temperature"),
    ("chat", {"top_p": 0}, "top_p"),
    ("chat", {"top_p": 1.5}, "top_p"),
    ("chat", {"n": 0}, "n"),
    ("chat", {"n": 1.5}, "n"),
    ("chat", {"max_tokens": -1}, "max_tokens"),
    ("chat", {"max_completion_tokens": 0}, "max_completion_tokens"),
    ("chat", {"presence_penalty": 3}, "presence_penalty"),
    ("chat", {"frequency_penalty": "x"}, "frequency_penalty"),
    ("chat", {"stop": [1]}, "stop"),
    ("chat", {"stop": ""}, "stop"),
    ("chat", {"logit_bias": {"x": 1}}, "logit_bias"),
    ("chat", {"logit_bias": {"3": 101}}, "logit_bias"),
    ("chat", {"top_logprobs": 3}, "top_logprobs"),
    ("chat", {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ("chat", {"seed": "x"}, "seed"),
    ("chat", {"reasoning_effort": 3}, "reasoning_effort"),
    ("chat", {"messages": []}, "messages"),
    ("chat", {"messages": [{"role": "king", "content": "x"}]}, "messages[0].role"),
    ("chat", {"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
    ("chat", {"response_format": {"type": "xml"}}, "response_format"),
    ("chat", {"response_format": _SCHEMA}, "response_format"),
    ("chat", {"tools": [{"type": "web"}]}, "tools[0].type"),
    ("chat", {"tools": [_CALL], "tool_choice": "maybe"}, "tool_choice"),
    ("chat", {"tool_choice": "required"}, "tool_choice"),
    ("chat", {"modalities": ["audio"]}, "modalities"),
    ("chat", {"functions": [{"name": "f"}]}, "functions"),
    ("chat", {"extra_body": {"top_k": -5}}, "top_k"),
    ("chat", {"extra_body": {"min_p": 2}}, "min_p"),
    ("chat", {"extra_body": {"guided_regex": "("}}, "guided_regex"),
    ("completions", {"prompt": []}, "prompt"),
    ("completions", {"prompt": [1024]}, "prompt"),
    ("completions", {"best_of": 3}, "best_of"),
    ("completions", {"suffix": "x"}, "suffix"),
    ("completions", {"logprobs": 21}, "logprobs"),
    ("completions", {"max_tokens": 0}, "max_tokens"),
    ("completions", {"echo": "yes"}, "echo"),
    ("responses", {"max_output_tokens": 0}, "max_output_tokens"),
    ("responses", {"temperature": 9}, "temperature"),
    ("responses", {"input": [{"type": "song"}]}, "input[0].type"),
    ("responses", {"truncation": "some"}, "truncation"),
    ("responses", {"include": ["everything"]}, "include"),
    ("responses", {"metadata": {"x": 3}}, "metadata"),
    ("responses", {"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ("responses", {"text": {"format": {"type": "xml"}}}, "text.format"),
    ("embeddings", {"input": []}, "input"),
    ("embeddings", {"encoding_format": "hex"}, "encoding_format"),
    ("embeddings", {"dimensions": 0}, "dimensions"),
]


@pytest.mark.parametrize(("api", "fields", "param"), BAD)
def test_a_bad_field_is_named(
    client: openai.OpenAI, api: str, fields: dict[str, Any], param: str
) -> None:
    apis: dict[str, tuple[Any, dict[str, Any]]] = {
        "chat": (client.chat.completions, CHAT),
        "completions": (client.completions, {"model": "demo", "prompt": "x"}),
        "responses": (client.responses, {"model": "demo", "input": "x"}),
        "embeddings": (client.embeddings, {"model": "demo", "input": "x"}),
    }
    resource, good = apis[api]
    with pytest.raises(openai.BadRequestError) as caught:
        resource.create(**good | fields)
    error = caught.value
    assert error.param is not None and error.param.startswith(param), error
    assert error.type == "invalid_request_error" and error.code and error.request_id
    # The message says it too: a caller may log nothing else.
    assert param.split("[")[0].split(".")[-1] in error.message


async def test_async_client(demo_server: Server, way: str) -> None:
    async with connect_async(demo_server, way) as client:
        assert [model.id async for model in client.models.list()] == ["demo"]
        whole = await client.chat.completions.create(**CHAT)
        streams = [client.chat.completions.create(**CHAT, stream=True) for _ in range(8)]

        async def read(opening: Any) -> str:
            return text_of([chunk async for chunk in await opening])

        texts = await asyncio.gather(*map(read, streams))
        assert texts == [whole.choices[0].message.content] * 8
        async with client.chat.completions.stream(**CHAT) as stream:
            final = await stream.get_final_completion()
        assert final.choices[0].message.content == texts[0]


class Leaving:
    """Whether a client that leaves takes its request with it."""

    def __init__(self, server: Server) -> None:
        server.wait_requests(0)
        self._server = server
        self._before = self._ended()

    def _ended(self) -> tuple[float, float]:
        total = "quantd_requests_total"
        return self._server.metric(total + '{outcome="abort"}'), self._server.metric(total)

    def was_seen(self) -> bool:
        return self._ended() != self._before or self._server.num_requests() > 0

    def wait(self) -> None:
        """Until none runs: what has come was aborted."""
        self._server.wait(self.was_seen)
        self._server.wait_requests(0)
        pairs = zip(self._ended(), self._before, strict=True)
        aborted, total = (after - before for after, before in pairs)
        assert aborted == total


def test_a_timeout_leaves_no_request_behind(client: openai.OpenAI, demo_server: Server) -> None:
    leaving = Leaving(demo_server)
    for seconds in (0.3, 1, 3):
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=seconds).chat.completions.create(**LONG)
        client.models.list()  # whoever came before is known by now
        if leaving.was_seen():  # else the client had left before the daemon took notice
            break
    leaving.wait()


def test_a_closed_stream_leaves_no_request_behind(
    client: openai.OpenAI, demo_server: Server
) -> None:
    leaving = Leaving(demo_server)
    stream = client.chat.completions.create(**LONG, stream=True)
    next(stream)
    stream.close()
    leaving.wait()


async def test_a_cancelled_task_leaves_no_request_behind(demo_server: Server, way: str) -> None:
    leaving = Leaving(demo_server)
    async with connect_async(demo_server, way) as client:
        task = asyncio.create_task(client.chat.completions.create(**LONG))
        await asyncio.to_thread(demo_server.wait_requests, 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.to_thread(leaving.wait)


def test_keys_are_for_tcp(strict_server: Server, api_key: str) -> None:
    for key in ("none", "sk-other"):
        with connect(strict_server, "tcp", key) as client:
            with pytest.raises(openai.AuthenticationError) as caught:
                client.chat.completions.create(**CHAT)
            assert caught.value.code == "invalid_api_key"
        with connect(strict_server, "unix", key) as client:
            assert client.models.retrieve("demo").id == "demo"
    with connect(strict_server, "tcp", api_key) as client:
        assert client.models.retrieve("demo").id == "demo"


def test_a_body_over_the_limit(strict_server: Server, api_key: str, way: str) -> None:
    with connect(strict_server, way, api_key) as client:
        with pytest.raises(openai.APIStatusError) as caught:
            client.completions.create(model="demo", prompt="x" * 30_000)
        assert caught.value.status_code == 413
        assert "20000 bytes" in caught.value.message
        assert client.models.retrieve("demo").id == "demo"


class Answers:
    """The HTTP answers that a client got, and when."""

    def __init__(self, client: Any) -> None:
        self.seen: list[tuple[int, float, float]] = []
        client._client.event_hooks["response"] = [self._note]

    def _note(self, response: Any) -> None:
        after = float(response.headers.get("retry-after", 0))
        self.seen.append((response.status_code, after, time.monotonic()))


def test_a_model_that_cannot_be_loaded_is_not_asked_for_twice(
    strict_server: Server, api_key: str, way: str
) -> None:
    with connect(strict_server, way, api_key) as client:
        answers = Answers(client)
        patient = client.with_options(max_retries=3)
        with pytest.raises(openai.InternalServerError) as caught:
            patient.chat.completions.create(**CHAT | {"model": "broken"})
        assert caught.value.status_code == 503
        assert "nowhere" in caught.value.message
        assert [status for status, _, _ in answers.seen] == [503]


async def test_a_full_queue_and_a_retry_that_waits(
    strict_server: Server, api_key: str, way: str
) -> None:
    strict_server.wait_requests(0)
    async with connect_async(strict_server, way, api_key) as client:
        running = await client.chat.completions.create(**LONG, stream=True)
        await anext(running)
        with connect(strict_server, way, api_key) as patient:
            answers = Answers(patient)
            with strict_server.held():
                waiting = asyncio.create_task(client.chat.completions.create(**LONG))
                await asyncio.to_thread(strict_server.wait_requests, 2)
                with pytest.raises(openai.RateLimitError) as caught:
                    await client.chat.completions.create(**CHAT)
                assert caught.value.code == "queue_full"
                retrying = patient.with_options(max_retries=10).chat.completions.create
                patient_answer = asyncio.create_task(asyncio.to_thread(retrying, **CHAT))
                while not answers.seen:
                    await asyncio.sleep(0.01)
                waiting.cancel()
                await running.close()
            assert (await patient_answer).choices[0].message.role == "assistant"
    # Once, but where the daemon was slow to see that the others have left.
    *refused, (last, _, answered_at) = answers.seen
    assert last == 200 and refused
    ends = [at for _, _, at in refused[1:]] + [answered_at]
    for (status, retry_after, refused_at), asked_again_at in zip(refused, ends, strict=True):
        assert status == 429 and retry_after >= 1
        assert asked_again_at - refused_at >= retry_after

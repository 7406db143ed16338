"""Server-sent events: the rules byte by byte, errors after 200, keep-alives, clients that leave."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any

import aiohttp
import pytest
from fakes import ManualClock
from server_fakes import Answer, Served, push, serving, spoken

from quantd.daemon.errors import QueueFull
from quantd.daemon.server.context import Clock

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
HELLO: dict[str, Any] = {
    "messages": [{"role": "user", "content": "hi"}],
    "stream": True,
    "request_id": "x",
}
FIXED = Clock(wall=lambda: 1234.5)


async def test_chat_stream_byte_by_byte() -> None:
    async with serving(clock=FIXED) as served:
        served.engine.answer = lambda request: Answer([b'a"', b"b"], "length")
        head = (
            'data: {"id":"chatcmpl-x","object":"chat.completion.chunk","created":1234,'
            '"model":"org/tiny","choices":[{"index":0,'
        )
        nothing = ',"logprobs":null,"finish_reason":null}]}'
        assert await served.events(CHAT, HELLO) == [
            head + '"delta":{"role":"assistant","content":""}' + nothing,
            head + '"delta":{"content":"a\\""}' + nothing,
            head + '"delta":{"content":"b"}' + nothing,
            head + '"delta":{},"logprobs":null,"finish_reason":"length","stop_reason":null}]}',
            "data: [DONE]",
        ]


async def test_completion_stream_byte_by_byte() -> None:
    async with serving(clock=FIXED) as served:
        served.engine.answer = lambda request: Answer([b"a", (257,)], "stop")
        head = (
            'data: {"id":"cmpl-x","object":"text_completion","created":1234,'
            '"model":"org/tiny","choices":[{"index":0,'
        )
        body = {"prompt": "p", "stream": True, "request_id": "x"}
        assert await served.events(TEXT, body) == [
            head + '"text":"a","logprobs":null,"finish_reason":null}]}',
            head + '"text":"","logprobs":null,"finish_reason":"stop","stop_reason":null}]}',
            "data: [DONE]",
        ]


async def test_nothing_in_an_event_ends_a_line() -> None:
    """Many clients split text as Python's splitlines does."""
    said = "a\u2028b\u2029c\u0085d\x0b\x1ce"
    async with serving() as served:
        served.engine.answer = lambda request: Answer([said.encode()], "length")
        for path, body in ((CHAT, HELLO), ("/api/chat", {"messages": HELLO["messages"]})):
            async with served.session.post(path, json=body) as response:
                text = (await response.read()).decode()
            assert text.splitlines() == text.removesuffix("\n").split("\n")
            assert "a\\u2028b\\u2029c\\u0085d" in text


async def test_usage_comes_last_and_only_when_asked_for() -> None:
    async with serving() as served:
        plain = await served.chunks(CHAT, HELLO)
        assert all("usage" not in chunk for chunk in plain)
        chunks = await served.chunks(CHAT, {**HELLO, "stream_options": {"include_usage": True}})
        *others, last = chunks
        assert len(others) == len(plain)
        assert all(chunk["usage"] is None for chunk in others)
        assert last["choices"] == []
        assert last["usage"]["completion_tokens"] == 3
        assert {chunk["id"] for chunk in chunks} == {"chatcmpl-x"}


async def test_finish_reason_is_in_the_last_chunk_only() -> None:
    async with serving() as served:
        chunks = await served.chunks(CHAT, HELLO)
        reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
        assert reasons[-1] == "stop"
        assert set(reasons[:-1]) == {None}
        roles = ["role" in chunk["choices"][0]["delta"] for chunk in chunks]
        assert roles == [True] + [False] * (len(chunks) - 1)


async def test_no_half_characters_and_nothing_lost() -> None:
    text = "naïve 世界 🙂 fin"
    async with serving() as served:
        served.engine.answer = lambda request: spoken(text, "stop")
        chunks = await served.chunks(CHAT, HELLO)
        deltas = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
        assert "".join(deltas) == text
        assert all("�" not in delta for delta in deltas)


async def test_held_back_beginning_of_a_stop_string_comes_at_the_end() -> None:
    async with serving() as served:
        served.engine.answer = lambda request: spoken("a ST")
        chunks = await served.chunks(CHAT, {**HELLO, "stop": "STOP"})
        text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
        assert text == "a ST"


async def test_stop_string_never_shows() -> None:
    async with serving() as served:
        served.engine.answer = lambda request: spoken("a STOP" + "b" * 50)
        chunks = await served.chunks(CHAT, {**HELLO, "stop": "STOP"})
        text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
        assert text == "a "
        assert chunks[-1]["choices"][0]["stop_reason"] == "STOP"
        assert served.engine.stopped == ["chatcmpl-x-0"] and not served.engine.aborted


async def test_choices_interleave() -> None:
    async with serving() as served:
        served.engine.answer = lambda request: spoken(request.id[-1] * 5, "stop")
        options = {"n": 3, "stream_options": {"include_usage": True}}
        *chunks, last = await served.chunks(CHAT, {**HELLO, **options})
        texts = {0: "", 1: "", 2: ""}
        order, reasons = [], []
        for chunk in chunks:
            (choice,) = chunk["choices"]
            texts[choice["index"]] += choice["delta"].get("content", "")
            order.append(choice["index"])
            if choice["finish_reason"]:
                reasons.append(choice["index"])
        assert texts == {0: "00000", 1: "11111", 2: "22222"}
        assert sorted(reasons) == [0, 1, 2]
        assert order != sorted(order)
        assert last["usage"]["completion_tokens"] == 18


async def test_logprobs_in_chunks_match_their_text() -> None:
    async with serving() as served:
        served.engine.answer = lambda request: spoken("héy")
        chunks = await served.chunks(CHAT, {**HELLO, "logprobs": True})
        for chunk in chunks:
            choice = chunk["choices"][0]
            text = choice["delta"].get("content", "")
            if choice["logprobs"] is not None:
                raw = b"".join(bytes(entry["bytes"]) for entry in choice["logprobs"]["content"])
                assert raw.decode() == text


async def test_refused_before_the_first_byte_is_a_status() -> None:
    async with serving() as served:
        served.engine.refuse = lambda request: QueueFull("full", retry_after=1)
        status, reply = await served.post(CHAT, HELLO)
        assert status == 429
        assert reply["error"]["code"] == "queue_full"
        served.engine.refuse = lambda request: None
        served.engine.answer = lambda request: Answer([b""], "error", "died in prefill")
        status, reply = await served.post(CHAT, HELLO)
        assert status == 503


async def test_error_after_200_is_an_event() -> None:
    async with serving() as served:
        served.engine.answer = lambda request: None
        posting = asyncio.create_task(served.session.post(CHAT, json=HELLO))
        await served.engine.submitted.wait()
        push(served.engine.requests[0], served.engine.streams[0], b"a")
        async with await posting as response:
            first = await response.content.readuntil(b"\n\n")
            assert b'"role":"assistant"' in first
            await response.content.readuntil(b"\n\n")
            served.engine.streams[0].finish("error", "the worker died")
            rest = (await response.read()).decode().split("\n\n")
        assert json.loads(rest[0].removeprefix("data: ")) == {
            "error": {
                "message": "the worker died",
                "type": "service_unavailable",
                "param": None,
                "code": "unavailable",
            }
        }
        assert rest[1:] == ["data: [DONE]", ""]


@pytest.mark.parametrize("step", [b"", b"c"])
async def test_a_failure_behind_the_end_is_none(step: bytes) -> None:
    """The engine goes on until it hears of the stop string, and may fail at a token behind it. How
    its tokens came together must not matter."""
    async with serving() as served:
        served.engine.answer = lambda request: Answer([b"ab", step], "excluded", "nothing is left")
        status, reply = await served.post(CHAT, {**HELLO, "stop": "b", "stream": False})
        assert status == 200, reply
        choice = reply["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == ("a", "stop")
        *_, last, end = await served.events(CHAT, {**HELLO, "stop": "b"})
        assert '"finish_reason":"stop"' in last and end == "data: [DONE]"


async def test_what_came_before_a_failure_is_shown() -> None:
    async with serving() as served:
        served.engine.answer = lambda request: Answer([b"abc"], "excluded", "nothing is left")
        events = await served.events(CHAT, HELLO)
        assert '"content":"abc"' in events[1] and "nothing is left" in events[2]


async def test_one_choice_that_fails_ends_them_all() -> None:
    async with serving() as served:
        served.engine.answer = lambda request: (
            Answer([b""], "error", "broken") if request.id.endswith("1") else None
        )
        status, reply = await served.post(CHAT, {**HELLO, "n": 3})
        assert status == 503
        assert reply["error"]["message"] == "broken"
        assert sorted(served.engine.aborted) == ["chatcmpl-x-0", "chatcmpl-x-2"]


class SteppedTime:
    """A clock whose sleepers wake when the test moves it past their time."""

    def __init__(self) -> None:
        self._now = ManualClock()
        self._sleepers: list[tuple[float, asyncio.Event]] = []
        self.slept = asyncio.Event()
        self.clock = Clock(monotonic=self._now, sleep=self._sleep)

    async def _sleep(self, seconds: float) -> None:
        event = asyncio.Event()
        self._sleepers.append((self._now() + seconds, event))
        self.slept.set()
        await event.wait()

    def advance(self, seconds: float) -> None:
        now = self._now.advance(seconds)
        self.slept.clear()
        due = [sleeper for sleeper in self._sleepers if sleeper[0] <= now]
        self._sleepers = [sleeper for sleeper in self._sleepers if sleeper[0] > now]
        for _, event in due:
            event.set()


async def test_keep_alive_while_the_model_loads_and_the_prompt_is_computed() -> None:
    time = SteppedTime()
    async with serving(clock=time.clock) as served:
        served.engine.answer = lambda request: None
        served.fleet.open.clear()
        posting = asyncio.create_task(served.session.post(CHAT, json=HELLO))
        await time.slept.wait()
        time.advance(14.0)
        assert not time.slept.is_set()  # nobody woke: the interval is not over
        time.advance(1.0)
        response = await posting
        assert response.status == 200
        assert await response.content.readuntil(b"\n\n") == b": keep-alive\n\n"
        served.fleet.open.set()
        await served.engine.submitted.wait()
        await time.slept.wait()
        time.advance(15.0)
        assert await response.content.readuntil(b"\n\n") == b": keep-alive\n\n"
        push(served.engine.requests[0], served.engine.streams[0], b"a")
        served.engine.streams[0].finish("length")
        rest = await response.text()
        assert rest.startswith("data: ") and rest.endswith("data: [DONE]\n\n")


async def test_error_after_a_keep_alive_is_an_event() -> None:
    time = SteppedTime()
    async with serving(clock=time.clock) as served:
        served.fleet.open.clear()
        served.engine.refuse = lambda request: QueueFull("full", retry_after=1)
        posting = asyncio.create_task(served.session.post(CHAT, json=HELLO))
        await time.slept.wait()
        time.advance(15.0)
        response = await posting
        assert response.status == 200
        served.fleet.open.set()
        text = await response.text()
        assert '"code":"queue_full"' in text
        assert text.endswith("data: [DONE]\n\n")


async def _post_raw(
    served: Served, body: dict[str, Any], path: str = CHAT, receive_buffer: int | None = None
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Sends the request on a connection of its own."""
    payload = json.dumps(body).encode()
    sock = socket.socket()
    if receive_buffer is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    sock.connect(("127.0.0.1", served.port))
    reader, writer = await asyncio.open_connection(sock=sock, limit=receive_buffer or 2**16)
    writer.write(
        b"POST %b HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"
        % (path.encode(), len(payload))
        + payload
    )
    return reader, writer


async def _leave(served: Served, body: dict[str, Any], path: str = CHAT) -> None:
    """Hangs up when the engine has the request; returns when it was aborted."""
    _, writer = await _post_raw(served, body, path)
    await served.engine.submitted.wait()
    writer.close()
    await served.engine.abort_seen.wait()


async def test_leaving_aborts_streaming_or_not() -> None:
    for stream in (True, False):
        async with serving() as served:
            served.engine.answer = lambda request: None
            await _leave(served, {**HELLO, "stream": stream})
            assert served.engine.aborted == ["chatcmpl-x-0"]
            assert served.fleet.num_leases == 0


async def test_leaving_aborts_every_choice() -> None:
    async with serving() as served:
        served.engine.answer = lambda request: None
        await _leave(served, {"prompt": ["a", "b"], "n": 2, "stream": True}, TEXT)
        assert len(served.engine.aborted) == 4


async def test_leaving_in_the_middle_of_the_text() -> None:
    async with serving() as served:
        served.engine.answer = lambda request: None
        async with aiohttp.ClientSession(f"http://127.0.0.1:{served.port}") as session:
            posting = asyncio.create_task(session.post(CHAT, json=HELLO))
            await served.engine.submitted.wait()
            push(served.engine.requests[0], served.engine.streams[0], b"a")
            response = await posting
            await response.content.readuntil(b"\n\n")
            response.close()
            await served.engine.abort_seen.wait()
        assert served.fleet.num_leases == 0


async def test_leaving_while_the_model_loads_submits_nothing() -> None:
    async with serving() as served:
        served.fleet.open.clear()
        posting = asyncio.create_task(served.session.post(CHAT, json=HELLO))
        while served.fleet.num_waiting == 0:
            await asyncio.sleep(0)
        posting.cancel()
        while served.fleet.num_waiting:
            await asyncio.sleep(0)
        served.fleet.open.set()
        await asyncio.sleep(0)
        assert served.engine.requests == []


def _body_of(raw: bytes) -> bytes:
    """Takes the chunked transfer coding off, up to what has come."""
    _, _, rest = raw.partition(b"\r\n\r\n")
    body = b""
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        length = int(size, 16)
        body, rest = body + rest[:length], rest[length + 2 :]
    return body


async def test_a_slow_reader_gets_merged_deltas_and_everything() -> None:
    """The engine is never held up: it says all it has while the reader does not read."""
    num_tokens = 600
    body = {**HELLO, "logprobs": True, "top_logprobs": 20}
    async with serving(send_buffer=4096) as served:
        served.engine.answer = lambda request: None
        reader, writer = await _post_raw(served, body, receive_buffer=4096)
        await served.engine.submitted.wait()
        request, stream = served.engine.requests[0], served.engine.streams[0]
        for _ in range(num_tokens):
            push(request, stream, b"x")
            await asyncio.sleep(0)
        stream.finish("length")
        raw = b""
        while b"data: [DONE]" not in raw:
            raw += await reader.read(4096)
        writer.close()
    lines = [line[6:] for line in _body_of(raw).split(b"\n") if line.startswith(b"data: {")]
    choices = [json.loads(line)["choices"][0] for line in lines]
    assert "".join(c["delta"].get("content", "") for c in choices) == "x" * num_tokens
    entries = [entry for c in choices if c["logprobs"] for entry in c["logprobs"]["content"]]
    assert len(entries) == num_tokens
    assert len(choices) < num_tokens / 2

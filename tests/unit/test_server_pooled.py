"""POST /v1/embeddings and /v1/rerank: bodies, replies, errors, the queue."""

from __future__ import annotations

import asyncio
import base64
import math
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import msgspec
import pytest
from server_fakes import BOS, Answer, FakeEngine, FakeFleet, Served, fake_info, serving

from quantd.daemon.engine.stream import TokenStream
from quantd.daemon.errors import QueueFull, RequestError
from quantd.daemon.server.limits import TEXTS
from quantd.daemon.types import ModelInfo, Pooling, Request

EMBED = "/v1/embeddings"
RERANK = "/v1/rerank"
EMBEDDER = Pooling("embed", 4, normalized=True)
MATRYOSHKA = Pooling("embed", 4, normalized=True, matryoshka=True)
RERANKER = Pooling("rerank", 1)


class PooledEngine(FakeEngine):
    """The vector of a text is made of its tokens; the score is the last token's id over 256."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.answer = lambda request: Answer([(0,)], "length")

    def submit(self, request: Request) -> TokenStream:
        stream = super().submit(request)
        stream.vector = self.vector(request)
        return stream

    def vector(self, request: Request) -> bytes:
        if self.size == 1:
            return struct.pack("<f", request.prompt[-1] / 256)
        return struct.pack("<4f", *unit(request.prompt))


def unit(prompt: tuple[int, ...]) -> tuple[float, ...]:
    numbers = (float(len(prompt)), float(prompt[-1]), -30.0, 7.0)
    length = math.sqrt(sum(x * x for x in numbers))
    return tuple(x / length for x in numbers)


def single(numbers: tuple[float, ...]) -> list[float]:
    """As float32 has them."""
    return list(struct.unpack(f"<{len(numbers)}f", struct.pack(f"<{len(numbers)}f", *numbers)))


@asynccontextmanager
async def pooled(pooling: Pooling | None, max_context: int = 512) -> AsyncIterator[Served]:
    info: ModelInfo = msgspec.structs.replace(fake_info(max_context), pooling=pooling)
    fleet = FakeFleet(info=info, engine=PooledEngine(1 if pooling is None else pooling.size))
    async with serving(fleet=fleet) as served:
        yield served


async def test_the_whole_reply() -> None:
    async with pooled(EMBEDDER) as served:
        status, reply = await served.post(EMBED, {"model": "tiny", "input": "ab"})
        assert (status, reply) == (
            200,
            {
                "object": "list",
                "model": "org/tiny",
                "data": [
                    {"object": "embedding", "index": 0, "embedding": single(unit((BOS, 97, 98)))}
                ],
                "usage": {"prompt_tokens": 3, "total_tokens": 3},
            },
        )
        [request] = served.engine.requests
        assert (request.sampling.max_tokens, request.second) == (1, None)
        assert served.fleet.num_leases == 0


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("ab", [(BOS, 97, 98)]),
        (["ab", "c"], [(BOS, 97, 98), (BOS, 99)]),
        ([97, 98], [(97, 98)]),
        ([[97, 98], [99]], [(97, 98), (99,)]),
    ],
)
async def test_input_forms(given: Any, expected: list[tuple[int, ...]]) -> None:
    async with pooled(EMBEDDER) as served:
        status, reply = await served.post(EMBED, {"input": given})
        assert status == 200
        assert [request.prompt for request in served.engine.requests] == expected
        assert [item["index"] for item in reply["data"]] == list(range(len(expected)))
        assert [item["embedding"] for item in reply["data"]] == [single(unit(p)) for p in expected]
        assert reply["usage"]["prompt_tokens"] == sum(map(len, expected))


async def test_base64_is_little_endian_float32() -> None:
    async with pooled(EMBEDDER) as served:
        body = {"input": ["ab", "c"], "encoding_format": "base64", "user": "u", "unknown": {}}
        _, reply = await served.post(EMBED, body)
        for item, prompt in zip(reply["data"], [(BOS, 97, 98), (BOS, 99)], strict=True):
            raw = base64.b64decode(item["embedding"], validate=True)
            assert raw == struct.pack("<4f", *unit(prompt))


@pytest.mark.parametrize("encoding", ["float", "base64"])
async def test_dimensions_cut_and_then_normalize(encoding: str) -> None:
    async with pooled(MATRYOSHKA) as served:
        body = {"input": "ab", "dimensions": 2, "encoding_format": encoding}
        _, reply = await served.post(EMBED, body)
        found = reply["data"][0]["embedding"]
        if encoding == "base64":
            found = list(struct.unpack("<2f", base64.b64decode(found)))
        a, b = unit((BOS, 97, 98))[:2]
        length = math.hypot(a, b)
        assert found == pytest.approx([a / length, b / length], abs=1e-6)


async def test_a_cut_vector_keeps_its_length_where_none_is_normalized() -> None:
    async with pooled(Pooling("embed", 4, matryoshka=True)) as served:
        _, reply = await served.post(EMBED, {"input": "ab", "dimensions": 3})
        assert reply["data"][0]["embedding"] == single(unit((BOS, 97, 98))[:3])


@pytest.mark.parametrize(
    ("pooling", "dimensions", "says"),
    [
        (EMBEDDER, 2, "this model's embeddings have 4"),
        (MATRYOSHKA, 5, "between 1 and 4"),
        (MATRYOSHKA, 0, "between 1 and"),
        (MATRYOSHKA, 1.5, "an integer"),
        (Pooling("embed", 4, matryoshka=True, dimensions=(2,)), 3, "one of 2, or 4"),
    ],
)
async def test_dimensions_that_are_refused(pooling: Pooling, dimensions: float, says: str) -> None:
    async with pooled(pooling) as served:
        error = await served.error(EMBED, {"input": "a", "dimensions": dimensions})
        assert error["param"] == "dimensions" and says in error["message"]
        assert served.engine.requests == []


@pytest.mark.parametrize("dimensions", [4, 4.0, None])
async def test_the_models_own_dimensions_are_always_allowed(dimensions: float | None) -> None:
    async with pooled(EMBEDDER) as served:
        status, _ = await served.post(EMBED, {"input": "a", "dimensions": dimensions})
        assert status == 200


BAD: list[tuple[dict[str, Any], str]] = [
    ({}, "input"),
    ({"input": None}, "input"),
    ({"input": ""}, "input"),
    ({"input": []}, "input"),
    ({"input": [[]]}, "input"),
    ({"input": ["a", ""]}, "input"),
    ({"input": ["a", 1]}, "input"),
    ({"input": [1, [2]]}, "input"),
    ({"input": ["a", [2]]}, "input"),
    ({"input": [1.5]}, "input[0]"),
    ({"input": [True]}, "input[0]"),
    ({"input": {"text": "a"}}, "input"),
    ({"input": [-1]}, "input"),
    ({"input": [[97], [260]]}, "input"),
    ({"input": ["a"] * (TEXTS.high + 1)}, "input"),
    ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
    ({"input": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    ({"input": "abc", "truncate_prompt_tokens": 1}, "truncate_prompt_tokens"),
    ({"input": "a", "priority": "high"}, "priority"),
    ({"input": "a", "timeout": 3}, "timeout"),
]


@pytest.mark.parametrize(("body", "param"), BAD)
async def test_bad_fields(body: dict[str, Any], param: str) -> None:
    async with pooled(EMBEDDER) as served:
        error = await served.error(EMBED, body)
        assert error["param"] == param
        assert served.engine.requests == []


async def test_too_long_is_an_error_with_the_numbers() -> None:
    async with pooled(EMBEDDER, max_context=5) as served:
        assert (await served.post(EMBED, {"input": "abcd"}))[0] == 200  # with <s> just five
        error = await served.error(EMBED, {"input": ["a", "abcde"]})
        assert (error["code"], error["param"]) == ("context_length_exceeded", "input")
        assert "5 tokens" in error["message"] and "input[1] has 6" in error["message"]


async def test_it_is_cut_when_that_is_asked_for() -> None:
    async with pooled(EMBEDDER, max_context=5) as served:
        body = {"input": "abcdefgh", "truncate_prompt_tokens": 4}
        _, reply = await served.post(EMBED, body)
        await served.post(EMBED, {"input": [97, 98, 99], "truncate_prompt_tokens": 2})
        prompts = [request.prompt for request in served.engine.requests]
        assert prompts == [(BOS, 97, 98, 99), (97, 98)]
        assert reply["usage"]["prompt_tokens"] == 4


async def test_a_model_that_generates_embeds_nothing() -> None:
    async with pooled(None) as served:
        error = await served.error(EMBED, {"input": "a"})
        assert (error["param"], error["code"]) == ("model", "unsupported_task")
        assert "'org/tiny' is not an embedding model" in error["message"]
        assert 'task = "embed"' in error["message"]
        error = await served.error(RERANK, {"query": "a", "documents": ["b"]})
        assert "is not a reranker" in error["message"]


@pytest.mark.parametrize("pooling", [EMBEDDER, RERANKER])
async def test_a_model_with_vectors_generates_nothing(pooling: Pooling) -> None:
    async with pooled(pooling) as served:
        chat = {"messages": [{"role": "user", "content": "hi"}]}
        for url, body in (("/v1/chat/completions", chat), ("/v1/completions", {"prompt": "a"})):
            for stream in (False, True):
                error = await served.error(url, body | {"stream": stream})
                assert (error["param"], error["code"]) == ("model", "unsupported_task")
        assert served.engine.requests == []


async def test_one_kind_is_not_the_other() -> None:
    async with pooled(RERANKER) as served:
        error = await served.error(EMBED, {"input": "a"})
        assert "is not an embedding model: it is a reranker" in error["message"]
    async with pooled(EMBEDDER) as served:
        error = await served.error(RERANK, {"query": "a", "documents": ["b"]})
        assert "is not a reranker: it is an embedding model" in error["message"]


async def test_a_full_queue_is_429() -> None:
    async with pooled(EMBEDDER) as served:
        served.engine.refuse = lambda request: QueueFull("The queue is full", retry_after=3)
        async with served.session.post(EMBED, json={"input": ["a", "b"]}) as response:
            assert response.status == 429
            assert response.headers["Retry-After"] == "3"


async def test_a_request_waits_for_its_own_places_in_a_full_queue() -> None:
    async with pooled(EMBEDDER) as served:
        running = 0

        def refuse(request: Request) -> QueueFull | None:
            nonlocal running
            running = sum(not stream.is_finished for stream in served.engine.streams)
            return QueueFull("The queue is full", retry_after=1) if running >= 2 else None

        served.engine.refuse = refuse
        status, reply = await served.post(EMBED, {"input": list("abcdefghi")})
        assert status == 200
        assert [item["embedding"][1] for item in reply["data"]] == [
            single(unit((BOS, ord(char))))[1] for char in "abcdefghi"
        ]


async def test_what_admission_refuses_names_the_field() -> None:
    async with pooled(EMBEDDER) as served:
        served.engine.refuse = lambda request: RequestError("it needs too much", param="prompt")
        assert (await served.error(EMBED, {"input": "a"}))["param"] == "input"


async def test_a_text_that_cannot_be_computed_is_503() -> None:
    async with pooled(EMBEDDER) as served:
        served.engine.answer = lambda request: Answer([(0,)], "error", "it was not finite")
        status, reply = await served.post(EMBED, {"input": "a"})
        assert status == 503 and "it was not finite" in reply["error"]["message"]
        assert served.fleet.num_leases == 0


async def test_a_client_that_leaves_ends_its_texts() -> None:
    async with pooled(EMBEDDER) as served:
        served.engine.answer = lambda request: None
        asking = asyncio.create_task(served.post(EMBED, {"input": ["a", "b", "c"]}))
        while len(served.engine.streams) < 3:
            await served.engine.submitted.wait()
            await asyncio.sleep(0)
        asking.cancel()
        with pytest.raises((asyncio.CancelledError, aiohttp.ClientError)):
            await asking
        while len(served.engine.aborted) < 3:
            await served.engine.abort_seen.wait()
            await asyncio.sleep(0)


async def test_many_texts_are_not_in_the_queue_all_at_once() -> None:
    async with pooled(EMBEDDER) as served:
        most = 0

        def refuse(request: Request) -> None:
            nonlocal most
            most = max(most, sum(not stream.is_finished for stream in served.engine.streams))

        served.engine.refuse = refuse
        status, reply = await served.post(EMBED, {"input": ["a"] * TEXTS.high})
        assert status == 200 and len(reply["data"]) == TEXTS.high
        assert most < 128


# --- rerank ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", ["/v1/rerank", "/v2/rerank", "/rerank"])
async def test_documents_come_by_relevance(url: str) -> None:
    async with pooled(RERANKER) as served:
        body = {"model": "tiny", "query": "q", "documents": ["b", {"text": "d"}, "a"]}
        status, reply = await served.post(url, body)
        assert status == 200
        assert reply.pop("id").startswith("rerank-")
        assert reply == {
            "model": "org/tiny",
            "results": [
                {"index": 1, "relevance_score": 100 / 256, "document": {"text": "d"}},
                {"index": 0, "relevance_score": 98 / 256, "document": {"text": "b"}},
                {"index": 2, "relevance_score": 97 / 256, "document": {"text": "a"}},
            ],
            "usage": {"prompt_tokens": 6, "total_tokens": 6},
        }
        assert [request.prompt[0] for request in served.engine.requests] == [ord("q")] * 3


@pytest.mark.parametrize(("top_n", "count"), [(1, 1), (2, 2), (9, 3), (0, 3), (None, 3)])
async def test_top_n(top_n: int | None, count: int) -> None:
    async with pooled(RERANKER) as served:
        body = {"query": "q", "documents": ["b", "a", "c"], "top_n": top_n}
        _, reply = await served.post(RERANK, body)
        assert [item["index"] for item in reply["results"]] == [2, 0, 1][:count]


async def test_equals_stay_in_order_and_documents_can_be_left_out() -> None:
    async with pooled(RERANKER) as served:
        body = {"query": "q", "documents": ["xa", "ya", "b"], "return_documents": False}
        _, reply = await served.post(RERANK, body)
        assert [item["index"] for item in reply["results"]] == [2, 0, 1]
        assert all("document" not in item for item in reply["results"])


BAD_RERANKS: list[tuple[dict[str, Any], str]] = [
    ({"documents": ["a"]}, "query"),
    ({"query": "q"}, "documents"),
    ({"query": "", "documents": ["a"]}, "query"),
    ({"query": ["q"], "documents": ["a"]}, "query"),
    ({"query": "q", "documents": []}, "documents"),
    ({"query": "q", "documents": ["a", ""]}, "documents"),
    ({"query": "q", "documents": ["a", {"text": ""}]}, "documents"),
    ({"query": "q", "documents": ["a", {"title": "b"}]}, "documents[1].text"),
    ({"query": "q", "documents": ["a", 3]}, "documents[1]"),
    ({"query": "q", "documents": "a"}, "documents"),
    ({"query": "q", "documents": ["a"] * (TEXTS.high + 1)}, "documents"),
    ({"query": "q", "documents": ["a"], "top_n": -1}, "top_n"),
    ({"query": "q", "documents": ["a"], "timeout": 1}, "timeout"),
    ({"query": "qqq", "documents": ["a"], "truncate_prompt_tokens": 3}, "truncate_prompt_tokens"),
]


@pytest.mark.parametrize(("body", "param"), BAD_RERANKS)
async def test_bad_reranks(body: dict[str, Any], param: str) -> None:
    async with pooled(RERANKER) as served:
        error = await served.error(RERANK, body)
        assert error["param"] == param
        assert served.engine.requests == []


async def test_a_long_document_is_an_error_or_cut_behind_its_query() -> None:
    async with pooled(RERANKER, max_context=8) as served:
        body: dict[str, Any] = {"query": "qq", "documents": ["a", "abcdefgh"]}
        error = await served.error(RERANK, body)
        assert (error["code"], error["param"]) == ("context_length_exceeded", "documents")
        assert "documents[1] has 10" in error["message"]
        await served.post(RERANK, body | {"truncate_prompt_tokens": 5})
        prompts = [bytes(request.prompt) for request in served.engine.requests]
        assert prompts == [b"qqa", b"qqabc"]

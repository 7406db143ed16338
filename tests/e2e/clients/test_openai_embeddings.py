"""Embeddings by the official SDK and rerankings by HTTP, beside a model that generates, in one
daemon; the numbers against transformers.
"""

from __future__ import annotations

import base64
import concurrent.futures
import http.client
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from harness import Daemon, Server

pytestmark = pytest.mark.xdist_group("clients")

TEXTS = [
    "The cat sat on the mat.",
    "what is a mat?",
    "x",
    "how is the cat, sitting on the mats of kings and queens",
]
QUERY = "what is the cat on?"
_CONFIG = """
[store]
path = "store"
[models.demo]
path = "embedded:demo"
dtype = "float32"
threads = 1
[models.embedder]
path = "embedder"
threads = 1
[models.free]
path = "embedder"
matryoshka = true
pooling = "cls"
threads = 1
preload = false
[models.reranker]
path = "reranker"
threads = 1
[models.last]
path = "last"
threads = 1
[models.told]
path = "embedded:demo"
task = "embed"
threads = 1
preload = false
"""


class Oracle:
    """The models in the daemon, by transformers."""

    def __init__(self, folder: Path) -> None:
        from numerics.tiny_pooled import make, sentence_transformers, word_piece

        self.folder = folder
        for name in ("embedder", "reranker", "last"):
            (folder / name).mkdir()
            self.tokenizer = word_piece(folder / name)
        self.embedder = make("BertModel", folder / "embedder")
        sentence_transformers(folder / "embedder", "mean_tokens", True)
        self.reranker = make("BertForSequenceClassification", folder / "reranker", num_labels=1)
        self.last = make("Qwen3Model", folder / "last", is_matryoshka=True)
        sentence_transformers(folder / "last", "lasttoken", True)

    def hidden(self, model: Any, text: str) -> Any:
        from numerics.tiny_pooled import hidden_states

        return hidden_states(model, self.tokenizer.encode(text).ids)

    def vector(self, text: str) -> list[float]:
        mean = self.hidden(self.embedder, text).mean(0)
        return list(map(float, mean / mean.norm()))

    def score(self, query: str, document: str) -> float:
        import torch

        pair = self.tokenizer.encode(query, document)
        ids, types = torch.tensor([pair.ids]), torch.tensor([pair.type_ids])
        assert types.sum() > 0
        with torch.no_grad():
            return float(torch.sigmoid(self.reranker(ids, token_type_ids=types).logits)[0, 0])


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    return Oracle(tmp_path_factory.mktemp("pooled"))


@pytest.fixture(scope="module")
def server(oracle: Oracle) -> Iterator[Server]:
    (oracle.folder / "config.toml").write_text(_CONFIG)
    with Daemon("--config", str(oracle.folder / "config.toml")) as daemon:
        yield daemon


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    base = f"{server.url}/v1"
    with openai.OpenAI(base_url=base, api_key="none", max_retries=0, timeout=240) as made:
        yield made


def near(one: Any, other: Any) -> bool:
    return (
        len(one) == len(other) and max(abs(a - b) for a, b in zip(one, other, strict=True)) <= 1e-4
    )


def test_texts_in_order_by_the_sdks_own_base64(client: openai.OpenAI, oracle: Oracle) -> None:
    """The SDK asks for base64 unless told otherwise, and unpacks it."""
    reply = client.embeddings.create(model="embedder", input=TEXTS)
    assert reply.model == "embedder" and reply.object == "list"
    assert [item.index for item in reply.data] == [0, 1, 2, 3]
    for item, text in zip(reply.data, TEXTS, strict=True):
        assert near(item.embedding, oracle.vector(text))
    count = sum(len(oracle.tokenizer.encode(text).ids) for text in TEXTS)
    assert (reply.usage.prompt_tokens, reply.usage.total_tokens) == (count, count)


def test_float_and_base64_are_the_same_numbers(client: openai.OpenAI) -> None:
    floats = client.embeddings.create(model="embedder", input=TEXTS[0], encoding_format="float")
    packed = client.embeddings.create(model="embedder", input=TEXTS[0], encoding_format="base64")
    raw: Any = packed.data[0].embedding
    numbers = struct.unpack("<32f", base64.b64decode(raw, validate=True))
    assert floats.data[0].embedding == list(numbers)


def test_token_ids_and_a_list_of_them(client: openai.OpenAI, oracle: Oracle) -> None:
    ids = [oracle.tokenizer.encode(text).ids for text in TEXTS]
    many = client.embeddings.create(model="embedder", input=ids)
    one = client.embeddings.create(model="embedder", input=ids[1])
    texts = client.embeddings.create(model="embedder", input=TEXTS)
    assert [item.embedding for item in many.data] == [item.embedding for item in texts.data]
    assert one.data[0].embedding == many.data[1].embedding


def test_alone_as_among_many(client: openai.OpenAI) -> None:
    texts = [f"{text} {text[::-1]}"[: 10 + i % 40] for i, text in enumerate(TEXTS * 50)]
    many = client.embeddings.create(model="embedder", input=texts)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        alone = pool.map(
            lambda text: client.embeddings.create(model="embedder", input=text).data[0].embedding,
            texts[::9],
        )
        assert [item.embedding for item in many.data[::9]] == list(alone)


def test_dimensions(client: openai.OpenAI, oracle: Oracle) -> None:
    for size in (1, 8, 32):
        reply = client.embeddings.create(model="last", input=TEXTS[0], dimensions=size)
        wanted = oracle.hidden(oracle.last, TEXTS[0])[-1][:size]
        assert near(reply.data[0].embedding, list(map(float, wanted / wanted.norm())))
    with pytest.raises(openai.BadRequestError) as failed:
        client.embeddings.create(model="embedder", input="x", dimensions=8)
    assert failed.value.param == "dimensions" and "embeddings have 32" in str(failed.value)


def test_the_configuration_allows_to_cut_and_says_how_to_pool(
    client: openai.OpenAI, oracle: Oracle
) -> None:
    reply = client.embeddings.create(model="free", input=TEXTS[0], dimensions=8)
    wanted = oracle.hidden(oracle.embedder, TEXTS[0])[0][:8]
    assert near(reply.data[0].embedding, list(map(float, wanted / wanted.norm())))


def test_a_model_that_generates_embeds_when_it_is_told_to(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="is not an embedding model"):
        client.embeddings.create(model="demo", input="x")
    reply = client.embeddings.create(model="told", input=["Hello", "Hello", "Bye"])
    first, second, third = (item.embedding for item in reply.data)
    assert first == second != third
    assert abs(sum(x * x for x in first) - 1.0) < 1e-4


def test_what_is_too_long_or_empty(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as failed:
        client.embeddings.create(model="embedder", input=["x", "a b " * 40])
    assert failed.value.code == "context_length_exceeded"
    assert "66 tokens" in str(failed.value) and "input[1] has 82" in str(failed.value)
    cut = client.embeddings.create(
        model="embedder", input="a b " * 40, extra_body={"truncate_prompt_tokens": 12}
    )
    same = client.embeddings.create(model="embedder", input="a b " * 5)
    assert cut.data[0].embedding == same.data[0].embedding and cut.usage.prompt_tokens == 12
    # What just fits is computed.
    client.embeddings.create(model="embedder", input="a b " * 32)
    with pytest.raises(openai.BadRequestError, match="empty"):
        client.embeddings.create(model="embedder", input=["x", ""])


def test_each_kind_of_model_beside_the_others(client: openai.OpenAI, server: Server) -> None:
    chat: Any = {"messages": [{"role": "user", "content": "Sort these numbers: 3, 1"}]}
    answer = client.chat.completions.create(model="demo", max_tokens=8, temperature=0, **chat)
    assert answer.choices[0].message.content
    for model in ("embedder", "reranker"):
        with pytest.raises(openai.BadRequestError, match="generates no text"):
            client.chat.completions.create(model=model, **chat)
    ids = [model.id for model in client.models.list()]
    assert ids == ["demo", "embedder", "free", "reranker", "last", "told"]
    models = json.loads(server.get("/admin/models", unix=True)[1])
    tasks = {model["name"]: (model["info"] or {}).get("pooling") for model in models["models"]}
    assert tasks["demo"] is None and tasks["reranker"]["task"] == "rerank"
    assert (tasks["last"]["task"], tasks["last"]["size"]) == ("embed", 32)
    client.embeddings.create(model="embedder", input="x")
    assert server.get("/admin/check", unix=True)[0] == 200
    generated = server.metric('quantd_generated_tokens_total{model="embedder"}')
    computed = server.metric('quantd_prompt_tokens_total{model="embedder"}')
    assert generated == 0 and computed > 0


def test_a_batch_of_embeddings(client: openai.OpenAI, oracle: Oracle, server: Server) -> None:
    lines = [
        {
            "custom_id": str(i),
            "method": "POST",
            "url": "/v1/embeddings",
            "body": {"model": "embedder", "input": text},
        }
        for i, text in enumerate(TEXTS)
    ]
    raw = "\n".join(map(json.dumps, lines)).encode()
    file = client.files.create(file=("lines.jsonl", raw), purpose="batch")
    batch = client.batches.create(
        input_file_id=file.id, endpoint="/v1/embeddings", completion_window="24h"
    )
    server.wait(lambda: client.batches.retrieve(batch.id).status in ("completed", "failed"))
    done = client.batches.retrieve(batch.id)
    assert done.request_counts is not None and done.request_counts.completed == len(TEXTS), done
    assert done.output_file_id is not None
    for line in client.files.content(done.output_file_id).text.splitlines():
        result = json.loads(line)
        [item] = result["response"]["body"]["data"]
        assert near(item["embedding"], oracle.vector(TEXTS[int(result["custom_id"])]))


def test_a_client_that_leaves_ends_its_texts(server: Server) -> None:
    body = json.dumps({"model": "reranker", "query": "a " * 30, "documents": ["b " * 30] * 2048})
    for _ in range(20):  # all of them may be done before this process has looked
        before = _stats(server)["finished"]
        connection = http.client.HTTPConnection("127.0.0.1", server.port)
        connection.request("POST", "/v1/rerank", body, {"Content-Type": "application/json"})
        server.wait(lambda before=before: _stats(server)["finished"] > before)
        connection.close()
        server.wait_requests(0)
        finished = _stats(server)["finished"] - before
        assert 0 < finished <= 2048
        if finished < 2048:
            break
    assert finished < 2048


def _stats(server: Server) -> dict[str, Any]:
    state = json.loads(server.get("/admin/state", unix=True)[1])
    stats: dict[str, Any] = state["engines"]["reranker"]
    return stats


def test_an_encoder_has_no_memory_to_resize(server: Server) -> None:
    body = {"model": "embedder", "kv_bytes": "1MiB"}
    status, _, data = server.request("POST", "/admin/kv", body, unix=True)
    assert status == 400 and "keeps no KV blocks" in json.loads(data)["error"]["message"]


def test_rerank(server: Server, oracle: Oracle) -> None:
    documents = [*TEXTS, {"text": "a b c"}]
    shown = [*TEXTS, "a b c"]
    reply = server.post("/v1/rerank", {"model": "reranker", "query": QUERY, "documents": documents})
    scores = [oracle.score(QUERY, text) for text in shown]
    assert [item["index"] for item in reply["results"]] == sorted(
        range(5), key=lambda index: -scores[index]
    )
    for item in reply["results"]:
        assert abs(item["relevance_score"] - scores[item["index"]]) <= 1e-4
        assert item["document"] == {"text": shown[item["index"]]}
    lengths = [len(oracle.tokenizer.encode(QUERY, text).ids) for text in shown]
    assert reply["usage"] == {"prompt_tokens": sum(lengths), "total_tokens": sum(lengths)}
    best = server.post(
        "/rerank", {"model": "reranker", "query": QUERY, "documents": documents, "top_n": 1}
    )
    assert best["results"] == reply["results"][:1]


def test_a_document_is_cut_when_that_is_asked_for(server: Server, oracle: Oracle) -> None:
    body = {"model": "reranker", "query": "cat", "documents": ["a b c d"]}
    whole = server.post("/v1/rerank", body)
    long = body | {"documents": ["a b c d e f g h"], "truncate_prompt_tokens": 8}
    cut = server.post("/v1/rerank", long)
    assert cut["results"][0]["relevance_score"] == whole["results"][0]["relevance_score"]
    assert cut["usage"] == whole["usage"]

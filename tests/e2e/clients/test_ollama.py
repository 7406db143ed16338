"""Ollama's official client against the daemon, by the embedded model and what is made of it."""

from __future__ import annotations

import asyncio
import json
import math
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import ollama
import pytest
from harness import Daemon, Server

pytestmark = pytest.mark.xdist_group("clients")

SUM: Any = {"role": "user", "content": "What is 3 + 4?"}
QUESTION: Any = {"role": "user", "content": "What is the weather in Paris?"}
GREEDY: Any = {"temperature": 0, "num_predict": 200}
EMBEDDED = Path(__file__).parents[3] / "daemon" / "embedded" / "demo"
TEXTS = ["The cat sat on the mat.", "what is a mat?"]
_THINKS = (
    "{% for message in messages %}{{ message.content }}\n{% endfor %}"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n"
    "{% else %}<think>\n{% endif %}"
)
_CONFIG = """
[server]
any_model = true
[models.demo]
path = "embedded:demo"
dtype = "float32"
threads = 1
aliases = ["gpt-4o"]
[models.embedder]
path = "embedder"
threads = 1
preload = false
[models.thinker]
path = "thinker"
threads = 1
preload = false
"""


def get_weather(city: str) -> str:
    """Get the weather

    Args:
        city: The city
    """
    return json.dumps({"city": city, "weather": "sunny"})


def client_of(server: Server, **options: Any) -> ollama.Client:
    return ollama.Client(host=server.url, timeout=240, **options)


@pytest.fixture(scope="module")
def client(demo_server: Server) -> Iterator[ollama.Client]:
    with client_of(demo_server) as client:
        yield client


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An embedder, and the embedded model with a template that opens reasoning."""
    from numerics.tiny_pooled import make, sentence_transformers, word_piece

    folder = tmp_path_factory.mktemp("ollama")
    (folder / "embedder").mkdir()
    word_piece(folder / "embedder")
    make("BertModel", folder / "embedder")
    sentence_transformers(folder / "embedder", "mean_tokens", False)
    shutil.copytree(EMBEDDED, folder / "thinker")
    (folder / "thinker" / "chat_template.jinja").write_text(_THINKS)
    (folder / "config.toml").write_text(_CONFIG)
    return folder


@pytest.fixture(scope="module")
def many(folder: Path) -> Iterator[ollama.Client]:
    """Of a daemon with several models, whose coming and going nobody else minds."""
    with Daemon("--config", str(folder / "config.toml")) as daemon, client_of(daemon) as client:
        yield client


def test_whole_and_streamed_are_the_same(client: ollama.Client) -> None:
    whole = client.chat("demo", [SUM], options=GREEDY)
    assert (whole.message.role, whole.message.content) == ("assistant", "3 + 4 = 7")
    *parts, last = client.chat("demo", [SUM], options=GREEDY, stream=True)
    assert "".join(part.message.content or "" for part in parts) == "3 + 4 = 7"
    assert len(parts) > 1 and not any(part.done for part in parts)
    for end in (whole, last):
        assert (end.done, end.done_reason, end.model) == (True, "stop", "demo")
        assert datetime.fromisoformat(end.created_at or "").tzinfo is not None
        assert end.prompt_eval_count and end.eval_count == whole.eval_count
        assert end.total_duration and end.eval_duration and end.prompt_eval_duration
        assert end.load_duration is not None
        spent = end.load_duration + end.prompt_eval_duration + end.eval_duration
        assert spent <= end.total_duration
    assert last.prompt_eval_count == whole.prompt_eval_count


def test_generate(client: ollama.Client) -> None:
    options = {**GREEDY, "stop": [" ="]}
    whole = client.generate("demo:latest", "What is 3 + 4?", options=options)
    assert (whole.response, whole.done_reason) == ("3 + 4", "stop")
    parts = list(client.generate("demo", "What is 3 + 4?", options=options, stream=True))
    assert "".join(part.response or "" for part in parts) == "3 + 4"
    raw = client.generate("demo", "1 + 2 =", raw=True, options={**GREEDY, "num_predict": 2})
    assert (raw.done_reason, raw.eval_count) == ("length", 2) and raw.response
    chat = client.chat("demo", [SUM], options=GREEDY)
    same = client.generate("demo", SUM["content"], options=GREEDY)
    assert same.response == chat.message.content
    assert same.prompt_eval_count == chat.prompt_eval_count


def test_seeds(client: ollama.Client) -> None:
    def answer(seed: int) -> str:
        options = {"temperature": 2.0, "top_k": 0, "top_p": 1.0, "num_predict": 30, "seed": seed}
        return client.generate("demo", "Tell me about quantd.", options=options).response or ""

    assert answer(5) == answer(5)
    assert len({answer(-1) for _ in range(4)}) > 1


def test_formats(client: ollama.Client) -> None:
    schema = {
        "type": "object",
        "properties": {"sum": {"type": "integer"}},
        "required": ["sum"],
        "additionalProperties": False,
    }
    for stream in (False, True):
        made: Any = client.chat("demo", [SUM], options=GREEDY, format=schema, stream=stream)
        parts = list(made) if stream else [made]
        text = "".join(part.message.content for part in parts)
        assert set(json.loads(text)) == {"sum"} and isinstance(json.loads(text)["sum"], int)
    reply = client.generate("demo", "What is 3 + 4?", options=GREEDY, format=schema)
    assert isinstance(json.loads(reply.response or "")["sum"], int)
    made = client.generate("demo", "JSON!", options={"num_predict": 100}, format="json")
    assert (made.response or "{").lstrip().startswith("{")


def test_a_tool_and_its_result(client: ollama.Client) -> None:
    first = client.chat("demo", [QUESTION], tools=[get_weather], options=GREEDY)
    [call] = first.message.tool_calls or []
    assert (call.function.name, call.function.arguments) == ("get_weather", {"city": "Paris"})
    assert first.done_reason == "stop"
    parts = list(client.chat("demo", [QUESTION], tools=[get_weather], options=GREEDY, stream=True))
    [streamed] = [call for part in parts for call in part.message.tool_calls or []]
    assert streamed.function == call.function and parts[-1].done
    result = get_weather(**call.function.arguments)
    turns = [
        QUESTION,
        first.message,
        {"role": "tool", "tool_name": "get_weather", "content": result},
    ]
    second = client.chat("demo", turns, tools=[get_weather], options=GREEDY)
    assert "sunny" in (second.message.content or "") and not second.message.tool_calls


def test_log_probabilities(client: ollama.Client) -> None:
    made = client.chat("demo", [SUM], options=GREEDY, logprobs=True, top_logprobs=2)
    entries = made.logprobs or []
    assert "".join(entry.token for entry in entries).strip() == made.message.content
    assert all(len(entry.top_logprobs or []) == 2 for entry in entries)
    assert all(entry.logprob <= 0 for entry in entries)


def test_looking(client: ollama.Client) -> None:
    [model] = client.list().models
    assert model.model == "demo:latest" and model.details
    assert model.size == sum(
        file.stat().st_size
        for file in EMBEDDED.iterdir()
        if file.suffix in (".safetensors", ".json", ".jinja")
    )
    assert (model.details.family, model.details.format) == ("llama", "safetensors")
    assert model.details.quantization_level == "F32"
    assert (model.details.parameter_size or "").endswith("M")
    shown = client.show("demo")
    assert shown.capabilities == ["completion", "tools"]
    assert shown.modelinfo and shown.modelinfo["llama.context_length"] == 8192
    assert shown.modelinfo["general.architecture"] == "llama"
    assert shown.modelinfo["general.parameter_count"] > 1_000_000
    assert "messages" in (shown.template or "")
    [loaded] = client.ps().models
    assert (loaded.model, loaded.size_vram) == ("demo:latest", 0)
    assert loaded.digest == model.digest and loaded.size and loaded.size > 1_000_000
    assert loaded.expires_at and loaded.expires_at.year == 9999
    assert loaded.context_length == 8192


def test_errors(client: ollama.Client, strict_server: Server, api_key: str) -> None:
    def fails(status: int, match: str, call: Any, *given: Any, **fields: Any) -> None:
        with pytest.raises(ollama.ResponseError, match=match) as caught:
            made = call(*given, **fields)
            list(made)
        assert caught.value.status_code == status

    for stream in (False, True):
        fails(404, "'gpt-9' does not exist", client.chat, "gpt-9", [SUM], stream=stream)
        options = {"temperature": 9}
        fails(400, "options.temperature", client.chat, "demo", [SUM], options=options)
        options = {"num_ctx": 100_000}
        fails(400, "at most 8192", client.generate, "demo", "x", options=options, stream=stream)
    fails(400, "does not support thinking", client.chat, "demo", [SUM], think=True)
    fails(400, "context is not supported", client.generate, "demo", "x", context=[1])
    fails(400, "images are not supported", client.generate, "demo", "x", images=[b"x"])
    fails(400, "is not an embedding model", client.embed, "demo", "x")
    fails(404, "does not exist", client.show, "gpt-9")
    fails(400, "maximum context length is 8192", client.generate, "demo", "a b " * 9000)
    fails(501, "is not served", client.pull, "demo")
    fails(501, "is not served", client.push, "demo")
    fails(501, "is not served", client.create, "x", from_="demo")
    fails(501, "is not served", client.delete, "demo")
    fails(501, "is not served", client.copy, "demo", "x")
    with client_of(strict_server) as stranger:
        fails(401, "no API key", stranger.list)
    with client_of(strict_server, headers={"Authorization": f"Bearer {api_key}"}) as known:
        assert known.chat("demo", [SUM]).done
        fails(413, "larger than the limit", known.chat, "demo", [{**SUM, "content": "x" * 30000}])
        fails(503, "nowhere", known.chat, "broken", [SUM], stream=True)


def test_a_client_that_leaves_leaves_nothing(client: ollama.Client, demo_server: Server) -> None:
    aborted = 'quantd_requests_total{model="demo",outcome="abort"}'
    demo_server.wait_requests(0)
    before = demo_server.metric(aborted)

    async def leave() -> None:
        async with ollama.AsyncClient(host=demo_server.url) as talker:
            schema = {"type": "array", "items": {"type": "integer"}, "minItems": 2000}
            made: Any = await talker.generate("demo", "Count!", format=schema, stream=True)
            async for part in made:
                assert part.model == "demo"
                break
            await made.aclose()

    asyncio.run(leave())
    demo_server.wait_metric(aborted, before + 1)
    demo_server.wait_metric("quantd_requests_running", 0)


def test_embeddings(many: ollama.Client) -> None:
    made = many.embed("embedder", TEXTS)
    assert [len(vector) for vector in made.embeddings] == [32, 32]
    for vector in made.embeddings:
        assert abs(math.fsum(x * x for x in vector) - 1) < 1e-6
    assert made.prompt_eval_count and made.total_duration and made.model == "embedder"
    [one] = many.embed("embedder", TEXTS[0]).embeddings
    assert one == made.embeddings[0]
    plain = many.embeddings("embedder", TEXTS[0]).embedding
    length = math.sqrt(math.fsum(x * x for x in plain))
    assert abs(length - 1) > 0.01
    assert max(abs(a / length - b) for a, b in zip(plain, one, strict=True)) < 1e-6
    long = "a b " * 40
    assert many.embed("embedder", long).prompt_eval_count == 66
    with pytest.raises(ollama.ResponseError, match="maximum context length is 66 tokens"):
        many.embed("embedder", long, truncate=False)
    assert many.show("embedder").capabilities == ["embedding"]
    with pytest.raises(ollama.ResponseError, match="generates no text: use /api/embed"):
        many.chat("embedder", [SUM])


def test_thinking(many: ollama.Client) -> None:
    assert many.show("thinker").capabilities == ["completion", "thinking"]
    options = {"num_predict": 8, "temperature": 0}
    for think in (True, "high", None):
        made = many.chat("thinker", [SUM], think=think, options=options)  # type: ignore[call-overload]
        assert made.message.thinking and not made.message.content
    parts = list(many.generate("thinker", "Hello", think=True, options=options, stream=True))
    assert "".join(part.thinking or "" for part in parts) and not any(p.response for p in parts)
    made = many.chat("thinker", [SUM], think=False, options=options)
    assert made.message.content and not made.message.thinking


def test_models_come_and_go(many: ollama.Client) -> None:
    def loaded() -> list[str | None]:
        return [model.model for model in many.ps().models]

    assert many.generate("demo", keep_alive="10m").done_reason == "load"
    [demo] = [model for model in many.ps().models if model.model == "demo:latest"]
    assert demo.expires_at is not None
    left = (demo.expires_at - datetime.now(UTC)).total_seconds()
    assert 0 < left <= 600
    assert many.chat("demo", keep_alive=0).done_reason == "unload"
    assert "demo:latest" not in loaded()
    reply = many.chat("demo", [SUM], options=GREEDY, keep_alive=-1)
    assert reply.message.content == "3 + 4 = 7"
    assert reply.load_duration and reply.load_duration > 1e8
    assert "demo:latest" in loaded()


def test_other_names(many: ollama.Client) -> None:
    names = [model.model for model in many.list().models]
    assert names == ["demo:latest", "gpt-4o:latest", "embedder:latest", "thinker:latest"]
    for name in ("gpt-4o", "gpt-4o:latest", "llama3.2:3b"):
        reply = many.chat(name, [SUM], options=GREEDY)
        assert (reply.model, reply.message.content) == ("demo", "3 + 4 = 7")
    assert many.show("llama3.2").capabilities == ["completion", "tools"]

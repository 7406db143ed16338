"""Pairs of features: whatever disturbs a request, its answer is the one that it has undisturbed.

What a request may ask for, by what may happen to it meanwhile: displaced for an urgent one and its
blocks spilled, or begun behind a known prefix, from the host, or from files after a restart.
(fp32, the real process and its worker; three daemons for the whole file.)
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest
from harness import Daemon

pytestmark = pytest.mark.xdist_group("pairs")  # or each worker would start the shared daemons

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
DISPLACED = 'quantd_preemptions_total{reason="priority"}'
URGENT, USUAL = -1, 5
QUESTION = "sort: 42, 7, 19, 23, 5, 88, 61, 34, 12, 90, 77, 3, 54, 29, 66"
SCHEMA = {
    "type": "object",
    "properties": {
        "numbers": {
            "type": "array",
            "items": {"type": "integer", "minimum": 0, "maximum": 99},
            "minItems": 6,
            "maxItems": 8,
        },
        "note": {"type": "string", "minLength": 20, "maxLength": 30},
    },
    "required": ["numbers", "note"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}
TOOL = {"type": "function", "function": {"name": "arrange", "parameters": SCHEMA}}
SEEDED = {"temperature": 1.2, "top_p": 0.95, "seed": 11, "ignore_eos": True}
GREEDY = {"temperature": 0, "ignore_eos": True}
PENALTIES = {"frequency_penalty": 0.7, "presence_penalty": 0.4, "repetition_penalty": 1.2}

COMPLETED: dict[str, dict[str, Any]] = {
    "greedy": GREEDY,
    "seed": SEEDED,
    "choices": SEEDED | {"n": 3},
    "penalties": SEEDED | PENALTIES | {"logit_bias": {"30": 2}, "bad_words": ["12"]},
    "stop strings": GREEDY | {"stop": ["29, 12, 19, 23", "never"]},
    "logprobs": GREEDY | {"logprobs": 3},
    "echoed logprobs": GREEDY | {"logprobs": 2, "echo": True},
    "salt": GREEDY | {"cache_salt": "a"},
}
CHATTED: dict[str, dict[str, Any]] = {
    "chat logprobs": SEEDED | {"logprobs": True, "top_logprobs": 2},
    "grammar": SEEDED | {"response_format": FORMAT, "max_tokens": 110},
    "streaming": SEEDED | {"stream": True, "n": 2},
    "tools, streaming": SEEDED
    | {"tools": [TOOL], "tool_choice": "required", "stream": True, "max_tokens": 110},
}
NAMES = [*COMPLETED, *CHATTED]


def body_of(name: str) -> tuple[str, dict[str, Any]]:
    """Each begins with words of its own, so none is a known prefix of another."""
    words = f"{NAMES.index(name)} {QUESTION}"
    usual = {"model": "demo", "max_tokens": 60, "priority": USUAL}
    if name in COMPLETED:
        return COMPLETIONS, usual | {"prompt": words} | COMPLETED[name]
    return CHAT, usual | {"messages": [{"role": "user", "content": words}]} | CHATTED[name]


def ask(daemon: Daemon, name: str) -> Any:
    """All of the answer that does not differ from one asking to the next."""
    path, body = body_of(name)
    if not body.get("stream"):
        return parts_of(daemon.post(path, body))
    status, _, data = daemon.request("POST", path, body)
    assert status == 200 and data.endswith(b"data: [DONE]\n\n"), data
    return joined(json.loads(line[6:]) for line in data.decode().split("\n\n")[:-2])


def parts_of(answer: dict[str, Any]) -> list[Any]:
    usage = answer["usage"]
    return [usage["prompt_tokens"], usage["completion_tokens"], *answer["choices"]]


def joined(chunks: Iterator[dict[str, Any]]) -> list[Any]:
    """By choice: its text, its calls' names and arguments, why it ended."""
    found: dict[int, list[Any]] = {}
    for chunk in chunks:
        assert "error" not in chunk, chunk
        for choice in chunk["choices"]:
            parts = found.setdefault(choice["index"], ["", [], None])
            parts[0] += choice["delta"].get("content") or ""
            for call in choice["delta"].get("tool_calls", ()):
                if "id" in call:
                    parts[1].append([call["function"]["name"], ""])
                parts[1][call["index"]][1] += call["function"]["arguments"]
            parts[2] = parts[2] or choice["finish_reason"]
    return [found[index] for index in sorted(found)]


def alike(left: Any, right: Any) -> bool:
    """Equal; log-probabilities but for what the order of a sum may change."""
    if isinstance(left, float) and isinstance(right, float):
        return math.isclose(left, right, abs_tol=1e-4)
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(alike(left[key], right[key]) for key in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(alike, left, right))
    return bool(left == right)


# --- what happens to it ------------------------------------------------------------------------

FILLERS = [[(i * 7 + j * (i + 2)) % 900 + 20 for j in range(380)] for i in range(3)]
"""Prompts of 24 blocks each, in a pool of 28."""


def fill(daemon: Daemon, number: int) -> None:
    """Nearly the whole pool is needed, by somebody who goes first."""
    prompt = FILLERS[number % len(FILLERS)]
    body = {"model": "demo", "prompt": prompt, "max_tokens": 2, "priority": URGENT}
    daemon.post(COMPLETIONS, body)


def displace(daemon: Daemon, done: Callable[[], bool]) -> bool:
    """What runs, three times at least, each time for somebody who needs its blocks. False where
    it was done too soon: this process may be slow to ask on a machine that is busy."""
    before, number = daemon.metric(DISPLACED), 0
    while daemon.metric(DISPLACED) - before < 3:
        if done():
            return False
        fill(daemon, number)
        number += 1
    return True


def preempted(daemon: Daemon, name: str) -> Any:
    for _ in range(20):
        with ThreadPoolExecutor(1) as thread:
            answer = thread.submit(ask, daemon, name)
            if displace(daemon, answer.done):
                return answer.result()
    raise AssertionError("it is never displaced")


def known(daemon: Daemon, name: str) -> Any:
    """Its beginning comes back from the host, and is then there."""
    ask(daemon, name)
    for number in range(2):
        fill(daemon, number)
    before = state(daemon)
    returned = ask(daemon, name)
    after = state(daemon)
    moves = [kv["fetches"] + kv["recomputes"] for kv in (before, after)]
    assert (moves[1] > moves[0]) == sharing(name)
    hits = daemon.metric("quantd_prefix_hit_tokens_total")
    again = ask(daemon, name)
    assert (daemon.metric("quantd_prefix_hit_tokens_total") > hits) == sharing(name)
    assert alike(again, returned), (again, returned)
    return again


Disturb = Callable[[Daemon, str], Any]


def state(daemon: Daemon, model: str = "demo") -> dict[str, Any]:
    status, data = daemon.get("/admin/state", unix=True)
    assert status == 200
    kv: dict[str, Any] = json.loads(data)["engines"][model]["kv"]
    return kv


def sharing(name: str) -> bool:
    """Log-probabilities of the prompt need every position computed."""
    return name != "echoed logprobs"


# --- the daemons -------------------------------------------------------------------------------

CONFIG = """
[scheduler]
policy = "priority"
overlap = {overlap}
[models.demo]
path = "embedded:demo"
dtype = "float32"
threads = 1
{fields}
[models.vectors]
path = "embedded:demo"
task = "embed"
dtype = "float32"
threads = 1
preload = false
{fields}
"""
SMALL = """
kv_bytes = "3584KiB"
max_context = 440
host_kv_bytes = "64MiB"
"""


def start(folder: Path, fields: str, overlap: bool = True) -> Daemon:
    """A context, as each daemon."""
    file = folder / "config.toml"
    file.write_text(CONFIG.format(fields=fields, overlap=str(overlap).lower()))
    return Daemon("--config", str(file))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """Shares nothing and plans nothing ahead."""
    folder = tmp_path_factory.mktemp("plain")
    with start(folder, "prefix_cache = false", overlap=False) as daemon:
        yield daemon


@pytest.fixture(scope="module")
def undisturbed(plain: Daemon) -> dict[str, Any]:
    """The answers, one after the other."""
    return {name: ask(plain, name) for name in NAMES}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with start(tmp_path_factory.mktemp("small"), SMALL) as daemon:
        yield daemon


@pytest.fixture(scope="module")
def restarted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon whose predecessor was asked everything, and has saved it."""
    folder = tmp_path_factory.mktemp("restarted")
    fields = f'{SMALL}\ndisk_kv_path = "{folder}/kv"'
    with start(folder, fields) as first:
        for name in NAMES:
            ask(first, name)
        first.wait(lambda: state(first)["disk_cached"] >= state(first)["nodes"] > 0)
    with start(folder, fields) as second:
        listed(second)
        yield second


def listed(daemon: Daemon) -> None:
    """Until it is known which files there are; a request waits for that a second only."""
    daemon.wait(lambda: state(daemon)["disk_cached"])


# --- the pairs ---------------------------------------------------------------------------------


def test_each_asks_for_what_its_name_says(undisturbed: dict[str, Any]) -> None:
    texts = {name: [c["text"] for c in undisturbed[name][2:]] for name in COMPLETED}
    assert len(set(texts["choices"])) == 3
    assert texts["penalties"] != texts["seed"] and "12" not in texts["penalties"][0]
    assert undisturbed["stop strings"][2]["stop_reason"] == "29, 12, 19, 23"
    for name in ("logprobs", "echoed logprobs"):
        found = undisturbed[name][2]["logprobs"]["token_logprobs"]
        assert len(found) == 60 + undisturbed[name][0] * (name != "logprobs")
    jsonschema.validate(json.loads(undisturbed["grammar"][2]["message"]["content"]), SCHEMA)
    ((_, ((called, arguments), *_), _),) = undisturbed["tools, streaming"]
    assert called == "arrange"
    jsonschema.validate(json.loads(arguments), SCHEMA)
    assert not alike(undisturbed["greedy"], undisturbed["seed"])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("disturb", [preempted, known])
def test_a_disturbed_answer_is_the_undisturbed_one(
    small: Daemon, undisturbed: dict[str, Any], disturb: Disturb, name: str
) -> None:
    answer = disturb(small, name)
    assert alike(answer, undisturbed[name]), (answer, undisturbed[name])


@pytest.mark.parametrize("name", NAMES)
def test_an_answer_that_begins_in_files_is_the_same(
    restarted: Daemon, undisturbed: dict[str, Any], name: str
) -> None:
    """Whether a block is read goes by what reading has cost so far, which is too much where other
    programs were in the way; a model that is loaded again has measured nothing yet."""
    if name == "salt":
        other = body_of(name)[1] | {"cache_salt": "b"}
        answer = restarted.post(COMPLETIONS, other)
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        assert answer["choices"][0]["text"] == undisturbed[name][2]["text"]
    for _ in range(10):
        before = state(restarted)["moved_blocks"]["in_disk"]
        answer = ask(restarted, name)
        assert alike(answer, undisturbed[name]), (answer, undisturbed[name])
        if (state(restarted)["moved_blocks"]["in_disk"] > before) == sharing(name):
            return
        restarted.post("/admin/models/unload", {"model": "demo"}, unix=True)
        restarted.post("/admin/models/load", {"model": "demo"}, unix=True)
        listed(restarted)
    raise AssertionError("whether it is read is not by what it asks for")


def test_lines_of_a_batch_that_are_displaced(small: Daemon, undisturbed: dict[str, Any]) -> None:
    lines = [
        {"custom_id": name, "method": "POST", "url": COMPLETIONS, "body": body_of(name)[1]}
        for name in COMPLETED
    ]
    data = "".join(json.dumps(line) + "\n" for line in lines).encode()
    with openai.OpenAI(base_url=f"{small.url}/v1", api_key="none", max_retries=0) as client:
        file = client.files.create(file=("lines.jsonl", data), purpose="batch")
        for _ in range(20):
            batch = client.batches.create(
                input_file_id=file.id, endpoint=COMPLETIONS, completion_window="24h"
            )

            def ended(id: str = batch.id) -> bool:
                return client.batches.retrieve(id).status == "completed"

            is_displaced = displace(small, ended)
            small.wait(ended)
            output = client.batches.retrieve(batch.id).output_file_id
            assert output is not None
            answers = client.files.content(output).text.splitlines()
            if is_displaced:
                break
    assert is_displaced, "they are never displaced"
    assert len(answers) == len(lines)
    for answer in map(json.loads, answers):
        name, answered = answer["custom_id"], parts_of(answer["response"]["body"])
        assert alike(answered, undisturbed[name]), (answered, undisturbed[name])


def test_vectors_beside_a_prefix_that_the_same_weights_have_for_tokens(
    small: Daemon, plain: Daemon
) -> None:
    """Two models of one checkpoint keep their blocks apart; prefixes and want of blocks change no
    vector either."""
    texts = [f"{QUESTION} {i}" for i in range(8)] + [QUESTION * 3]
    body = {"model": "vectors", "input": texts}
    expected = [item["embedding"] for item in plain.post("/v1/embeddings", body)["data"]]
    prompt = {"model": "demo", "prompt": texts[0], "max_tokens": 8} | GREEDY
    said = plain.post(COMPLETIONS, prompt)["choices"]
    for _ in range(2):
        assert small.post(COMPLETIONS, prompt)["choices"] == said
        vectors = [item["embedding"] for item in small.post("/v1/embeddings", body)["data"]]
        assert alike(vectors, expected)
    assert state(small, "vectors")["cached"] > 0

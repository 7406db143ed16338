"""Every dialect in the real process, on random weights: whatever a model would say, its calls are
valid. The tokenizer has the dialect's marks as special tokens, as its models do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from harness import Daemon, Server

from quantd.daemon import embedded

NEW_IDS = 1024
PARAMETERS = {
    "type": "object",
    "properties": {
        "unit": {"type": "string", "enum": ["C", "F"]},
        "n": {"type": "integer", "minimum": 0, "maximum": 99},
        "flag": {"type": "boolean"},
        "place": {"$ref": "#/$defs/place"},
    },
    "required": ["unit", "flag"],
    "additionalProperties": False,
    "$defs": {
        "place": {
            "type": "object",
            "properties": {"x": {"enum": [1, 2, None]}},
            "required": ["x"],
            "additionalProperties": False,
        }
    },
}
EMPTY = {"type": "object", "properties": {}, "additionalProperties": False}
SCHEMAS: dict[str, Any] = {"get_unit": PARAMETERS, "now": EMPTY}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": schema}}
    for name, schema in SCHEMAS.items()
]
START = "{% for message in messages %}{{ message.content }}{% endfor %}{{ tools | tojson }}"
DIALECTS: dict[str, tuple[str, tuple[str, ...]]] = {  # sign in the template, special tokens
    "llama3": ('<|start_header_id|>{"parameters"', ("<|python_tag|>",)),
    "mistral": ("[TOOL_CALLS]", ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]")),
    "pythonic": ("[func_name1(", ("<|python_start|>", "<|python_end|>")),
    "qwen_coder": ("<tool_call><function=<parameter=</think>", ()),
    "harmony": (
        "<|channel|><|message|>",
        ("<|start|>", "<|channel|>", "<|message|>", "<|constrain|>", "<|end|>", "<|call|>"),
    ),
}


def make_model(folder: Path, sign: str, special: tuple[str, ...]) -> None:
    """The embedded model's folder without its weights, with another template and more tokens."""
    shutil.copytree(embedded.path("demo"), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    edit(folder / "config.json", vocab_size=NEW_IDS + 16, num_hidden_layers=2)
    edit(folder / "tokenizer_config.json", chat_template=START + "{# " + sign + " #}")
    tokens = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    for number, content in enumerate(special):
        tokens.append({**tokens[0], "id": NEW_IDS + number, "content": content, "special": True})
    edit(folder / "tokenizer.json", added_tokens=tokens)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("dialects")
    tables = []
    for name, (sign, special) in DIALECTS.items():
        make_model(folder / name, sign, special)
        tables.append(
            f"[models.{name}]\npath = '{name}'\nload_format = 'dummy'\ndtype = 'float32'\n"
            "threads = 1\npreload = false\nkeep_alive = 1\nkv_bytes = '64MiB'\n"
        )
    (folder / "config.toml").write_text("".join(tables))
    with Daemon("--config", str(folder / "config.toml"), folder=folder) as daemon:
        yield daemon


def streamed(server: Server, body: dict[str, Any]) -> list[tuple[str, str]]:
    """Names and arguments of the first choice's calls."""
    status, _, data = server.request("POST", "/v1/chat/completions", {**body, "stream": True})
    assert status == 200
    calls: list[tuple[str, str]] = []
    for line in data.decode().split("\n\n"):
        if line.startswith("data: {"):
            choice = json.loads(line.removeprefix("data: "))["choices"][0]
            for call in choice["delta"].get("tool_calls", ()) if choice["index"] == 0 else ():
                if "id" in call:
                    calls.append((call["function"]["name"], ""))
                name, arguments = calls[call["index"]]
                calls[call["index"]] = (name, arguments + call["function"]["arguments"])
    return calls


@pytest.mark.parametrize("dialect", DIALECTS)
def test_calls_are_valid_whatever_the_model_says(server: Server, dialect: str) -> None:
    body = {
        "model": dialect,
        "messages": [{"role": "user", "content": "hi"}],
        "tools": TOOLS,
        "tool_choice": "required",
        "max_tokens": 200,
        "temperature": 1,
        "seed": 3,
        "n": 8,
    }
    choices = server.post("/v1/chat/completions", body)["choices"]
    num_calls = 0
    for choice in choices:
        message = choice["message"]
        if choice["finish_reason"] == "length":
            continue
        assert choice["finish_reason"] == "tool_calls"
        assert not message["content"]
        for call in message["tool_calls"]:
            function = call["function"]
            jsonschema.validate(json.loads(function["arguments"]), SCHEMAS[function["name"]])
            num_calls += 1
    assert num_calls > 0
    whole = [
        (call["function"]["name"], call["function"]["arguments"])
        for call in choices[0]["message"].get("tool_calls", ())
    ]
    assert streamed(server, body) == whole


@pytest.mark.parametrize("dialect", DIALECTS)
def test_free_answers_hold_their_calls_to_the_schema_too(server: Server, dialect: str) -> None:
    body = {
        "model": dialect,
        "messages": [{"role": "user", "content": "hi"}],
        "tools": TOOLS,
        "max_tokens": 60,
        "temperature": 1,
        "seed": 3,
        "n": 4,
    }
    for choice in server.post("/v1/chat/completions", body)["choices"]:
        if choice["finish_reason"] == "tool_calls":
            for call in choice["message"]["tool_calls"]:
                function = call["function"]
                jsonschema.validate(json.loads(function["arguments"]), SCHEMAS[function["name"]])

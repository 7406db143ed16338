"""The embedded model's training data: right answers, a clean split, one chat format."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "demo_model"
EMBEDDED = ROOT / "daemon" / "embedded"
MODULES = ("data", "facts", "tasks", "tools", "words")


@pytest.fixture(scope="module")
def modules() -> Any:
    """The example's modules by name, imported as its scripts import them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield {name: __import__(name) for name in MODULES}
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(EMBEDDED / "demo" / "tokenizer.json"))


@pytest.mark.parametrize("held_out", [False, True])
def test_arithmetic_is_right(modules: Any, held_out: bool) -> None:
    d = modules["tasks"].draw(1, held_out)
    for _ in range(500):
        _, answer = modules["tasks"].arithmetic(d)
        sides = [side.replace("×", "*") for side in answer.split(" = ")]
        assert len(sides) >= 2
        assert len({eval(side) for side in sides}) == 1, answer
        terms = [int(n) for n in re.findall(r"\d+", sides[0])]
        assert max(terms) <= 99
        assert "*" not in sides[0] or min(terms) <= 9 or max(terms) <= 12
        assert eval(sides[0]) >= 0


def test_conversion_is_right(modules: Any) -> None:
    tasks = modules["tasks"]
    to_base = {"km": 10**6, "m": 1000, "cm": 10, "mm": 1, "tonnes": 10**9, "kg": 10**6}
    to_base |= {"g": 1000, "mg": 1, "L": 1000, "mL": 1, "years": 12, "months": 1, "weeks": 604800}
    to_base |= {"days": 86400, "hours": 3600, "minutes": 60, "seconds": 1, "yards": 36}
    to_base |= {"feet": 12, "inches": 1, "foot": 12, "inch": 1}
    to_base |= {f"{u}": to_base[f"{u}s"] for u in "tonne year month week day hour minute".split()}
    to_base |= {"second": 1, "yard": 36}
    d = tasks.draw(2, held_out=False)
    for _ in range(500):
        _, answer = tasks.conversion(d)
        (value, unit), (result, to) = answer.split(" = ")[0].split(), answer.split()[-2:]
        assert int(value) * to_base[unit] == int(result) * to_base[to], answer


def test_lists_hold_the_same_items(modules: Any) -> None:
    d = modules["tasks"].draw(3, held_out=False)
    for kind in ("sort numbers", "sort words", "reverse"):
        for _ in range(200):
            question, answer = modules["tasks"].lists(d, kind)
            items = answer.split(", ")
            assert len(set(items)) == len(items) in (3, 4)
            assert all(re.search(rf"\b{item}\b", question) for item in items), (question, answer)
            if kind == "sort words":
                assert items == sorted(items)
                assert len({item[0] for item in items}) == 3
            if kind == "sort numbers":
                numbers = [int(item) for item in items]
                assert max(numbers) <= 99
                assert sorted(numbers) in (numbers, numbers[::-1])


def test_extracted_values_stand_in_the_question(modules: Any) -> None:
    d = modules["tasks"].draw(4, held_out=False)
    for _ in range(500):
        question, answer = modules["tasks"].extraction(d, "json")
        assert all(value is None or value in question for value in json.loads(answer).values())


def test_tool_calls_fit_a_tool_on_offer(modules: Any) -> None:
    d = modules["tasks"].draw(5, held_out=True)
    for _ in range(500):
        question, tools, call = modules["tools"].tool_call(d)
        assert len(tools) in (1, 2) and len(call["arguments"]) in (1, 2)
        (tool,) = [t["function"] for t in tools if t["function"]["name"] == call["name"]]
        properties = tool["parameters"]["properties"]
        for key, value in call["arguments"].items():
            assert str(value) in question
            assert isinstance(value, int) == (properties[key]["type"] == "integer")


def test_the_split_leaves_no_item_on_both_sides(modules: Any) -> None:
    words = modules["words"]
    tasks = modules["tasks"]
    for kind in ("+", "-", "×"):
        answers = []
        for held_out in (False, True):
            d = tasks.draw(6, held_out)
            answers.append({tasks.arithmetic(d, kind)[1] for _ in range(2000)})
        assert answers[0].isdisjoint(answers[1])
    d = tasks.draw(7, held_out=True)
    trained = words.Words(d.rng, held_out=False)._lists
    for _ in range(500):
        assert d.words.city() not in trained["city"]
        assert d.words.word() not in trained["common"]


@pytest.mark.parametrize("kind", ["natural", "made up"])
def test_a_held_out_tool_is_never_offered_in_training(modules: Any, kind: str) -> None:
    names: list[set[str]] = []
    for held_out in (False, True):
        d = modules["tasks"].draw(8, held_out)
        drawn = [modules["tools"].tool_call(d, kind)[1] for _ in range(1000)]
        names.append({tool["function"]["name"] for tools in drawn for tool in tools})
    assert names[0].isdisjoint(names[1])
    assert len(names[1]) >= 10


def test_a_seed_gives_one_conversation(modules: Any) -> None:
    data = modules["data"]
    assert data.conversation("x") == data.conversation("x") != data.conversation("y")


def _template(source: str) -> Any:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment.from_string(source)


def test_the_template_renders_what_was_trained(modules: Any) -> None:
    data = modules["data"]
    template = _template(data.CHAT_TEMPLATE)
    for seed in range(300):
        made = data.conversation(seed)
        text = "".join(piece for piece, _ in data.render(made))
        assert template.render(messages=made.messages, tools=made.tools or None) == text
        question = template.render(
            messages=made.messages[:-1], tools=made.tools, add_generation_prompt=True
        )
        assert text.startswith(question)
        rest = data.answer_text(made.messages[-1]) + "<|im_end|>\n"
        assert text.removeprefix(question) == rest


def test_only_answers_are_learnt(modules: Any) -> None:
    data = modules["data"]
    for seed in range(100):
        made = data.conversation(seed)
        learnt = [text for text, learn in data.render(made) if learn]
        answers = [m for m in made.messages if m["role"] == "assistant"]
        assert learnt == [data.answer_text(m) + data.END for m in answers]


def test_consecutive_tool_results_share_a_turn(modules: Any) -> None:
    results = [{"role": "tool", "content": c} for c in ("1", "2")]
    text = _template(modules["data"].CHAT_TEMPLATE).render(messages=results)
    one = "\n<tool_response>\n{}\n</tool_response>"
    assert text == f"<|im_start|>user{one.format(1)}{one.format(2)}<|im_end|>\n"


@pytest.mark.parametrize("name", ["demo", "demo-draft"])
def test_the_exported_template_is_the_trained_one(modules: Any, name: str) -> None:
    config = json.loads((EMBEDDED / name / "tokenizer_config.json").read_text())
    assert config["chat_template"] == modules["data"].CHAT_TEMPLATE


def test_every_digit_is_a_token_and_text_survives(tokenizer: Tokenizer) -> None:
    text = 'Add 1024 and 7.5 — naïve "Zürich" 数 🙂\n\t{"a": [1]}'
    encoded = tokenizer.encode(text)
    assert tokenizer.decode(encoded.ids, skip_special_tokens=False) == text
    assert [t for t in encoded.tokens if any(c.isdigit() for c in t)] == list("1024751")


def test_a_name_has_the_same_pieces_everywhere(tokenizer: Tokenizer) -> None:
    for name in ("Ophelia", "Wroclaw", "Zbigniew"):
        pieces = tokenizer.encode(name).tokens
        for text in (f"in {name}", f'"{name}"', f"({name})"):
            tokens = tokenizer.encode(text).tokens
            assert any(tokens[i : i + len(pieces)] == pieces for i in range(len(tokens)))


def test_both_sizes_share_one_tokenizer_and_fit() -> None:
    files = [p for folder in ("demo", "demo-draft") for p in (EMBEDDED / folder).iterdir()]
    assert sum(p.stat().st_size for p in files) <= 16_000_000
    first, second = (EMBEDDED / f / "tokenizer.json" for f in ("demo", "demo-draft"))
    assert first.read_bytes() == second.read_bytes()

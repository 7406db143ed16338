"""Which reasoning marks and which dialect a model has, by its chat template."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from quantd.daemon import embedded
from quantd.daemon.text import OutputText, TextModel
from quantd.daemon.text.answer import Content, whole
from quantd.daemon.text.checkpoint import read_text_files
from quantd.daemon.text.dialects import BY_NAME
from quantd.daemon.text.format import AnswerFormat
from quantd.daemon.text.tools import Tool, Toolset

TOOLS = Toolset((Tool("f", {"type": "object"}),))
TEMPLATES = {
    "hermes": '{{ tools }}\'<tool_call>\\n{"name": "\' + name + \'", "arguments": \'',
    "qwen_coder": "{{ tools }}<tool_call>\\n<function=' + name + '>\\n<parameter=' + key",
    "mistral": "[AVAILABLE_TOOLS]{{ tools }}[TOOL_CALLS]",
    "pythonic": "{{ tools }}<|header_start|>[func_name1(params_name1=params_value1), func_name2()]",
    "llama3": '<|start_header_id|>{{ tools }}{"name": function name, "parameters": dictionary}',
    "harmony": "{{ tools }}<|start|>assistant<|channel|>final<|message|>",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_dialects_by_template(name: str) -> None:
    assert AnswerFormat.detect([TEMPLATES[name]]).dialect is BY_NAME[name]
    assert AnswerFormat.detect([TEMPLATES[name].replace("tools", "docs")]).dialect is None
    assert AnswerFormat.detect([TEMPLATES[name]], "none").dialect is None
    assert AnswerFormat.detect(["no sign"], name).dialect is BY_NAME[name]


def test_llama_4_has_two_templates() -> None:
    template = '<|header_start|>{{ tools }}<|python_start|>{"name": ", "parameters": '
    assert AnswerFormat.detect([template]).dialect is BY_NAME["llama3"]
    asked = template + "[func_name1(params_name1=params_value1)]"
    assert AnswerFormat.detect([asked]).dialect is BY_NAME["pythonic"]


def test_unknown_ways_are_not_taken_for_known_ones() -> None:
    others = (
        "{{ tools }}<tool_call>' + name + '<arg_key>' + arguments",
        "{{ tools }}<seed:tool_call>\n<function=' + name + '>\n<parameter=' + key",
    )
    for other in others:
        assert AnswerFormat.detect([other]).dialect is None
    assert AnswerFormat.detect([]).dialect is None


@pytest.mark.parametrize(
    "template, close",
    [
        ("content.split('</think>')", "</think>"),
        ("[THINK]' + text + '[/THINK]", "[/THINK]"),
        ("plain", None),
        (TEMPLATES["harmony"] + "</think>", None),
    ],
)
def test_reasoning_by_template(template: str, close: str | None) -> None:
    marks = AnswerFormat.detect([template]).marks
    assert (marks.close if marks else None) == close


@pytest.mark.parametrize("name", ["demo", "demo-draft"])
def test_the_embedded_models_speak_hermes(name: str) -> None:
    model = TextModel.load(embedded.path(name))
    assert model.format == (None, BY_NAME["hermes"])
    assert model.special_marks == {}
    assert TextModel.load(embedded.path(name), tool_dialect="none").format == (None, None)


def test_a_prompt_decides_whether_reasoning_is_open() -> None:
    thinks = AnswerFormat.detect(["</think>"])
    for end, reasoning, content in (
        ("<think>\n", "a", "b"),
        ("assistant\n", "", "a</think>b"),
        ("<think>\n\n</think>\n\n", "", "a</think>b"),
    ):
        parser = thinks.parser(end, None)
        answer = whole([*parser.feed("a</think>b"), *parser.flush()])
        assert (answer.reasoning, answer.content) == (reasoning, content)


def special_model() -> TextModel:
    """One token per byte, and Mistral's marks as special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    marks = ("</s>", "[TOOL_CALLS]", "[ARGS]", "[THINK]", "[/THINK]", "[OTHER]")
    tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in marks])
    return TextModel(tokenizer, read_text_files(Path("/nonexistent")), 100, "mistral")


def test_marks_that_are_special_tokens_reach_the_parser_and_no_others() -> None:
    model = special_model()
    assert set(model.special_marks) == {"[TOOL_CALLS]", "[ARGS]"}
    text = "Hm[OTHER] [TOOL_CALLS]f[ARGS]{}</s>"
    ids = model.encode(text, add_special_tokens=False)
    assert len(ids) == len("Hm") + 1 + 1 + 1 + 1 + 1 + len("{}") + 1
    output = OutputText(model, (), kept=frozenset(model.special_marks.values()))
    shown = output.feed(ids).text + output.flush().text
    assert shown == "Hm [TOOL_CALLS]f[ARGS]{}"
    parser = model.answer_parser((), TOOLS)
    answer = whole([*parser.feed(shown), *parser.flush()])
    assert (answer.content, [call.arguments for call in answer.calls]) == ("Hm", ["{}"])
    assert len(answer.calls[0].id) == 9 and answer.calls[0].id.isalnum()
    plain = model.answer_parser((), None)
    assert [*plain.feed(shown), *plain.flush()] == [Content(shown)]
    grammar = model.answer_grammar((), TOOLS, None)
    assert grammar is not None and f"<[{model.special_marks['[ARGS]']}]>" in grammar.source

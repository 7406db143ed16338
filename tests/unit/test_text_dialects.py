"""Each dialect's parser: what it understands, and that no split of the text changes it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantd.daemon.text.answer import (
    AnswerParser,
    CallArguments,
    CallStart,
    Content,
    Part,
    PlainAnswer,
    Reasoning,
    WholeAnswer,
    whole,
)
from quantd.daemon.text.dialects.harmony import HarmonyParser
from quantd.daemon.text.dialects.hermes import HermesParser
from quantd.daemon.text.dialects.llama3 import Llama3Parser
from quantd.daemon.text.dialects.mistral import MistralParser
from quantd.daemon.text.dialects.pythonic import PythonicParser
from quantd.daemon.text.dialects.qwen_coder import QwenCoderParser
from quantd.daemon.text.dialects.scan import CallParser
from quantd.daemon.text.reasoning import Marks, ReasoningParser
from quantd.daemon.text.tools import Tool, Toolset

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "n": {"type": "integer"},
        "any": {},
        "unit": {"enum": ["C", "F"]},
        "list": {"type": "array"},
    },
}
TOOLS = Toolset(tuple(Tool(name, SCHEMA) for name in ("f", "get.weather-2", "g")))
PARSERS: dict[str, Callable[..., CallParser]] = {
    "hermes": HermesParser,
    "llama3": Llama3Parser,
    "mistral": MistralParser,
    "pythonic": PythonicParser,
    "qwen_coder": QwenCoderParser,
    "harmony": HarmonyParser,
}


def parser_of(dialect: str) -> AnswerParser:
    ids = (f"id{number}" for number in itertools.count())
    return PARSERS[dialect](TOOLS, lambda: next(ids))


def parse(parser: AnswerParser, pieces: Iterable[str]) -> list[Part]:
    """With neighbours of one kind joined."""
    parts = [part for piece in pieces for part in parser.feed(piece)]
    joined: list[Part] = []
    for part in [*parts, *parser.flush()]:
        last = joined[-1] if joined else None
        if isinstance(part, Content) and isinstance(last, Content):
            joined[-1] = Content(last.text + part.text)
        elif isinstance(part, Reasoning) and isinstance(last, Reasoning):
            joined[-1] = Reasoning(last.text + part.text)
        elif isinstance(part, CallArguments) and isinstance(last, CallArguments):
            assert part.call == last.call
            joined[-1] = CallArguments(part.call, last.text + part.text)
        else:
            joined.append(part)
    return joined


def check_form(parts: Sequence[Part]) -> None:
    """Calls are numbered without gaps; arguments follow their own start; nothing is empty."""
    number = -1
    for part in parts:
        if isinstance(part, CallStart):
            number += 1
            assert part.call == number and part.id == f"id{number}"
            assert part.name in {tool.name for tool in TOOLS.tools}
        elif isinstance(part, CallArguments):
            assert part.call == number and part.text
        else:
            assert part.text


def read(dialect: str, text: str) -> WholeAnswer:
    """Of the whole text; every single character must give the same."""
    parser = parser_of(dialect)
    parts = parse(parser, [text])
    check_form(parts)
    by_character = parser_of(dialect)
    assert parse(by_character, text) == parts
    assert [*by_character.reasoning_spans] == [*parser.reasoning_spans]
    assert parser.num_calls == sum(isinstance(part, CallStart) for part in parts)
    return whole(parts)


def calls(answer: WholeAnswer) -> list[tuple[str, Any]]:
    return [(call.name, json.loads(call.arguments)) for call in answer.calls]


NASTY = {
    "city": "Zü\"rich\\ {[(</tool_call>[TOOL_CALLS]<|end|>)]}\n\t'",
    "n": -1203,
    "any": {"a": [True, False, None, 1.5, "}]"], "": {}},
}


def json_forms(name: str, arguments: dict[str, Any]) -> list[str]:
    """The same arguments as models write them."""
    plain = json.dumps(arguments, ensure_ascii=False)
    return [plain, json.dumps(arguments), json.dumps(arguments, indent=2), plain.replace(": ", ":")]


def as_hermes(calls: Sequence[tuple[str, str]]) -> str:
    return "\n".join(
        f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'
        for name, arguments in calls
    )


def as_llama3(calls: Sequence[tuple[str, str]]) -> str:
    return "; ".join(f'{{"name": "{name}", "parameters": {args}}}' for name, args in calls)


def as_mistral(calls: Sequence[tuple[str, str]]) -> str:
    objects = (f'{{"name": "{name}", "arguments": {arguments}}}' for name, arguments in calls)
    return f"[TOOL_CALLS] [{', '.join(objects)}]"


def as_new_mistral(calls: Sequence[tuple[str, str]]) -> str:
    return "".join(f"[TOOL_CALLS]{name}[ARGS]{arguments}" for name, arguments in calls)


def as_harmony(calls: Sequence[tuple[str, str]]) -> str:
    return "<|start|>assistant".join(
        f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{args}<|call|>"
        for name, args in calls
    )


JSON_DIALECTS: list[tuple[str, Callable[[Sequence[tuple[str, str]]], str]]] = [
    ("hermes", as_hermes),
    ("llama3", as_llama3),
    ("mistral", as_mistral),
    ("mistral", as_new_mistral),
    ("harmony", as_harmony),
]


@pytest.mark.parametrize("dialect, write", JSON_DIALECTS)
def test_arguments_are_passed_on_byte_for_byte(
    dialect: str, write: Callable[[Sequence[tuple[str, str]]], str]
) -> None:
    for form in json_forms("f", NASTY):
        answer = read(dialect, write([("f", form)]))
        assert [(call.name, call.arguments) for call in answer.calls] == [("f", form)]
        assert answer.content == ""
    escaped = '{"city": "\\ud83d\\ude00\\u00e9\\"}", "n": 23}'
    assert read(dialect, write([("f", escaped)])).calls[0].arguments == escaped
    assert read(dialect, write([("f", "{}")])).calls[0].arguments == "{}"


@pytest.mark.parametrize("dialect, write", JSON_DIALECTS)
def test_parallel_calls(dialect: str, write: Callable[[Sequence[tuple[str, str]]], str]) -> None:
    answer = read(dialect, write([("f", '{"n": 1}'), ("get.weather-2", "{}"), ("f", '{"n": 2}')]))
    assert calls(answer) == [("f", {"n": 1}), ("get.weather-2", {}), ("f", {"n": 2})]
    assert len({call.id for call in answer.calls}) == 3
    assert answer.content == ""


@pytest.mark.parametrize("dialect, write", JSON_DIALECTS)
def test_a_call_of_an_unknown_function_is_content(
    dialect: str, write: Callable[[Sequence[tuple[str, str]]], str]
) -> None:
    text = write([("other", '{"n": 1}')])
    answer = read(dialect, text)
    parser = parser_of(dialect)
    parse(parser, [text])
    # Without a mark nobody knows that it was to be a call.
    assert parser.num_failed_calls == (dialect != "llama3")
    assert answer.calls == []
    assert '{"n": 1}' in answer.content and "other" in answer.content


@pytest.mark.parametrize("dialect, write", JSON_DIALECTS)
def test_a_call_that_is_cut_off(
    dialect: str, write: Callable[[Sequence[tuple[str, str]]], str]
) -> None:
    text = write([("f", '{"city": "Oslo", "n": 12}')])
    cut = text.index("Oslo") + 2
    assert read(dialect, text[:cut]).calls[0].arguments == '{"city": "Os'
    for stop in range(len(text)):
        answer = read(dialect, text[:stop])
        assert len(answer.calls) + bool(answer.content) <= 1


@pytest.mark.parametrize("dialect", ["hermes", "mistral", "llama3"])
def test_text_before_and_after(dialect: str) -> None:
    call = {
        "hermes": '<tool_call>{"name": "f", "arguments": {}}</tool_call>',
        "mistral": "[TOOL_CALLS]f[ARGS]{}",
        "llama3": '<|python_tag|>{"name": "f", "parameters": {}}',
    }[dialect]
    assert read(dialect, f"Let me see.\n\n{call}\n").content == "Let me see."
    assert read(dialect, f"\n{call}\n\nDone. ").content == "Done. "
    both = read(dialect, f"One \n{call}\ntwo")
    assert both.content.split() == ["One", "two"] and "\n" in both.content
    assert calls(both) == [("f", {})]
    assert read(dialect, " no call \n").content == " no call \n"


@pytest.mark.parametrize("dialect", sorted(PARSERS))
@pytest.mark.parametrize(
    "text", ["", " \n", "plain", "a < b, [1] and {2}; x = {}", '{"foo": [1]}', "[f, g]", "{", "["]
)
def test_text_without_calls_stays_as_it_is(dialect: str, text: str) -> None:
    assert read(dialect, text) == WholeAnswer(content=text)


@pytest.mark.parametrize("dialect", ["hermes", "mistral", "llama3"])
@pytest.mark.parametrize(
    "text",
    [
        '{"arguments": {"n": 1}, "name": "f"}',
        '{"type": "function", "name": "f", "parameters": {"n": 1}}',
        '{"name": "f", "arguments": "{\\"n\\": 1}"}',
        '{ "name" :"f" , "arguments"\n: {"n": 1} }',
        '{"name": "f", "arguments": {"n": 1}, "id": "a}1", "more": [{}]}',
    ],
)
def test_other_orders_of_keys(dialect: str, text: str) -> None:
    marked = {"hermes": f"<tool_call>{text}</tool_call>", "mistral": f"[TOOL_CALLS][{text}]"}
    answer = read(dialect, marked.get(dialect, text))
    assert calls(answer) == [("f", {"n": 1})] and answer.content == ""


@pytest.mark.parametrize("dialect", ["hermes", "mistral", "llama3"])
@pytest.mark.parametrize(
    "text", ['{"name": "f", "arguments": NaN}', '{"name": 3}', "{oops}", "nothing", "[]", "null"]
)
def test_what_is_no_call_is_content(dialect: str, text: str) -> None:
    marked = {
        "hermes": f"<tool_call>{text}</tool_call>",
        "mistral": f"[TOOL_CALLS]{text}",
        "llama3": f"<|python_tag|>{text}",
    }[dialect]
    assert read(dialect, marked) == WholeAnswer(content=marked)


def test_python_literals_become_json() -> None:
    text = """[f(city='it\\'s "x"', n=-3, any={"a": [True, None, (1, 2.5)], 'b': true}), g()]"""
    answer = read("pythonic", text)
    assert [call.arguments for call in answer.calls] == [
        '{"city": "it\'s \\"x\\"", "n": -3, "any": {"a": [true, null, [1, 2.5]], "b": true}}',
        "{}",
    ]
    marked = read("pythonic", "Now: <|python_start|>[f(n=1)]<|python_end|> ok")
    assert (marked.content, calls(marked)) == ("Now:  ok", [("f", {"n": 1})])


@pytest.mark.parametrize(
    "text",
    [
        "[other(n=1)]",
        "[f(n=1+os.system('x'))]",
        "[f(1)]",
        "[f(n=1, n=2)]",
        "[f(n={1, 2})]",
        "[f(n=1e999)]",
        "[f(**{})]",
        "[f(n=[)]",
        '[f(n="',
        "[f (",
    ],
)
def test_what_is_no_python_call_is_content(text: str) -> None:
    assert read("pythonic", text) == WholeAnswer(content=text)


def test_a_second_python_call_that_is_none() -> None:
    answer = read("pythonic", "[f(n=1), other(n=2)]")
    assert (calls(answer), answer.content) == ([("f", {"n": 1})], ", other(n=2)]")


def xml(name: str, **values: str) -> str:
    elements = "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in values.items())
    return f"<tool_call>\n<function={name}>\n{elements}</function>\n</tool_call>"


def test_xml_values_become_json_by_the_schema() -> None:
    values = {"city": '12 "x"\n</b>', "n": "12", "any": '{"a": 1}', "unit": "C", "list": "oops"}
    answer = read("qwen_coder", "I look.\n" + xml("f", **values) + "\n" + xml("g"))
    assert answer.content == "I look."
    assert [call.arguments for call in answer.calls] == [
        '{"city": "12 \\"x\\"\\n</b>", "n": 12, "any": {"a": 1}, "unit": "C", "list": "oops"}',
        "{}",
    ]
    nested = {"any": '{"a": "</parameter>}"}', "list": '["x</parameter>", 1]', "n": "1"}
    assert read("qwen_coder", xml("f", **nested)).calls[0].arguments == (
        '{"any": {"a": "</parameter>}"}, "list": ["x</parameter>", 1], "n": 1}'
    )
    broken = read("qwen_coder", xml("f", any="{oops", n="1"))
    assert broken.calls[0].arguments == '{"any": "{oops", "n": 1}'
    values = {"n": "True", "any": " None\n", "list": "[1 ]"}
    assert read("qwen_coder", xml("f", **values)).calls[0].arguments == (
        '{"n": true, "any": null, "list": [1 ]}'
    )
    assert read("qwen_coder", xml("other", n="1")) == WholeAnswer(content=xml("other", n="1"))


def test_xml_that_is_cut_off() -> None:
    text = xml("f", city="Oslo", n="12")
    cut = read("qwen_coder", text[: text.index("slo")]).calls[0].arguments
    assert cut == '{"city": "O'
    number = read("qwen_coder", text[: text.index("12") + 2]).calls[0].arguments
    assert number == '{"city": "Oslo", "n": 12'
    assert read("qwen_coder", text[: text.index("</function")]).calls[0].arguments == number
    unclosed = text.replace("</function>\n", "")
    assert calls(read("qwen_coder", unclosed)) == [("f", {"city": "Oslo", "n": 12})]


def test_harmony_channels() -> None:
    text = (
        "<|channel|>analysis<|message|>Hm, <|end|>"
        "<|start|>assistant<|channel|>commentary<|message|>I ask.<|end|>"
        "<|start|>assistant<|channel|>analysis<|message|>so<|end|>"
        "<|start|>assistant to=functions.f<|channel|>commentary json<|message|>"
        '{"n": 1}<|call|>'
    )
    answer = read("harmony", text)
    assert (answer.reasoning, answer.content) == ("Hm, so", "I ask.")
    assert calls(answer) == [("f", {"n": 1})]
    parser = parser_of("harmony")
    parse(parser, [text])
    spans = [text[start:stop] for start, stop in parser.reasoning_spans]
    assert spans == [
        "<|channel|>analysis<|message|>Hm, <|end|>",
        "<|start|>assistant<|channel|>analysis<|message|>so<|end|>",
    ]
    final = "<|channel|>analysis<|message|>x<|end|><|start|>assistant<|channel|>final<|message|>Hi."
    assert read("harmony", final) == WholeAnswer(content="Hi.", reasoning="x")
    assert read("harmony", final + "<|return|>") == WholeAnswer(content="Hi.", reasoning="x")
    assert read("harmony", "<|channel|>analysis<|message|>x") == WholeAnswer(reasoning="x")


MARKS = Marks("<think>", "</think>")


def read_reasoning(text: str, *, is_open: bool, dialect: str | None = None) -> WholeAnswer:
    def make() -> AnswerParser:
        inner = PlainAnswer() if dialect is None else parser_of(dialect)
        return ReasoningParser(MARKS, inner, is_open=is_open)

    parts = parse(make(), [text])
    check_form(parts)
    assert parse(make(), text) == parts
    return whole(parts)


def test_reasoning_between_marks() -> None:
    text = "\nfirst\n\nthen </thin \n</think>\n\nHello\n"
    expected = WholeAnswer(content="Hello\n", reasoning="first\n\nthen </thin ")
    assert read_reasoning(text, is_open=True) == expected
    assert read_reasoning("<think>" + text, is_open=False) == expected
    assert read_reasoning("\n<think>\n\n</think>\n\nHi", is_open=False) == WholeAnswer("Hi")
    assert read_reasoning("Hi <think>x</think>", is_open=False).reasoning == ""
    assert read_reasoning("cut off", is_open=True) == WholeAnswer(reasoning="cut off")
    assert read_reasoning(" \n", is_open=False) == WholeAnswer(content=" \n")


def test_reasoning_before_a_call() -> None:
    text = "I call <tool_call>{}</tool_call>?</think>\n\n" + as_hermes([("f", "{}")])
    answer = read_reasoning(text, is_open=True, dialect="hermes")
    assert answer.reasoning == "I call <tool_call>{}</tool_call>?"
    assert (answer.content, calls(answer)) == ("", [("f", {})])


@pytest.mark.parametrize("is_open", [True, False])
def test_reasoning_spans(is_open: bool) -> None:
    text = ("" if is_open else " <think>") + "why\n</think>\n\nbecause"
    parser = ReasoningParser(MARKS, PlainAnswer(), is_open=is_open)
    parse(parser, text)
    stop = text.index("</think>") + len("</think>")
    assert [*parser.reasoning_spans] == [(0 if is_open else 1, stop)]
    cut = ReasoningParser(MARKS, PlainAnswer(), is_open=True)
    parse(cut, "why")
    assert [*cut.reasoning_spans] == [(0, 3)]


FRAGMENTS = {
    "hermes": ["<tool_call>", "</tool_call>", "<tool", "\n", " ", "}"],
    "llama3": ["<|python_tag|>", "<|python", ";", "\n", " ", "}"],
    "mistral": ["[TOOL_CALLS]", "[TOOL", "[ARGS]", "[CALL_ID]ab", "[", "]", ",", "f", " ", "}"],
    "pythonic": [
        "<|python_start|>", "<|python_end|>", "[", "]", ", ", "f(", ")", "n=1", "g(city='a')", " ",
        "get.weather-2", "\n", '"',
    ],
    "qwen_coder": [
        "<tool_call>", "</tool_call>", "<function=f>", "<function=", "</function>", "<parameter=n>",
        "<parameter=city>", "<parameter=", "</parameter>", "\n", "1", " ", "<parameter=any>", "[",
    ],
    "harmony": [
        "<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|call|>", "assistant", "analysis",
        "final", "commentary", " to=functions.f", " to=other", "<|constrain|>json", " ", "<|",
    ],
}  # fmt: skip
COMMON = [
    "text", '{"name": "f", "arguments": {"n": 1}}', '{"name": "f", "parameters": {}}', '"', "\\",
    '{"name": "other", "arguments": {}}', '{"arguments": {}, "name": "g"}', '{"name": "f", ', "é",
    '{"city": "a}</tool_call>"}', "{", "}",
]  # fmt: skip


@pytest.mark.parametrize("dialect", sorted(PARSERS))
@given(data=st.data())
def test_no_split_changes_the_parts(dialect: str, data: st.DataObject) -> None:
    fragments = st.lists(st.sampled_from(FRAGMENTS[dialect] + COMMON), max_size=12)
    text = "".join(data.draw(fragments))
    marks = data.draw(st.sampled_from(["", "<think>", "</think>\n", "<think>\n\n"]))
    text = marks + text
    is_open = data.draw(st.booleans())

    def make() -> AnswerParser:
        return ReasoningParser(MARKS, parser_of(dialect), is_open=is_open)

    expected_parser = make()
    expected = parse(expected_parser, [text])
    check_form(expected)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]
    for split in (pieces, list(text)):
        parser = make()
        assert parse(parser, split) == expected
        assert [*parser.reasoning_spans] == [*expected_parser.reasoning_spans]


@given(
    arguments=st.dictionaries(
        st.text(max_size=4),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
            lambda inner: (
                st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)
            ),
            max_leaves=5,
        ),
        max_size=4,
    ),
    ensure_ascii=st.booleans(),
    which=st.sampled_from(JSON_DIALECTS[:4]),
)
def test_any_arguments_come_through(
    arguments: dict[str, Any],
    ensure_ascii: bool,
    which: tuple[str, Callable[[Sequence[tuple[str, str]]], str]],
) -> None:
    dialect, write = which
    try:
        form = json.dumps(arguments, ensure_ascii=ensure_ascii, allow_nan=False)
    except ValueError:  # infinities
        return
    answer = read(dialect, write([("f", form), ("g", form)]))
    assert [call.arguments for call in answer.calls] == [form, form]

"""Grammars of answers: right calls are let through, wrong ones are not, whatever a model tries."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import jsonschema
import pytest
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from quantd.daemon.errors import RequestError
from quantd.daemon.text.answer import WholeAnswer, whole
from quantd.daemon.text.dialects import BY_NAME
from quantd.daemon.text.format import AnswerFormat
from quantd.daemon.text.reasoning import Marks
from quantd.daemon.text.tools import Tool, Toolset
from quantd.daemon.types import Grammar

EOS = 256
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "n": {"type": "integer"},
        "unit": {"type": "string", "enum": ["C", "F"]},
        "flag": {"type": "boolean"},
        "place": {"$ref": "#/$defs/place"},
    },
    "required": ["city", "unit"],
    "additionalProperties": False,
    "$defs": {
        "place": {
            "type": "object",
            "properties": {"x": {"type": "integer"}},
            "required": ["x"],
            "additionalProperties": False,
        }
    },
}
EMPTY: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
TOOLS = (Tool("weather", SCHEMA), Tool("now-utc", EMPTY))
LOOSE = (Tool("weather", SCHEMA, strict=False), Tool("now-utc", EMPTY, strict=False))
THINK = Marks("<think>", "</think>")


class Model:
    """A tokenizer of bytes, the end, and special tokens."""

    def __init__(self, special: tuple[str, ...]) -> None:
        self.eos_token_id = EOS
        self.bos_token_id = None
        names = [text.encode() for text in ("</s>", *special)]
        self.tokens = [bytes([byte]) for byte in range(256)] + names
        self.special_token_ids = list(range(EOS, len(self.tokens)))
        self.special = {text: EOS + 1 + index for index, text in enumerate(special)}
        self._marks = re.compile("|".join(map(re.escape, special)) or "$.")
        self.tokenizer = LLTokenizer(TokenizerWrapper(self), slices=[])

    def __call__(self, text: bytes | str) -> list[int]:
        return list(text if isinstance(text, bytes) else text.encode())

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        place = 0
        for found in self._marks.finditer(text):
            ids += [*text[place : found.start()].encode(), self.special[found[0]]]
            place = found.end()
        return [*ids, *text[place:].encode()]

    def decode(self, ids: list[int]) -> str:
        return b"".join(self.tokens[token] for token in ids).decode("utf-8", "replace")

    def matcher(self, grammar: Grammar | None) -> LLMatcher:
        assert grammar is not None
        made = {
            "lark": LLMatcher.grammar_from_lark,
            "json_schema": LLMatcher.grammar_from_json_schema,
            "regex": LLMatcher.grammar_from_regex,
        }[grammar.kind](grammar.source)
        matcher = LLMatcher(self.tokenizer, made, log_level=0)
        assert not matcher.is_error(), (matcher.get_error(), grammar.source)
        return matcher


class Setting:
    """A dialect with the special tokens of a tokenizer, and what may come before."""

    def __init__(
        self, dialect: str | None, special: tuple[str, ...] = (), marks: Marks | None = None
    ) -> None:
        self.format = AnswerFormat(marks, BY_NAME[dialect] if dialect else None)
        self.model = Model(special)

    def grammar(
        self, tools: Toolset | None, content: Grammar | None = None, prompt: str = ""
    ) -> Grammar | None:
        return self.format.grammar(prompt, tools, content, self.model.special)

    def how_far(self, grammar: Grammar | None, text: str) -> tuple[str, bool]:
        """What of the text is allowed, and whether it may end there."""
        matcher, ids = self.model.matcher(grammar), self.model.encode(text)
        count = matcher.try_consume_tokens(ids)
        return self.model.decode(ids[:count]), matcher.is_accepting()

    def allows(self, grammar: Grammar | None, text: str) -> bool:
        return self.how_far(grammar, text) == (text, True)

    def read(self, tools: Toolset | None, text: str, prompt: str = "") -> WholeAnswer:
        parser = self.format.parser(prompt, tools)
        return whole([*parser.feed(text), *parser.flush()])


HARMONY = ("<|start|>", "<|channel|>", "<|message|>", "<|constrain|>", "<|end|>", "<|call|>")
SETTINGS = {
    "hermes": Setting("hermes"),
    "hermes, special": Setting("hermes", ("<tool_call>", "</tool_call>")),
    "llama3": Setting("llama3", ("<|python_tag|>",)),
    "llama3, no tag": Setting("llama3"),
    "mistral": Setting("mistral", ("[TOOL_CALLS]",)),
    "mistral, named": Setting("mistral", ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]")),
    "pythonic": Setting("pythonic"),
    "pythonic, marks": Setting("pythonic", ("<|python_start|>", "<|python_end|>")),
    "qwen_coder": Setting("qwen_coder"),
    "harmony": Setting("harmony", HARMONY),
}
CALLS = {
    "hermes": '<tool_call>\n{"name": "%s", "arguments": %s}\n</tool_call>',
    "llama3": '{"name": "%s", "parameters": %s}',
    "mistral": '[TOOL_CALLS][{"name": "%s", "arguments": %s}]',
    "mistral, named": "[TOOL_CALLS]%s[ARGS]%s",
    "harmony": "<|channel|>commentary to=functions.%s <|constrain|>json<|message|>%s",
}
JSON_SETTINGS = sorted(set(SETTINGS) - {"pythonic", "pythonic, marks", "qwen_coder"})


def call(setting: str, name: str, arguments: str) -> str:
    form = CALLS.get(setting) or CALLS[setting.partition(",")[0]]
    return form % (name, arguments)


GOOD = '{"city": "Zü\\"}", "unit": "C", "place": {"x": 3}}'
BAD = [  # and how much of it may be written
    ('{"unit": "C"', '{"'),
    ('{"city": 3', '{"city": '),
    ('{"city": "", "unit": "K"', '{"city": "", "unit": "'),
    ('{"city": "", "unit": "C", "place": {}', '{"city": "", "unit": "C", "place": {'),
    ('{"city": "", "unit": "C", "more": 1', '{"city": "", "unit": "C", "'),
]


@pytest.mark.parametrize("name", JSON_SETTINGS)
@pytest.mark.parametrize("required", [True, False])
def test_calls_obey_the_schema(name: str, required: bool) -> None:
    setting, tools = SETTINGS[name], Toolset(TOOLS, required=required)
    grammar = setting.grammar(tools)
    for tool, arguments in (("weather", GOOD), ("now-utc", "{}")):
        text = call(name, tool, arguments)
        assert setting.allows(grammar, text)
        answer = setting.read(tools, text)
        assert [(c.name, c.arguments) for c in answer.calls] == [(tool, arguments)]
    for bad, good in BAD:
        head = call(name, "weather", "{")
        head = head[: head.rindex("{")]
        allowed, _ = setting.how_far(grammar, head + bad)
        assert allowed == head + good
    for form in (call(name, "other", "{}"), call(name, "now-utc", '{"a": 1}')):
        assert not setting.allows(grammar, form)


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_free_text_beside_calls(name: str) -> None:
    setting = SETTINGS[name]
    text = "A < b, <tool, [1]: {é} 世\n\n" if name != "harmony" else ""
    free, required = setting.grammar(Toolset(TOOLS)), setting.grammar(Toolset(TOOLS, required=True))
    if name == "harmony":
        text = "<|channel|>final<|message|>A < b"
    assert setting.allows(free, text)
    assert setting.read(Toolset(TOOLS), text).content == (text if name != "harmony" else "A < b")
    assert not setting.allows(required, text)
    assert not setting.allows(required, "")


@pytest.mark.parametrize("name", JSON_SETTINGS)
def test_parallel_calls(name: str) -> None:
    setting = SETTINGS[name]
    many, one = (Toolset(TOOLS, required=True, parallel=parallel) for parallel in (True, False))
    first = call(name, "weather", GOOD)
    second = call(name, "now-utc", "{}")
    both = {
        "hermes": f"{first}\n{second}",
        "llama3": f"{first}; {second}",
        "mistral": f"{first[:-1]}, {second[len('[TOOL_CALLS][') :]}",
        "mistral, named": first + second,
        "harmony": first + second,  # its calls end the turn
    }
    text = both.get(name) or both[name.partition(",")[0]]
    assert setting.allows(setting.grammar(many), text) == (name != "harmony")
    assert not setting.allows(setting.grammar(one), text)
    assert setting.allows(setting.grammar(one), first)


@pytest.mark.parametrize("name", ["hermes", "qwen_coder", "pythonic", "mistral, named", "harmony"])
def test_not_strict(name: str) -> None:
    setting = SETTINGS[name]
    assert setting.grammar(Toolset(LOOSE)) is None
    grammar = setting.grammar(Toolset(LOOSE, required=True))
    if name == "qwen_coder":
        text = "<function=weather>\n<parameter=x>\n1\n</parameter>\n</function>"
        text = f"<tool_call>\n{text}\n</tool_call>"
    elif name == "pythonic":
        text = '[weather(x=1, y={"a": []})]'
    else:
        text = call(name, "weather", '{"anything": [1]}')
    assert setting.allows(grammar, text)
    assert not setting.allows(grammar, text.replace("weather", "other"))
    mixed = setting.grammar(Toolset((LOOSE[0], TOOLS[1])))
    assert setting.allows(mixed, text)


def test_marks_inside_of_arguments_are_text() -> None:
    """In ordinary characters; the special tokens are not allowed there."""
    setting = SETTINGS["harmony"]
    tools = Toolset(TOOLS, required=True)
    matcher = setting.model.matcher(setting.grammar(tools))
    text = call("harmony", "weather", '{"city": "<|call|>", "unit": "C"}')
    start, _, end = text.rpartition("<|call|>")
    ids = [*setting.model.encode(start), *b"<|call|>", *setting.model.encode(end)]
    assert matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()
    assert json.loads(setting.read(tools, text).calls[0].arguments)["city"] == "<|call|>"
    assert not setting.allows(setting.grammar(tools), text)
    final = "<|channel|>final<|message|>"
    matcher = setting.model.matcher(setting.grammar(Toolset(TOOLS)))
    ids = [*setting.model.encode(final), *b"<|call|>"]
    assert matcher.try_consume_tokens(ids) == len(ids) - 1


def test_ids_of_mistral_may_be_there() -> None:
    setting = SETTINGS["mistral, named"]
    grammar = setting.grammar(Toolset(TOOLS, required=True))
    text = "[TOOL_CALLS]now-utc[CALL_ID]a1B2c3D4e[ARGS]{}"
    assert setting.allows(grammar, text)
    assert [made.name for made in setting.read(Toolset(TOOLS), text).calls] == ["now-utc"]


def test_what_looks_like_a_mark_is_no_text() -> None:
    """A mark that is a special token, in ordinary characters."""
    setting = SETTINGS["mistral"]
    grammar = setting.grammar(Toolset(TOOLS))
    matcher = setting.model.matcher(grammar)
    assert matcher.try_consume_tokens([*b"see [TOOL_CALLS]"]) == len("see [TOOL_CALLS")


def test_python_calls() -> None:
    setting = SETTINGS["pythonic"]
    grammar = setting.grammar(Toolset(TOOLS, required=True))
    good = '[weather(city="O\'s", unit="F", flag=True, place={"x": 1}), now-utc()]'
    assert setting.allows(grammar, good)
    assert setting.allows(grammar, '[weather(city="", unit="C")]')
    for bad in (
        '[weather(unit="C")]',
        "[weather(city=1",
        '[weather(city="", unit="K")]',
        '[weather(city="", unit="C", place={})]',
        '[weather(city="", unit="C",)]',
        "[other()]",
        "[]",
    ):
        assert not setting.allows(grammar, bad)
    single = setting.grammar(Toolset(TOOLS, parallel=False))
    assert not setting.allows(single, good)
    optional = Tool("f", {"type": "object", "properties": {"a": {}, "b": {}, "c": {}}})
    every = setting.grammar(Toolset((optional,), required=True))
    for arguments in ("", "a=1", "b=1", "c=1", "a=1, c=1", "b=1, c=1", "a=1, b=1, c=1"):
        assert setting.allows(every, f"[f({arguments})]")
    for arguments in (", a=1", "b=1, a=1", "a=1,", "a=1, , c=1", "a=1, a=1"):
        assert not setting.allows(every, f"[f({arguments})]")
    marked = SETTINGS["pythonic, marks"]
    assert marked.allows(
        marked.grammar(Toolset(TOOLS)), "<|python_start|>[now-utc()]<|python_end|>"
    )


def test_xml_calls() -> None:
    setting = SETTINGS["qwen_coder"]
    tools = Toolset(TOOLS, required=True)
    grammar = setting.grammar(tools)

    def function(*parameters: tuple[str, str]) -> str:
        inner = "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in parameters)
        return f"<tool_call>\n<function=weather>\n{inner}</function>\n</tool_call>"

    good = function(("city", 'O"s\n</b>'), ("n", "3"), ("unit", "C"), ("place", '{"x": 1}'))
    assert setting.allows(grammar, good)
    [made] = setting.read(tools, good).calls
    assert json.loads(made.arguments) == {
        "city": 'O"s\n</b>',
        "n": 3,
        "unit": "C",
        "place": {"x": 1},
    }
    for bad in (
        function(("city", "x</parameter>y"), ("unit", "C")),
        function(("city", "x")),
        function(("city", "x"), ("unit", "K")),
        function(("city", "x"), ("n", "three"), ("unit", "C")),
        function(("city", "x"), ("unit", "C"), ("place", "{}")),
        function(("city", "x"), ("unit", "C"), ("more", "1")),
    ):
        assert not setting.allows(grammar, bad)


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_whatever_a_model_does_its_calls_are_valid(name: str) -> None:
    """Random walks; what ends is a call of a tool, with arguments that its schema allows."""
    setting, tools = SETTINGS[name], Toolset(TOOLS, required=True)
    grammar = setting.grammar(tools)
    schemas = {tool.name: tool.parameters for tool in TOOLS}
    num_ended = 0
    for seed in range(12):
        draw = random.Random(seed)
        matcher, ids = setting.model.matcher(grammar), list[int]()
        while not matcher.is_stopped() and len(ids) < 1500:
            bits = matcher.compute_bitmask()
            allowed = [i for i in range(len(setting.model.tokens)) if bits[i // 8] >> i % 8 & 1]
            assert allowed
            # A model that never ended a string would prove nothing.
            ends = [token for token in allowed if token >= EOS or chr(token) in '"}])</\n,:']
            token = draw.choice(ends if ends and draw.random() < 0.7 else allowed)
            if token == EOS:
                break
            ids.append(token)
            matcher.consume_token(token)
        if len(ids) < 1500:
            num_ended += 1
            answer = setting.read(tools, setting.model.decode(ids))
            assert answer.calls and not answer.content
            for made in answer.calls:
                jsonschema.validate(json.loads(made.arguments), schemas[made.name])
    assert num_ended >= 3


@pytest.mark.parametrize("special", [(), ("<think>", "</think>")])
def test_reasoning_comes_first(special: tuple[str, ...]) -> None:
    setting = Setting("hermes", special, THINK)
    tools = Toolset(TOOLS, required=True)
    made = call("hermes", "now-utc", "{}")
    thought = "I could <tool_call>, but {\n</think>\n\n"
    for prompt, begins in (("assistant\n<think>\n", ""), ("assistant\n", "<think>\n")):
        text = begins + thought + made
        assert setting.allows(setting.grammar(tools, prompt=prompt), text)
        answer = setting.read(tools, text, prompt)
        assert answer.reasoning == "I could <tool_call>, but {"
        assert (answer.content, len(answer.calls)) == ("", 1)
        free = setting.grammar(Toolset(TOOLS), prompt=prompt)
        assert setting.allows(free, begins + thought + "No call.")
        assert not setting.allows(free, begins + thought + "Call: <tool_call>")
    closed = "<think>\n\n</think>\n\n"
    assert setting.allows(setting.grammar(tools, prompt=closed), made)
    assert not setting.allows(setting.grammar(tools, prompt=closed), begins + thought + made)
    assert setting.allows(setting.grammar(tools, prompt="assistant\n"), made)


NUMBER = Grammar("json_schema", '{"type": "integer"}')


def test_content_that_is_constrained() -> None:
    hermes, harmony = SETTINGS["hermes"], SETTINGS["harmony"]
    made = call("hermes", "now-utc", "{}")
    either = hermes.grammar(Toolset(TOOLS), NUMBER)
    assert hermes.allows(either, "12") and hermes.allows(either, made)
    assert not hermes.allows(either, "twelve")
    assert hermes.grammar(None, NUMBER) is NUMBER
    pattern = hermes.grammar(Toolset(TOOLS), Grammar("regex", r"a/b\/c|\\"))
    assert hermes.allows(pattern, "a/b/c") and hermes.allows(pattern, "\\")
    thinks = Setting(None, (), THINK)
    after = thinks.grammar(None, NUMBER, "<think>\n")
    assert thinks.allows(after, "Hm.\n</think>\n\n12") and not thinks.allows(after, "12")
    maybe = thinks.grammar(None, NUMBER)
    assert thinks.allows(maybe, "<think>Hm.</think>12") and thinks.allows(maybe, "12")
    lark = Grammar("lark", 'start: "a"')
    assert thinks.grammar(None, lark) is lark
    with pytest.raises(RequestError, match="cannot be combined"):
        thinks.grammar(None, lark, "<think>\n")
    final = harmony.grammar(None, NUMBER)
    text = "<|channel|>analysis<|message|>x<|end|><|start|>assistant<|channel|>final<|message|>"
    assert harmony.allows(final, text + "12") and not harmony.allows(final, text + "x")
    assert not harmony.allows(final, call("harmony", "now-utc", "{}"))
    with pytest.raises(RequestError, match="cannot be combined"):
        hermes.grammar(Toolset(TOOLS), lark)


def test_nothing_to_enforce() -> None:
    assert SETTINGS["hermes"].grammar(None) is None
    assert Setting(None, (), THINK).grammar(None) is None
    assert SETTINGS["harmony"].grammar(None) is None
    assert SETTINGS["hermes"].grammar(Toolset(LOOSE, parallel=False)) is not None


COMMON = ["\n", " ", "text", "weather", "now-utc", "<think>", "</think>", "{}"]
OBJECT = [
    '{"name": "',
    '", "arguments": ',
    '", "parameters": ',
    '{"city": "',
    '", "unit": "C"}',
    "}",
]
PIECES = {
    "hermes": ["<tool_call>", "</tool_call>", *OBJECT],
    "llama3": ["<|python_tag|>", "; ", *OBJECT],
    "mistral": ["[TOOL_CALLS]", "[ARGS]", "[", "]", ", ", *OBJECT],
    "pythonic": [
        "<|python_start|>", "<|python_end|>", "[", "]", ", ", "(", ")", 'city="', '", unit="C"',
    ],
    "qwen_coder": [
        "<tool_call>", "</tool_call>", "<function=", "</function>", ">", "</parameter>",
        "<parameter=city>", "<parameter=unit>", "C",
    ],
    "harmony": [
        "<|start|>", "assistant", "<|channel|>", "analysis", "final", "<|message|>", "<|end|>",
        "<|call|>", "commentary to=functions.", "<|constrain|>", "json", *OBJECT,
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(SETTINGS))
@pytest.mark.parametrize("marks", [None, THINK])
def test_a_free_answer_has_no_call_that_is_not_valid(name: str, marks: Marks | None) -> None:
    """Walks of a model that knows the marks, as special tokens and as ordinary characters."""
    setting, tools = SETTINGS[name], Toolset(TOOLS)
    format = AnswerFormat(None if name == "harmony" else marks, setting.format.dialect)
    grammar = format.grammar("", tools, None, setting.model.special)
    schemas = {tool.name: tool.parameters for tool in TOOLS}
    pieces = COMMON + PIECES[name.partition(",")[0]]
    num_calls = 0
    for seed in range(40):
        draw = random.Random(seed)
        matcher, ids = setting.model.matcher(grammar), list[int]()
        for _ in range(200):
            piece = draw.choice(pieces)
            tokens = setting.model.encode(piece) if draw.random() < 0.8 else [*piece.encode()]
            count = matcher.try_consume_tokens(tokens)
            ids += tokens[:count]
            if matcher.is_stopped():
                break
        parser = format.parser("", tools)
        answer = whole([*parser.feed(setting.model.decode(ids)), *parser.flush()])
        is_whole = matcher.is_accepting()  # else it was cut off
        assert parser.num_failed_calls <= (not is_whole), setting.model.decode(ids)
        num_calls += len(answer.calls)
        for made in answer.calls if is_whole else answer.calls[:-1]:
            jsonschema.validate(json.loads(made.arguments), schemas[made.name])
    assert num_calls > 0

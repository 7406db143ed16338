"""Masks and the sampler under a grammar: real tokenizers, and logits that want something else."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from server_fakes import EOS, VOCAB_SIZE, byte_text_model
from torch import Tensor

from quantd.daemon.text import TextModel
from quantd.daemon.types import (
    CompileGrammar,
    Grammar,
    GrammarCompiled,
    NewSequence,
    Sampled,
    SamplingParams,
    TokenTable,
)
from quantd.daemon.worker.grammar import Constraint, Grammars
from quantd.daemon.worker.sampler import Sampler, SampleRow

DEMO = Path(__file__).parents[2] / "daemon" / "embedded" / "demo"
MAX_TOKENS = 300
Want = Callable[[int], Tensor]
"""The logits [V] of a step, as the model would have them."""


class Decoding:
    """Sequences through Grammars and the sampler, as the runner has them, without a model."""

    def __init__(
        self, text: TextModel, vocab_size: int | None = None, own_seconds: float = 0.0
    ) -> None:
        self.text = text
        self.vocab_size = vocab_size or text.vocab_size
        self.grammars = Grammars(self.vocab_size, own_seconds)
        self.grammars.set_table(text.token_table())
        self.sampler = Sampler(self.vocab_size)

    def open(self, row: SampleRow) -> Constraint | None:
        new = NewSequence(row.seq, tuple(row.tokens), row.num_prompt_tokens, row.sampling)
        return self.grammars.open(new)

    def step(
        self, rows: Sequence[tuple[SampleRow, Constraint | None]], logits: Tensor
    ) -> list[Sampled]:
        constraints = [constraint for _, constraint in rows]
        masks = self.grammars.wait(constraints)
        sampled = self.sampler.sample(logits, [row for row, _ in rows], masks)
        said = self.grammars.advance(constraints, sampled)
        for (row, _), item in zip(rows, said, strict=True):
            row.tokens.append(item.token)
        return said

    def run(self, grammar: Grammar, want: Want, **fields: Any) -> tuple[str, bytes, list[int]]:
        """(how it ended, the text, its tokens)"""
        fields = {"max_tokens": MAX_TOKENS, "stop_token_ids": self.text.eos_token_ids} | fields
        row = SampleRow(1, SamplingParams(grammar=grammar, **fields), [0], 1)
        constraint = self.open(row)
        for number in range(row.sampling.max_tokens):
            (item,) = self.step([(row, constraint)], want(number)[None])
            if item.error is not None:
                return item.error, b"", row.tokens[1:-1]
            if item.token in row.sampling.stop_token_ids and not item.complete:
                return "stop", self.bytes_of(row.tokens[1:-1]), row.tokens[1:-1]
            if item.complete:
                return "stop", self.bytes_of(row.tokens[1:]), row.tokens[1:]
        return "length", self.bytes_of(row.tokens[1:]), row.tokens[1:]

    def bytes_of(self, tokens: Sequence[int]) -> bytes:
        return b"".join(map(self.text.token_bytes, tokens))

    def allowed(
        self, grammar: Grammar, output: Sequence[int] = (), stop: Sequence[int] | None = None
    ) -> set[int]:
        stop = self.text.eos_token_ids if stop is None else stop
        params = SamplingParams(9, grammar=grammar, stop_token_ids=tuple(stop))
        masks = self.grammars.wait([self.open(SampleRow(1, params, [0, *output], 1))])
        return allowed_by(masks[0], self.vocab_size)


def allowed_by(bits: Any, vocab_size: int) -> set[int]:
    return {i for i in range(vocab_size) if int(bits[i // 32]) >> (i % 32) & 1}


@pytest.fixture(scope="module", params=[0.0, 1e-9], ids=["beside", "first eight by itself"])
def demo(request: pytest.FixtureRequest) -> Iterator[Decoding]:
    """Both ways of making masks."""
    decoding = Decoding(TextModel.load(DEMO), own_seconds=request.param)
    yield decoding
    decoding.grammars.close()


@pytest.fixture(scope="module")
def letters() -> Iterator[Decoding]:
    """One token per byte."""
    decoding = Decoding(byte_text_model(), VOCAB_SIZE)
    yield decoding
    decoding.grammars.close()


def of(schema: Any) -> Grammar:
    return Grammar("json_schema", json.dumps(schema))


def noise(decoding: Decoding, seed: int) -> Want:
    generator = torch.Generator().manual_seed(seed)
    return lambda number: torch.randn(decoding.vocab_size, generator=generator) * 4


def prefers(decoding: Decoding, liked: bytes, *, less: float = 0.0) -> Want:
    """Whatever is made of these bytes alone, the longer the better; never an end by itself."""
    pieces = [decoding.text.token_bytes(i) for i in range(decoding.vocab_size)]
    row = torch.tensor(
        [
            50.0 + len(p) if p and set(p) <= set(liked) else less - 0.001 * i
            for i, p in enumerate(pieces)
        ]
    )
    for token in decoding.text.eos_token_ids:
        row[token] = -60.0
    return lambda number: row


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b\u00e9", "\u4e16"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
TREE = {
    "$ref": "#/$defs/node",
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "v": {"type": "boolean"},
                "kids": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 1},
            },
            "required": ["v"],
            "additionalProperties": False,
        }
    },
}
SCHEMAS: dict[str, Any] = {
    "person": PERSON,
    "nested": {"type": "object", "properties": {"p": PERSON, "q": PERSON}, "required": ["p", "q"]},
    "tree": TREE,
    "enum of 300": {"enum": [f"value {i}" for i in range(300)]},
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3,5}$"},
    "unicode": {"type": "string", "pattern": "^[\u00e0-\u00ff\u4e00-\u9fff]{2,4}$"},
    "either": {"anyOf": [{"type": "null"}, {"type": "boolean"}, {"const": [1, {"a": "b"}]}]},
    "more": {"type": "object", "additionalProperties": {"type": "boolean"}, "maxProperties": 2},
    "tuple": {"type": "array", "prefixItems": [{"const": 1}, {"type": "null"}], "items": False},
    "date": {"type": "string", "format": "date"},
    "uuid": {"type": "string", "format": "uuid"},
    "number": {"type": "number", "multipleOf": 0.5, "minimum": 0, "maximum": 20},
    "all": {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 7}]},
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_whatever_the_model_wants_the_output_validates(demo: Decoding, name: str) -> None:
    schema = SCHEMAS[name]
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    validator = jsonschema.Draft202012Validator(schema, format_checker=checker)
    wants = [noise(demo, seed) for seed in range(6)]
    wants += [prefers(demo, b"0123456789"), prefers(demo, b" \n\t\r"), prefers(demo, b'"')]
    wants += [prefers(demo, b"}]"), prefers(demo, b"{["), prefers(demo, bytes(range(0x80, 0x100)))]
    ends = []
    for want in wants:
        how, text, _ = demo.run(of(schema), want, temperature=1.0, seed=7)
        ends.append(how)
        if how == "stop":
            validator.validate(json.loads(text))
        else:
            assert how == "length"
    assert ends.count("stop") >= 6, ends


def test_spaces_come_to_an_end(demo: Decoding) -> None:
    schema = {**PERSON, "properties": {**PERSON["properties"], "name": {"const": "x"}}}
    how, text, tokens = demo.run(of(schema), prefers(demo, b" \n\t\r"), max_tokens=2000)
    assert how == "stop"
    assert b"\n" + b" " * 8 in text
    longest = max(len(space) for space in re.findall(rb"[ \n\t\r]+", text))
    assert longest <= 34
    json.loads(text)


def test_what_has_no_end_ends_with_max_tokens(demo: Decoding) -> None:
    how, text, tokens = demo.run(of({"type": "string"}), prefers(demo, b"a"), max_tokens=40)
    assert (how, len(tokens)) == ("length", 40)
    assert text.startswith(b'"') and text.endswith(b"a" * 20)


def test_any_object_and_key_order(demo: Decoding) -> None:
    how, text, _ = demo.run(of({"type": "object"}), prefers(demo, b"}"), temperature=0.0)
    assert (how, text) == ("stop", b"{}")
    schema = {
        "properties": {k: {"const": 1} for k in "zay"},
        "required": list("zay"),
        "type": "object",
    }
    _, text, _ = demo.run(of(schema), noise(demo, 1), temperature=0.0)
    assert list(json.loads(text)) == list("zay")


@pytest.mark.parametrize("pattern", ["(ab|abc)(c|cd)*", "a{0,3}", "[0-9]+", "x|xy|xyz"])
def test_an_end_is_allowed_exactly_where_the_grammar_is_satisfied(
    letters: Decoding, pattern: str
) -> None:
    """Every text of up to four letters that the masks allow, against Python's re."""
    grammar = Grammar("regex", pattern)
    todo: list[tuple[int, ...]] = [()]
    seen = 0
    while todo:
        output = todo.pop()
        seen += 1
        text = bytes(output).decode()
        allowed = letters.allowed(grammar, output) if _goes_on(letters, grammar, output) else {EOS}
        assert (EOS in allowed) == (re.fullmatch(pattern, text) is not None), text
        if len(output) < 4:
            todo += [(*output, token) for token in sorted(allowed - {EOS})[:3]]
    assert seen >= 4


def _goes_on(decoding: Decoding, grammar: Grammar, output: Sequence[int]) -> bool:
    """Its last token does not complete the grammar."""
    params = SamplingParams(9, grammar=grammar, stop_token_ids=(EOS,))
    constraint = decoding.open(SampleRow(1, params, [0, *output[:-1]], 1))
    if not output:
        return True
    assert constraint is not None
    decoding.grammars.wait([constraint])
    return not decoding.grammars.advance([constraint], [Sampled(1, output[-1])])[0].complete


def test_no_special_token_inside_and_no_end_that_would_not_end(demo: Decoding) -> None:
    special = demo.text.vocabulary.special
    ends = set(demo.text.eos_token_ids)
    inside = demo.allowed(of({"type": "string"}), demo.text.encode('"a', add_special_tokens=False))
    assert inside and not inside & special
    done = demo.text.encode("12", add_special_tokens=False)
    assert ends <= demo.allowed(of({"type": "integer"}), done)
    assert not ends & demo.allowed(of({"type": "integer"}), done, stop=())


def test_without_any_stop_token_a_complete_grammar_ends_it(demo: Decoding) -> None:
    how, text, _ = demo.run(of(PERSON), noise(demo, 3), temperature=1.0, stop_token_ids=())
    assert how == "stop"
    jsonschema.validate(json.loads(text), PERSON)


def test_min_tokens_lengthens_what_can_go_on_and_yields_to_what_cannot(letters: Decoding) -> None:
    row = torch.zeros(VOCAB_SIZE)
    row[EOS] = 10.0
    how, text, _ = letters.run(Grammar("regex", "a+"), lambda _: row, min_tokens=5, temperature=0.0)
    assert (how, text) == ("stop", b"aaaaa")
    how, text, _ = letters.run(
        Grammar("regex", "a{1,3}"), lambda _: row, min_tokens=9, temperature=0.0
    )
    assert (how, text) == ("stop", b"aaa")


def test_characters_of_several_bytes_are_whole(letters: Decoding) -> None:
    for seed in range(5):
        want = noise(letters, seed)
        high = torch.zeros(VOCAB_SIZE)
        high[0x80:0x100] = 30.0
        mixed: Want = lambda number, want=want, high=high: want(number) + high  # noqa: E731
        schema = {"type": "string", "maxLength": 9, "minLength": 5}
        how, text, _ = letters.run(of(schema), mixed, temperature=1.0, seed=seed)
        assert how == "stop"
        decoded = json.loads(text.decode("utf-8"))
        assert 5 <= len(decoded) <= 9 and max(decoded) > "\x7f"


def test_escaped_surrogates_come_in_pairs(letters: Decoding) -> None:
    for seed in range(20):
        want = noise(letters, seed)
        liked = torch.zeros(VOCAB_SIZE)
        liked[[ord(c) for c in "\\uDdcCdD8"]] = 20.0
        mixed: Want = lambda number, want=want, liked=liked: want(number) + liked  # noqa: E731
        how, text, _ = letters.run(of({"type": "string", "maxLength": 4}), mixed, seed=seed)
        if how == "stop":
            json.loads(text).encode("utf-8")  # a lone surrogate would raise


# --- beside other fields -----------------------------------------------------------------------


def test_the_mask_wins_over_bias_and_penalties(letters: Decoding) -> None:
    fields = {"logit_bias": ((ord("x"), 100.0), (ord("b"), 5.0)), "temperature": 0.0}
    flat: Want = lambda number: torch.zeros(VOCAB_SIZE)  # noqa: E731
    assert letters.run(Grammar("regex", "[ab]{3}"), flat, **fields)[1] == b"bbb"
    fields |= {"repetition_penalty": 0.1, "frequency_penalty": -2.0, "presence_penalty": -2.0}
    assert letters.run(Grammar("regex", "[ab]{3}"), flat, **fields)[1] == b"bbb"


def test_masks_meet_and_what_they_leave_is_filtered(letters: Decoding) -> None:
    grammar = Grammar("regex", "[a-d]{2}")
    want = noise(letters, 0)
    fields = {"allowed_token_ids": (ord("c"), ord("x")), "temperature": 1.0, "top_k": 1}
    assert letters.run(grammar, want, **fields)[1] == b"cc"
    assert letters.run(grammar, want, bad_words=((97,), (98,), (99,)), min_p=0.1)[1] == b"dd"


def test_where_nothing_is_left_the_sequence_ends_with_an_error(letters: Decoding) -> None:
    how, _, tokens = letters.run(
        Grammar("regex", "ab"), noise(letters, 0), allowed_token_ids=(ord("a"), ord("x"))
    )
    assert "no token may be sampled" in how and "the grammar" in how
    assert tokens == [ord("a")]


def test_log_probabilities_are_of_the_raw_distribution(letters: Decoding) -> None:
    raw = noise(letters, 5)(0)
    params = SamplingParams(9, temperature=0.0, logprobs=2, grammar=Grammar("regex", "q+"))
    row = SampleRow(1, params, [0], 1)
    (item,) = letters.step([(row, letters.open(row))], raw[None])
    assert item.token == ord("q") and item.logprob is not None
    expected = raw.log_softmax(-1)
    assert item.logprob.logprob == pytest.approx(float(expected[ord("q")]), abs=1e-5)
    assert item.logprob.top[0][0] == int(expected.argmax())


# --- several, and again --------------------------------------------------------------------------


def test_a_row_depends_on_nothing_beside_it(demo: Decoding) -> None:
    """A hundred different grammars, every third row free, in one batch and one by one."""
    rows, alone = [], []
    for i in range(100):
        schema = {
            "type": "object",
            "properties": {f"k{i}": {"type": "integer"}},
            "required": [f"k{i}"],
        }
        grammar = None if i % 3 == 2 else of(schema)
        params = SamplingParams(50, seed=i, temperature=float(i % 2), grammar=grammar)
        rows.append(SampleRow(i, params, [0], 1))
        alone.append(SampleRow(i, params, [0], 1))
    logits = torch.stack([noise(demo, i)(0) for i in range(100)])
    batch = [(row, demo.open(row)) for row in rows]
    lone = [(row, demo.open(row)) for row in alone]
    for step in range(12):
        together = demo.step(batch, logits.roll(step, 1))
        apart = [
            demo.step([pair], logits[i : i + 1].roll(step, 1))[0] for i, pair in enumerate(lone)
        ]
        going = [i for i, item in enumerate(together) if item.error is None]
        assert [together[i] for i in going] == [apart[i] for i in going]
    assert demo.grammars.take_timing().num_masks > 0
    assert demo.grammars.take_timing().num_masks == 0


def test_a_sequence_that_comes_back_goes_on_as_it_would_have(demo: Decoding) -> None:
    how, text, tokens = demo.run(of(PERSON), noise(demo, 2), temperature=1.0)
    assert how == "stop"
    params = SamplingParams(MAX_TOKENS, grammar=of(PERSON), stop_token_ids=demo.text.eos_token_ids)
    row = SampleRow(1, params, [0], 1)
    constraint = demo.open(row)
    for i, token in enumerate(tokens):
        masks = demo.grammars.wait([constraint])
        again = demo.allowed(of(PERSON), tokens[:i])
        assert allowed_by(masks[0], demo.vocab_size) == again
        assert token in again
        assert constraint is not None
        (said,) = demo.grammars.advance([constraint], [Sampled(1, token)])
        assert said.complete == (i == len(tokens) - 1)


def test_what_a_plan_in_flight_samples_after_the_end_is_an_error(letters: Decoding) -> None:
    row = SampleRow(1, SamplingParams(9, grammar=Grammar("regex", "a")), [0], 1)
    pair = (row, letters.open(row))
    (first,) = letters.step([pair], torch.zeros(1, VOCAB_SIZE))
    assert first.complete
    (second,) = letters.step([pair], torch.zeros(1, VOCAB_SIZE))
    assert second.error is not None and not second.complete


def test_an_output_that_is_none_of_the_grammars_ends_only_its_own(letters: Decoding) -> None:
    params = SamplingParams(9, grammar=Grammar("regex", "a+"))
    bad, good = SampleRow(1, params, [0, ord("z")], 1), SampleRow(2, params, [0], 1)
    said = letters.step(
        [(bad, letters.open(bad)), (good, letters.open(good))], torch.zeros(2, VOCAB_SIZE)
    )
    assert said[0].error is not None and said[1].error is None
    assert said[1].token == ord("a")


def test_a_dead_end_is_the_requests_own_fault(letters: Decoding) -> None:
    """Or clients would send it again, and again."""
    endless = {"a": {"$ref": "#/$defs/r"}}
    schema = {"type": "object", "properties": endless, "$defs": {"r": {"$ref": "#/$defs/r"}}}
    assert letters.run(of(schema), prefers(letters, b"{}"))[1] == b"{}"
    row = SampleRow(1, SamplingParams(9, grammar=of(schema)), [0, *b'{"a":'], 1)
    (said,) = letters.step([(row, letters.open(row))], torch.zeros(1, VOCAB_SIZE))
    assert said.is_excluded and "nothing may follow" in (said.error or "")


def test_compiling_beside_the_steps(demo: Decoding) -> None:
    answers: list[GrammarCompiled] = []
    demo.grammars.compile(CompileGrammar(1, of(PERSON)), answers.append)
    demo.grammars.compile(CompileGrammar(2, Grammar("lark", "start: <nothing>")), answers.append)
    demo.grammars.compile(CompileGrammar(3, Grammar("lark", "start: <[3]>")), answers.append)
    demo.grammars.compile(CompileGrammar(4, of({"$ref": "#"})), answers.append)
    demo.grammars._compiler.submit(lambda: None).result()
    assert [answer.id for answer in answers] == [1, 2, 3, 4]
    assert answers[0].error is None
    assert "nothing" in (answers[1].error or "")
    assert answers[2].error is None  # special tokens may be named
    assert answers[3].error is not None


def test_a_model_without_any_end(letters: Decoding) -> None:
    table = letters.text.token_table()
    grammars = Grammars(VOCAB_SIZE)
    grammars.set_table(TokenTable(table.pieces, table.special, ()))
    sampler, tokens = Sampler(VOCAB_SIZE), [0]
    params = SamplingParams(9, grammar=Grammar("regex", "ab"))
    constraint = grammars.open(NewSequence(1, (0,), 1, params))
    for _ in range(2):
        masks = grammars.wait([constraint])
        row = SampleRow(1, params, tokens, 1)
        (said,) = grammars.advance(
            [constraint], sampler.sample(torch.zeros(1, VOCAB_SIZE), [row], masks)
        )
        tokens.append(said.token)
    assert (bytes(tokens[1:]), said.complete) == (b"ab", True)
    grammars.close()

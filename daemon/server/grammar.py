"""From a body's fields to what constrains the output, and whether that can be followed.

Two steps, as for all fields: `read_grammar` is quick and needs no library; `GrammarCheck` asks the
library, on a thread, still before a cold model is loaded.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from fractions import Fraction
from functools import partial
from typing import NamedTuple

import msgspec

from quantd.daemon.errors import RequestError
from quantd.daemon.grammar import SeenGrammars, on_deep_stack, problem
from quantd.daemon.server.limits import CHOICE_STRINGS
from quantd.daemon.server.schemas import GenerationBody, Json
from quantd.daemon.types import Grammar

MAX_MULTIPLE = 1_000_000
"""Of the least common multiple of all that `multipleOf` asks for: a grammar's automaton has so many
states, and takes some 3 microseconds for each."""

_REGEX_MARKS = frozenset(r"\.+*?()|[]{}^$#&-~")
_UNSERVED_OPTIONS = (
    "structural_tag",
    "disable_any_whitespace",
    "disable_additional_properties",
    "whitespace_pattern",
)


class FieldGrammar(NamedTuple):
    grammar: Grammar
    field: str
    """Where the body says so, for errors."""


def read_grammar(body: GenerationBody) -> FieldGrammar | None:
    """Raises RequestError for what is malformed, and for two fields that both constrain."""
    found = [*_response_format(body.response_format), *_structured(body.structured_outputs)]
    for name, read in _GUIDED.items():
        value = getattr(body, f"guided_{name}")
        if value is not None:
            field = f"guided_{name}"
            found.append(FieldGrammar(read(field, value), field))
    if len(found) > 1:
        raise RequestError(
            f"{found[0].field} and {found[1].field} both constrain the output; give one of them",
            param=found[1].field,
        )
    return found[0] if found else None


def schema_source(field: str, schema: Json) -> str:
    """A schema as the source of a grammar; "lark" may hold it after %json. Raises RequestError."""
    if not isinstance(schema, dict):
        raise RequestError(f"{field} must be a JSON schema as an object", param=field)
    if _common_multiple(schema) > MAX_MULTIPLE:
        raise RequestError(
            f"{field}: the least common multiple of all multipleOf, in units of the smallest "
            f"decimal place, is over the limit of {MAX_MULTIPLE}",
            param=field,
        )
    return msgspec.json.encode(schema).decode()


class GrammarCheck:
    """Whether grammars can be followed, as far as that does not depend on the model. The last
    thousand that could are remembered. Event loop only."""

    def __init__(self) -> None:
        self._good = SeenGrammars()

    async def __call__(self, given: FieldGrammar) -> None:
        """Raises RequestError that names the field, and the keyword or place in it."""
        if given.grammar in self._good:
            return
        check = partial(on_deep_stack, partial(problem, given.grammar))
        reason = await asyncio.to_thread(check)
        if reason is not None:
            raise unusable(given.field, reason)
        self._good.add(given.grammar)


def unusable(field: str, reason: str) -> RequestError:
    return RequestError(f"{field} cannot be followed: {reason}", param=field)


def _response_format(value: Json) -> Iterator[FieldGrammar]:
    if value is None:
        return
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "text":
        return
    if kind == "json_object":
        yield FieldGrammar(_ANY_OBJECT, "response_format")
    elif kind == "json_schema":
        yield _named_schema(value.get("json_schema"))
    else:
        raise RequestError(
            "response_format must be an object whose type is text, json_object or json_schema",
            param="response_format",
        )


def _named_schema(value: Json) -> FieldGrammar:
    """OpenAI's {name, schema, strict, description}; without a schema any object will do."""
    field = "response_format.json_schema"
    if not isinstance(value, dict):
        raise RequestError(f"{field} must be an object with name and schema", param=field)
    if not isinstance(value.get("name"), str):
        raise RequestError(f"{field}.name: this field is required", param=f"{field}.name")
    schema = value.get("schema")
    if schema is None:
        return FieldGrammar(_ANY_OBJECT, field)
    field += ".schema"
    return FieldGrammar(_json(field, schema), field)


def _structured(value: Json) -> Iterator[FieldGrammar]:
    """vLLM's object with one of json, regex, choice, grammar and json_object."""
    if value is None:
        return
    field = "structured_outputs"
    if not isinstance(value, dict):
        raise RequestError(f"{field} must be an object", param=field)
    for option in _UNSERVED_OPTIONS:
        if value.get(option):
            param = f"{field}.{option}"
            raise RequestError(
                f"{param} is not supported by this server",
                param=param,
                code="unsupported_parameter",
            )
    found = [
        FieldGrammar(read(f"{field}.{name}", value[name]), f"{field}.{name}")
        for name, read in _GUIDED.items()
        if value.get(name) is not None
    ]
    if value.get("json_object"):
        found.append(FieldGrammar(_ANY_OBJECT, f"{field}.json_object"))
    if len(found) != 1:
        names = ", ".join(given.field.partition(".")[2] for given in found) or "none"
        raise RequestError(
            f"{field} must have one of json, json_object, regex, choice and grammar; got {names}",
            param=field,
        )
    yield found[0]


def _json(field: str, value: Json) -> Grammar:
    """A schema, also as its text, as vLLM takes it."""
    if isinstance(value, str):
        try:
            value = msgspec.json.decode(value)
        except (msgspec.DecodeError, RecursionError) as error:
            raise RequestError(f"{field} is no JSON: {error}", param=field) from None
    return Grammar("json_schema", schema_source(field, value))


def _regex(field: str, value: Json) -> Grammar:
    return Grammar("regex", _text(field, value))


def _choice(field: str, value: Json) -> Grammar:
    strings = value if isinstance(value, list) else []
    if not strings or not all(isinstance(string, str) and string for string in strings):
        raise RequestError(f"{field} must be a list of strings, none of them empty", param=field)
    if len(strings) > CHOICE_STRINGS:
        raise RequestError(
            f"{field} has {len(strings)} strings; the limit is {CHOICE_STRINGS}", param=field
        )
    return Grammar("regex", "|".join(map(_escaped, dict.fromkeys(strings))))


def _grammar(field: str, value: Json) -> Grammar:
    """Lark, or llama.cpp's GBNF, which is told by its "::="."""
    source = _text(field, value)
    return Grammar("gbnf" if "::=" in source else "lark", source)


def _text(field: str, value: Json) -> str:
    if not isinstance(value, str) or not value:
        raise RequestError(f"{field} must be a string that is not empty", param=field)
    return value


def _escaped(string: str) -> str:
    """For Rust's regular expressions, where some letters and < > mean something when escaped."""
    return "".join("\\" + char if char in _REGEX_MARKS else char for char in string)


def _common_multiple(schema: Json) -> int:
    """Of all that multipleOf asks for, in units of the smallest decimal place; no further than
    past the limit."""
    values: list[Fraction] = []
    todo = [schema]
    while todo:
        item = todo.pop()
        if isinstance(item, dict):
            value = item.get("multipleOf")
            if isinstance(value, bool):  # which is an int to Python
                value = None
            if isinstance(value, int | float) and value > 0 and math.isfinite(value):
                values.append(Fraction(str(value)))
            todo += item.values()
        elif isinstance(item, list):
            todo += item
    unit = _lcm(value.denominator for value in values)
    return max(unit, _lcm(int(value * unit) for value in values))


def _lcm(numbers: Iterable[int]) -> int:
    """As soon as it is past the limit, that will do: it may grow to any length."""
    common = 1
    for number in numbers:
        common = math.lcm(common, number)
        if common > MAX_MULTIPLE:
            break
    return common


_ANY_OBJECT = Grammar("json_schema", '{"type":"object"}')
_GUIDED: Mapping[str, Callable[[str, Json], Grammar]] = {
    "json": _json,
    "regex": _regex,
    "choice": _choice,
    "grammar": _grammar,
}

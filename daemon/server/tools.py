"""Tools from a body's fields: what is declared, what may be called, and what the prompt shows."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from quantd.daemon.errors import RequestError
from quantd.daemon.server.grammar import FieldGrammar, schema_source
from quantd.daemon.server.limits import TOOL_NAME, TOOLS
from quantd.daemon.server.schemas import Json
from quantd.daemon.text.format import AnswerFormat
from quantd.daemon.text.tools import Tool, Toolset
from quantd.daemon.types import Grammar

_NAME = re.compile(TOOL_NAME)
_NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}


class Declared(NamedTuple):
    """One tool of a body."""

    tool: Tool
    shown: Mapping[str, Json]
    """As the chat template gets it."""
    field: str
    """Where its schema is, for errors."""


class ToolChoice(NamedTuple):
    mode: Literal["none", "auto", "required"]
    names: tuple[str, ...] | None = None
    """Only these may be called; None: all."""


@dataclass(frozen=True, slots=True)
class ToolRequest:
    """Tools that one request offers, of which some may be called. With the choice "none" there is
    no ToolRequest: the model does not see the tools, and nothing is taken for a call."""

    toolset: Toolset
    shown: tuple[Mapping[str, Json], ...]
    fields: tuple[str, ...]
    """Where the schemas of the toolset's tools are."""

    def schemas(self) -> list[FieldGrammar]:
        """Those that arguments are held to, to be checked before a model is there."""
        return [
            FieldGrammar(Grammar("json_schema", schema_source(field, tool.parameters)), field)
            for tool, field in zip(self.toolset.tools, self.fields, strict=True)
            if tool.strict
        ]

    def check(self, format: AnswerFormat) -> None:
        """Raises RequestError when a model with this format cannot serve it."""
        dialect = format.dialect
        if dialect is None:
            raise RequestError(
                "this model's chat template takes no tools, or has calls written in a way that is "
                'not known; "tool_dialect" in its configuration can say how it writes them',
                param="tools",
                code="unsupported_parameter",
            )
        for tool, field in zip(self.toolset.tools, self.fields, strict=True):
            reason = dialect.refusal(tool) if tool.strict else None
            if reason is not None:
                raise RequestError(
                    f"{field} cannot be followed: {reason}, in the way that this model writes "
                    'calls; with "strict": false its arguments are any JSON object',
                    param=field,
                )


def read_tools(
    tools: Sequence[Mapping[str, Json]] | None, choice: Json = None, parallel: bool | None = None
) -> ToolRequest | None:
    """Of a chat body's fields. Raises RequestError that names the field."""
    declared = [_declared(entry, f"tools[{i}]") for i, entry in enumerate(tools or ())]
    return request(declared, _choice(choice, declared), parallel=parallel is not False)


def request(
    declared: Sequence[Declared], choice: ToolChoice, *, parallel: bool
) -> ToolRequest | None:
    """What any API's tools and choice come to. Raises RequestError."""
    if len(declared) > TOOLS.high:
        raise RequestError(
            f"tools has {len(declared)} tools; the limit is {TOOLS.high}", param="tools"
        )
    by_name: dict[str, Declared] = {}
    for one in declared:
        if one.tool.name in by_name:
            field = one.field.removesuffix("parameters") + "name"
            raise RequestError(f"{field}: {one.tool.name!r} is declared twice", param=field)
        by_name[one.tool.name] = one
    names = by_name.keys() if choice.names is None else choice.names
    for name in names:
        if name not in by_name:
            raise RequestError(
                f"tool_choice names {name!r}, which is not among the tools", param="tool_choice"
            )
    if choice.mode == "none" or not declared:
        return None
    callable_ = [by_name[name] for name in dict.fromkeys(names)]
    return ToolRequest(
        Toolset(tuple(one.tool for one in callable_), choice.mode == "required", parallel),
        tuple(one.shown for one in declared),
        tuple(one.field for one in callable_),
    )


def read_function(function: Mapping[str, Json], where: str) -> tuple[Tool, str]:
    """name, parameters and strict of an object that is at `where`; and where its schema is."""
    name = function.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise RequestError(
            f"{where}.name must be 1 to 128 letters, digits or _ . -, got {_shown(name)}",
            param=f"{where}.name",
        )
    strict = function.get("strict")
    if strict is not None and not isinstance(strict, bool):
        raise RequestError(
            f"{where}.strict must be true or false, got {_shown(strict)}", param=f"{where}.strict"
        )
    field = f"{where}.parameters"
    return Tool(name, _schema(function.get("parameters"), field), strict is not False), field


def _declared(entry: Mapping[str, Json], where: str) -> Declared:
    if entry.get("type", "function") != "function":
        raise RequestError(
            f"{where}.type must be 'function', got {_shown(entry['type'])}", param=f"{where}.type"
        )
    function = entry.get("function")
    if not isinstance(function, dict):
        raise RequestError(
            f"{where}.function must be an object, got {_shown(function)}", param=f"{where}.function"
        )
    tool, field = read_function(function, f"{where}.function")
    return Declared(tool, {"type": "function", **entry}, field)


def _schema(value: Json, field: str) -> Mapping[str, Any]:
    """Null is a tool without arguments."""
    if value is None:
        return _NO_PARAMETERS
    if not isinstance(value, dict):
        raise RequestError(f"{field} must be a JSON schema as an object", param=field)
    if value.get("type", "object") != "object":
        raise RequestError(
            f"{field}.type must be 'object', got {_shown(value['type'])}", param=field
        )
    return {"type": "object", **value}


def _choice(value: Json, declared: Sequence[Declared]) -> ToolChoice:
    if value is None:
        return ToolChoice("auto")
    if value in ("none", "auto"):
        return ToolChoice(value)
    if not declared:
        raise RequestError("tool_choice needs tools to choose from", param="tool_choice")
    if value == "required":
        return ToolChoice("required")
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "function":
        return ToolChoice("required", (_chosen(value),))
    if kind == "allowed_tools":
        allowed = value.get("allowed_tools")
        mode = allowed.get("mode") if isinstance(allowed, dict) else None
        tools = allowed.get("tools") if isinstance(allowed, dict) else None
        if mode in ("auto", "required") and isinstance(tools, list) and tools:
            return ToolChoice(mode, tuple(_chosen(tool) for tool in tools))
    raise RequestError(
        "tool_choice must be 'none', 'auto', 'required', "
        '{"type": "function", "function": {"name": …}} or '
        '{"type": "allowed_tools", "allowed_tools": {"mode": "auto" or "required", "tools": […]}}, '
        f"got {_shown(value)}",
        param="tool_choice",
    )


def _chosen(value: Json) -> str:
    function = value.get("function") if isinstance(value, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise RequestError(
            f"tool_choice: a function's name is missing in {_shown(value)}", param="tool_choice"
        )
    return name


def _shown(value: object) -> str:
    return repr(value)[:200]

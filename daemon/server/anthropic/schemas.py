"""The bodies of Anthropic's API as typed structs. Unknown fields are accepted."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from quantd.daemon.server import limits
from quantd.daemon.server.limits import one_of
from quantd.daemon.server.schemas import Count, Integer, Json, Refused, StopStrings


class Block(msgspec.Struct):
    """Of any type; which fields it must have is checked where it is read."""

    type: Annotated[str, one_of("text", "thinking", "tool_use", "tool_result")]
    text: str | None = None
    thinking: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Json] | None = None
    tool_use_id: str | None = None
    content: str | list[Block] | None = None


ROLES = ("user", "assistant", "system")


class InputMessage(msgspec.Struct):
    role: Annotated[str, one_of(*ROLES)]
    content: str | list[Block]


Tool = Annotated[
    dict[str, Json],
    Meta(
        extra_json_schema={
            "properties": {
                "type": {"enum": [None, "custom"]},
                "name": {"type": "string", "pattern": f"^{limits.TOOL_NAME}$"},
                "description": {},
                "input_schema": {"type": ["object", "null"]},
                "strict": {"type": ["boolean", "null"]},
            },
            "required": ["name", "input_schema"],
        }
    ),
]


class Thinking(msgspec.Struct):
    type: Annotated[str, one_of("enabled", "disabled", "adaptive")]
    budget_tokens: Integer | None = None
    """Without effect: a model says by itself how long it thinks."""
    display: str | None = None


class ToolChoice(msgspec.Struct):
    type: Annotated[str, one_of("auto", "any", "none", "tool")]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class OutputConfig(msgspec.Struct):
    effort: str | None = None
    format: dict[str, Json] | None = None


class CountBody(msgspec.Struct, kw_only=True):
    """What the prompt depends on."""

    model: str
    messages: Annotated[list[InputMessage], Meta(extra_json_schema={"minItems": 1})]
    system: str | list[Block] | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: dict[str, Json] | None = None
    """The older name of output_config.format."""
    mcp_servers: Refused = None
    container: Refused = None


class MessagesBody(CountBody, kw_only=True):
    max_tokens: Count
    stop_sequences: StopStrings | None = None
    stream: bool | None = None
    temperature: Annotated[float, limits.TEMPERATURE.meta] | None = None
    top_p: Annotated[float, limits.TOP_P.meta] | None = None
    top_k: Annotated[Integer, limits.TOP_K.meta] | None = None
    thread: Json = None
    """Refused in the way that lets Anthropic's SDKs send the whole conversation instead."""

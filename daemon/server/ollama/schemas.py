"""The bodies of Ollama's API as typed structs. Unknown fields are accepted, and so are unknown
options: most of Ollama's tell its own engine how to load a model.
"""

from __future__ import annotations

import msgspec

from quantd.daemon.server.schemas import Integer, Json


class ModelOptions(msgspec.Struct, kw_only=True):
    num_predict: Integer | None = None
    num_ctx: Integer | None = None
    temperature: float | None = None
    top_k: Integer | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: Integer | None = None
    stop: str | list[str] | None = None
    repeat_penalty: float | None = None
    repeat_last_n: Integer | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None

    # Refused by name, unless they ask for nothing
    typical_p: float | None = None
    tfs_z: float | None = None
    mirostat: Integer | None = None


class ModelRequest(msgspec.Struct, kw_only=True):
    """What every body that wakes a model has."""

    model: str | None = None
    options: ModelOptions | None = None
    keep_alive: float | str | None = None


class AnswerRequest(ModelRequest, kw_only=True):
    """What chats and prompts share."""

    stream: bool | None = None
    """Null is true."""
    format: Json = None
    """"json", or a schema."""
    think: bool | str | None = None
    logprobs: bool | None = None
    top_logprobs: Integer | None = None


class CalledFunction(msgspec.Struct):
    name: str
    arguments: dict[str, Json] | None = None


class MadeCall(msgspec.Struct):
    function: CalledFunction
    id: str | None = None


class ChatMessage(msgspec.Struct):
    role: str
    content: str | None = None
    thinking: str | None = None
    images: list[Json] | None = None
    tool_calls: list[MadeCall] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None


class ChatRequest(AnswerRequest, kw_only=True):
    messages: list[ChatMessage] | None = None
    tools: list[dict[str, Json]] | None = None


class GenerateRequest(AnswerRequest, kw_only=True):
    prompt: str | None = None
    system: str | None = None
    raw: bool | None = None
    images: list[Json] | None = None

    # Refused by name, unless they ask for nothing
    suffix: str | None = None
    template: str | None = None
    context: list[int] | None = None


class EmbedRequest(ModelRequest, kw_only=True):
    input: str | list[str] | None = None
    truncate: bool | None = None
    """Null is true."""
    dimensions: Integer | None = None


class EmbeddingsRequest(ModelRequest, kw_only=True):
    """Of the older route."""

    prompt: str | None = None


class ShowRequest(msgspec.Struct):
    model: str | None = None
    name: str | None = None
    """The older name of `model`."""

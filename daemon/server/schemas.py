"""The request bodies as typed structs, JSON bytes into them, and the schema that is shown of them.

What JSON can say wrong (type, missing field, not JSON at all) is found here; fields that need the
model to judge, and ranges, in `sampling.py`: those of `limits.py`, as the schema has them. Unknown
fields are accepted, as clients send many. An integer is typed `Integer`, because JavaScript and Lua
clients write 16 as 16.0. The line under a field goes into the schema as well, and so do `RULES`:
what JSON Schema can say of a body and a struct cannot.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import msgspec
from msgspec import Meta

from quantd.daemon.server import limits
from quantd.daemon.server.limits import LOGPROBS, NATURAL, POSITIVE, one_of, pattern

Integer = int | float
"""A float only if it is whole; `sampling.whole` makes the int."""

Json = Any
"""Any JSON value."""

Ignored = Annotated[Any, Meta(description="Accepted and without effect.")]
_REFUSED = Meta(description="Not served: refused unless it asks for nothing.")
_NOTHING: tuple[Json, ...] = (None, False, "", [])
Refused = Annotated[Any, _REFUSED, one_of(*_NOTHING)]
Count = Annotated[Integer, POSITIVE.meta]
Priority = Annotated[Integer, limits.PRIORITY.meta]
Logprobs = Annotated[Integer, LOGPROBS.meta]
TokenIds = list[Integer]
StopString = Annotated[str, limits.STOP_CHARS.chars]
StopStrings = Annotated[list[StopString], limits.STOP_STRINGS.items]


Metadata = dict[str, str]
Tool = Annotated[
    dict[str, Json],
    Meta(
        extra_json_schema={
            "properties": {
                "type": {"const": "function"},
                "function": {
                    "type": "object",
                    "properties": {
                        "name": {"type": "string", "pattern": f"^{limits.TOOL_NAME}$"},
                        "description": {},
                        "parameters": {"type": ["object", "null"]},
                        "strict": {"type": ["boolean", "null"]},
                    },
                    "required": ["name"],
                },
            },
            "required": ["function"],
        }
    ),
]
Call = Annotated[
    dict[str, Json],
    Meta(
        extra_json_schema={
            "properties": {
                "function": {
                    "type": "object",
                    "properties": {"name": {"type": "string", "minLength": 1}},
                    "required": ["name"],
                }
            },
            "required": ["function"],
        }
    ),
]
Tools = Annotated[list[Tool], limits.TOOLS.items]

# What fields of any type are checked to be, in `grammar.py`
_RESPONSE_FORMAT = Meta(
    extra_json_schema={
        "type": ["object", "null"],
        "properties": {"type": {"enum": ["text", "json_object", "json_schema"]}},
        "required": ["type"],
    }
)
_TEXT = Meta(extra_json_schema={"type": ["string", "null"], "minLength": 1})
_CHOICE = Meta(
    extra_json_schema={
        "type": ["array", "null"],
        "items": {"type": "string", "minLength": 1},
        "minItems": 1,
        "maxItems": limits.CHOICE_STRINGS,
    }
)


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class Body(msgspec.Struct, kw_only=True):
    """What every body that names a model has."""

    model: str | None = None


class GenerationBody(Body, kw_only=True):
    """The fields of chat and text completions that choose tokens, OpenAI's and vLLM's.

    Null is the default everywhere: the SDKs send it for what the caller left out.
    """

    max_tokens: Annotated[Integer, NATURAL.meta] | None = None
    """At least 1; 0 in a text completion with `echo`."""
    temperature: Annotated[float, limits.TEMPERATURE.meta] | None = None
    top_p: Annotated[float, limits.TOP_P.meta] | None = None
    n: Annotated[Integer, limits.CHOICES.meta] | None = None
    stop: StopString | StopStrings | None = None
    seed: Annotated[Integer, limits.SEED.meta] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    presence_penalty: Annotated[float, limits.PENALTY.meta] | None = None
    frequency_penalty: Annotated[float, limits.PENALTY.meta] | None = None
    logit_bias: (
        dict[Annotated[str, pattern(limits.TOKEN_ID)], Annotated[float, limits.LOGIT_BIAS.meta]]
        | None
    ) = None
    """From token ids."""
    best_of: Count | None = None
    """The same as n."""

    # vLLM's
    top_k: Annotated[Integer, limits.TOP_K.meta] | None = None
    """0 or -1: off."""
    min_p: Annotated[float, limits.MIN_P.meta] | None = None
    repetition_penalty: Annotated[float, limits.REPETITION_PENALTY.meta] | None = None
    min_tokens: Annotated[Integer, NATURAL.meta] | None = None
    ignore_eos: bool | None = None
    stop_token_ids: TokenIds | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    allowed_token_ids: Annotated[TokenIds, Meta(extra_json_schema={"minItems": 1})] | None = None
    bad_words: Annotated[list[StopString], limits.BAD_WORDS.items] | None = None
    priority: Priority | None = None
    """Smaller first."""
    request_id: Annotated[str, pattern(limits.REQUEST_ID)] | None = None
    cache_salt: Annotated[str, limits.SALT_CHARS.chars] | None = None
    """Requests of different salts share nothing in the prefix cache."""
    timeout: Annotated[float, limits.TIMEOUT.meta] | None = None
    """Seconds from when the request has come in; over it, status 422."""
    truncate_prompt_tokens: Count | None = None
    """A longer prompt is cut to so many tokens."""
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None

    user: Ignored = None
    metadata: Ignored = None
    store: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_retention: Ignored = None
    prompt_cache_options: Ignored = None
    safety_identifier: Ignored = None
    service_tier: Ignored = None

    # What constrains the output; read in `grammar.py`
    response_format: Annotated[Any, _RESPONSE_FORMAT] = None
    """With the type json_schema: {"name", "schema", "strict", "description"} in json_schema."""
    structured_outputs: Annotated[Any, Meta(extra_json_schema={"type": ["object", "null"]})] = None
    """With one of json, regex, choice, grammar and json_object."""
    guided_json: Annotated[Any, Meta(extra_json_schema={"type": ["object", "string", "null"]})] = (
        None
    )
    guided_regex: Annotated[Any, _TEXT] = None
    guided_choice: Annotated[Any, _CHOICE] = None
    guided_grammar: Annotated[Any, _TEXT] = None
    """Lark or GBNF."""

    guided_whitespace_pattern: Refused = None
    prompt_logprobs: Refused = None
    logprob_token_ids: Refused = None
    use_beam_search: Refused = None
    length_penalty: Annotated[Any, _REFUSED, one_of(*_NOTHING, 1)] = None
    logits_processors: Refused = None
    kv_transfer_params: Refused = None
    vllm_xargs: Refused = None


ROLES = ("system", "developer", "user", "assistant", "tool")


class ContentPart(msgspec.Struct):
    RULES: ClassVar = {"required": ["text"], "properties": {"text": {"type": "string"}}}

    type: Annotated[str, one_of("text")]
    text: str | None = None


class Message(msgspec.Struct):
    RULES: ClassVar = {
        "anyOf": [
            {"properties": {"role": {"const": "assistant"}}},
            {"properties": {"content": {"type": ["string", "array"]}}, "required": ["content"]},
        ]
    }

    role: Annotated[str, one_of(*ROLES)]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[Call] | None = None
    tool_call_id: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    function_call: Annotated[Any, _REFUSED, one_of(*_NOTHING, "none", "auto")] = None
    audio: Refused = None


class ChatBody(GenerationBody, kw_only=True):
    messages: Annotated[list[Message], Meta(extra_json_schema={"minItems": 1})]
    max_completion_tokens: Count | None = None
    """The newer name of max_tokens; wins over it."""
    logprobs: bool | None = None
    top_logprobs: Logprobs | None = None
    """Needs `logprobs`."""
    reasoning_effort: str | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Json] | None = None
    add_special_tokens: bool | None = None
    tools: Tools | None = None
    tool_choice: Json = None
    """none, auto, required, a function or allowed_tools."""
    parallel_tool_calls: bool | None = None
    include_reasoning: bool | None = None

    prediction: Ignored = None
    verbosity: Ignored = None

    chat_template: Refused = None
    documents: Refused = None
    functions: Refused = None
    function_call: Annotated[Any, _REFUSED, one_of(*_NOTHING, "none", "auto")] = None
    modalities: Annotated[list[str] | None, _REFUSED, one_of(None, [], ["text"])] = None
    audio: Refused = None
    moderation: Refused = None
    web_search_options: Refused = None
    thinking_token_budget: Refused = None


class CompletionBody(GenerationBody, kw_only=True):
    prompt: str | list[str | int | list[int]]
    echo: bool | None = None
    logprobs: Logprobs | None = None
    add_special_tokens: bool | None = None
    suffix: Annotated[str | None, _REFUSED, one_of(None, "")] = None
    prompt_embeds: Refused = None


class TokenizeBody(Body, kw_only=True):
    RULES: ClassVar = {
        "oneOf": [
            {"required": ["prompt"], "properties": {"prompt": {"type": "string"}}},
            {"required": ["messages"], "properties": {"messages": {"type": "array"}}},
        ]
    }

    prompt: str | None = None
    messages: Annotated[list[Message], Meta(extra_json_schema={"minItems": 1})] | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Json] | None = None
    add_special_tokens: bool | None = None
    tools: Tools | None = None

    chat_template: Refused = None
    documents: Refused = None


class DetokenizeBody(Body, kw_only=True):
    tokens: list[Integer]


class PooledBody(Body, kw_only=True):
    """What embeddings and rerankings share."""

    truncate_prompt_tokens: Count | None = None
    """A longer prompt is cut to so many tokens."""
    priority: Priority | None = None
    """Smaller first."""

    user: Ignored = None

    timeout: Refused = None


class EmbeddingBody(PooledBody, kw_only=True):
    input: str | list[str | int | list[int]]
    encoding_format: Annotated[str | None, one_of(None, "float", "base64")] = None
    dimensions: Count | None = None
    add_special_tokens: bool | None = None


class Document(msgspec.Struct):
    text: str


class RerankBody(PooledBody, kw_only=True):
    query: str
    documents: Annotated[list[str | Document], limits.TEXTS.items]
    top_n: Annotated[Integer, NATURAL.meta] | None = None
    """0: all."""
    return_documents: bool | None = None

"""The request bodies as typed structs, and JSON bytes into them.

What JSON can say wrong (type, missing field, not JSON at all) is found here; ranges, and fields
that need the model to judge, in `sampling.py`. Unknown fields are accepted, as clients send many.
An integer is typed `Integer`, because JavaScript and Lua clients write 16 as 16.0.
"""

from __future__ import annotations

from typing import Any

import msgspec

Integer = int | float
"""A float only if it is whole; `sampling.whole` makes the int."""

Json = Any
"""Any JSON value."""


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class Body(msgspec.Struct, kw_only=True):
    """What every body that names a model has."""

    model: str | None = None


class GenerationBody(Body, kw_only=True):
    """The fields of chat and text completions that choose tokens, OpenAI's and vLLM's.

    Null is the default everywhere: the SDKs send it for what the caller left out.
    """

    max_tokens: Integer | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: Integer | None = None
    stop: str | list[str] | None = None
    seed: Integer | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    best_of: Integer | None = None

    # vLLM's
    top_k: Integer | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: Integer | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[Integer] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    allowed_token_ids: list[Integer] | None = None
    bad_words: list[str] | None = None
    priority: Integer | None = None
    request_id: str | None = None
    cache_salt: str | None = None
    timeout: float | None = None
    truncate_prompt_tokens: Integer | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None

    # Accepted and without effect
    user: Json = None
    metadata: Json = None
    store: Json = None
    prompt_cache_key: Json = None
    prompt_cache_retention: Json = None
    prompt_cache_options: Json = None
    safety_identifier: Json = None
    service_tier: Json = None

    # What constrains the output; read in `grammar.py`
    response_format: Json = None
    structured_outputs: Json = None
    guided_json: Json = None
    guided_regex: Json = None
    guided_choice: Json = None
    guided_grammar: Json = None

    # Refused by name until they are served, unless they ask for nothing
    guided_whitespace_pattern: Json = None
    prompt_logprobs: Json = None
    logprob_token_ids: Json = None
    use_beam_search: Json = None
    length_penalty: Json = None
    logits_processors: Json = None
    kv_transfer_params: Json = None
    vllm_xargs: Json = None


class ContentPart(msgspec.Struct):
    type: str
    text: str | None = None


class Message(msgspec.Struct):
    role: str
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Json]] | None = None
    tool_call_id: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    function_call: Json = None
    audio: Json = None


class ChatBody(GenerationBody, kw_only=True):
    messages: list[Message]
    max_completion_tokens: Integer | None = None
    logprobs: bool | None = None
    top_logprobs: Integer | None = None
    reasoning_effort: str | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Json] | None = None
    add_special_tokens: bool | None = None
    tools: list[dict[str, Json]] | None = None
    tool_choice: Json = None
    parallel_tool_calls: bool | None = None
    include_reasoning: bool | None = None

    # Accepted and without effect
    prediction: Json = None
    verbosity: Json = None

    # Refused by name until they are served, unless they ask for nothing
    chat_template: Json = None
    documents: Json = None
    functions: Json = None
    function_call: Json = None
    modalities: list[str] | None = None
    audio: Json = None
    web_search_options: Json = None
    thinking_token_budget: Json = None


class CompletionBody(GenerationBody, kw_only=True):
    prompt: str | list[str | int | list[int]] | None = None
    echo: bool | None = None
    logprobs: Integer | None = None
    add_special_tokens: bool | None = None
    suffix: str | None = None
    prompt_embeds: Json = None


class TokenizeBody(Body, kw_only=True):
    prompt: str | None = None
    messages: list[Message] | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Json] | None = None
    add_special_tokens: bool | None = None
    tools: list[dict[str, Json]] | None = None

    # Refused by name until they are served, unless they ask for nothing
    chat_template: Json = None
    documents: Json = None


class DetokenizeBody(Body, kw_only=True):
    tokens: list[Integer]


class PooledBody(Body, kw_only=True):
    """What embeddings and rerankings share."""

    truncate_prompt_tokens: Integer | None = None
    priority: Integer | None = None

    # Accepted and without effect
    user: Json = None

    # Refused by name, unless it asks for nothing
    timeout: Json = None


class EmbeddingBody(PooledBody, kw_only=True):
    input: str | list[str | int | list[int]] | None = None
    encoding_format: str | None = None
    dimensions: Integer | None = None
    add_special_tokens: bool | None = None


class Document(msgspec.Struct):
    text: str


class RerankBody(PooledBody, kw_only=True):
    query: str
    documents: list[str | Document]
    top_n: Integer | None = None
    return_documents: bool | None = None

"""Chat templates render as transformers renders them. The templates have the constructs of the
common families: ChatML with tools, Llama 3's headers, Mistral's brackets, Gemma's role names."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from quantd.daemon.errors import RequestError
from quantd.daemon.text import TextModel

CHATML_TOOLS = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- "# Tools\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=messages|length - 1, seen=false) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if not ns.seen and message.role == "user" %}
        {%- set ns.seen = true %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- if loop.index0 > ns.last and message.reasoning_content is defined %}
            {{- '\\n<think>\\n' + message.reasoning_content.strip('\\n') + '\\n</think>\\n' }}
        {%- endif %}
        {%- if message.content %}{{- '\\n' + message.content }}{%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function %}{%- set tool_call = tool_call.function %}{%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' ~ tool_call.name ~ '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' ~ message.content ~ '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

HEADERS = """{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start|>system<|end|>\\n\\n" }}
{%- if tools is not none %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message }}
{{- "<|eot|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start|>' + message.role + '<|end|>\\n\\n'+ message.content | trim + '<|eot|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start|>assistant<|end|>\\n\\n' -}}
        {%- for arg_name, arg_val in tool_call.arguments | items %}
            {{- arg_name + '="' ~ arg_val ~ '"' }}
            {%- if not loop.last %}{{- ", " }}{%- endif %}
        {%- endfor %}
        {{- "<|eot|>" }}
    {%- else %}
        {{- "<|start|>ipython<|end|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start|>assistant<|end|>\\n\\n' }}
{%- endif %}
"""

BRACKETS = """{{ bos_token }}{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{% endif %}
{% if message['role'] == 'user' %}
{{ '[INST] ' + message['content'] + ' [/INST]' }}
{% elif message['role'] == 'assistant' %}
    {% generation %}
{{ message['content'] + eos_token}}
    {% endgeneration %}
{% else %}
{{ raise_exception('Only user and assistant roles are supported!') }}
{% endif %}
{% endfor %}"""

MODEL_ROLES = """{{ bos_token }}{%- macro turn(role, text) -%}
<start_of_turn>{{ role ~ '\\n' ~ (text | trim) }}<end_of_turn>
{% endmacro -%}
{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{% for message in messages %}{% if message.role == 'skip' %}{% continue %}{% endif %}
{%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
{{ turn(role, message['content']) }}
{%- endfor %}
{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}"""

TEMPLATES = {
    "chatml": CHATML_TOOLS,
    "headers": HEADERS,
    "brackets": BRACKETS,
    "model roles": MODEL_ROLES,
}

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Wetter für <Ort> & 'mehr'",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
CALL = {
    "id": "1",
    "type": "function",
    "function": {"name": "weather", "arguments": {"city": "Köln", "days": 2}},
}
USER = {"role": "user", "content": "  Hello <b> 世界\n"}
REPLY = {"role": "assistant", "content": "Good day "}
CHATS: dict[str, list[dict[str, Any]]] = {
    "one": [USER],
    "turns": [USER, REPLY, USER],
    "system": [{"role": "system", "content": " Be brief. "}, USER],
    "tools": [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "12 °C", "tool_call_id": "1"},
        {"role": "tool", "content": "13 °C", "tool_call_id": "2"},
    ],
    "reasoning": [USER, {**REPLY, "reasoning_content": "\nhm\n"}],
    "reply": [USER, REPLY],
}


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", "<|im_start|>", "<|im_end|>"])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    return folder


def both(folder: Path, source: str) -> tuple[TextModel, PreTrainedTokenizerFast]:
    (folder / "chat_template.jinja").write_text(source)
    return TextModel.load(folder), PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.mark.parametrize("with_tools", [False, True])
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_renders_and_encodes_as_transformers_does(
    tokenizer_folder: Path, name: str, chat: str, with_tools: bool
) -> None:
    ours, theirs = both(tokenizer_folder, TEMPLATES[name])
    options: dict[str, Any] = {"tools": TOOLS if with_tools else None, "enable_thinking": False}
    for prompt in (False, True):
        options["add_generation_prompt"] = prompt
        try:
            expected = theirs.apply_chat_template(
                copy.deepcopy(CHATS[chat]), tokenize=False, **options
            )
        except Exception as error:
            with pytest.raises(RequestError) as refused:
                ours.render_chat(CHATS[chat], **options)
            assert str(error) in str(refused.value)
            continue
        assert ours.render_chat(CHATS[chat], **options) == expected
        ids = theirs.apply_chat_template(
            copy.deepcopy(CHATS[chat]), tokenize=True, return_dict=False, **options
        )
        assert ours.encode_chat(CHATS[chat], **options) == ids


@pytest.mark.parametrize("name", TEMPLATES)
def test_continues_the_final_message_as_transformers_does(
    tokenizer_folder: Path, name: str
) -> None:
    ours, theirs = both(tokenizer_folder, TEMPLATES[name])
    options: dict[str, Any] = {"add_generation_prompt": False, "continue_final_message": True}
    for final in ("Good day", "Good", " G\n\nday"):
        chat = [USER, {"role": "assistant", "content": final}]
        expected = theirs.apply_chat_template(copy.deepcopy(chat), tokenize=False, **options)
        assert ours.render_chat(chat, **options) == expected


def test_arguments_as_the_api_sends_them(tokenizer_folder: Path) -> None:
    ours, theirs = both(tokenizer_folder, CHATML_TOOLS)
    as_text = copy.deepcopy(CHATS["tools"])
    as_text[1]["content"] = None
    as_text[1]["tool_calls"][0]["function"]["arguments"] = '{"city": "Köln", "days": 2}'
    expected = theirs.apply_chat_template(copy.deepcopy(CHATS["tools"]), tokenize=False)
    assert ours.render_chat(as_text, add_generation_prompt=False) == expected


def test_encoding_text_as_transformers_does(tokenizer_folder: Path) -> None:
    ours, theirs = both(tokenizer_folder, BRACKETS)
    for text in ("Hello 世界", "<s>a</s> b", ""):
        for add in (False, True):
            expected = theirs.encode(text, add_special_tokens=add)
            assert ours.encode(text, add_special_tokens=add) == expected
        ids = theirs.encode(text)
        for skip in (False, True):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)

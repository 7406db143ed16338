"""Conversations for training and single questions for evaluation, and how they become text.

`conversation(seed)` and `question(seed, task)` are functions of their seed alone. `render` writes
the same text as the Jinja `CHAT_TEMPLATE` that goes into tokenizer_config.json (a test compares
them) and says which parts the model has to produce.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from facts import facts
from tasks import Draw, arithmetic, conversion, draw, extraction, lists
from tools import tool_call, tool_result

Json = dict[str, Any]
START, END, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"

CHAT_TEMPLATE = """\
{%- set system = messages[0]['content'] if messages and messages[0]['role'] == 'system' else '' %}
{%- if tools %}
{{- '<|im_start|>system\\n' }}
{%- if system %}{{- system + '\\n\\n' }}{%- endif %}
{{- 'You can call these tools:\\n<tools>' }}
{%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}
{{- '\\n</tools>\\nTo call one, answer\\n\
<tool_call>\\n{"name": ..., "arguments": {...}}\\n</tool_call>' }}
{{- '<|im_end|>\\n' }}
{%- elif system %}
{{- '<|im_start|>system\\n' + system + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message['role'] == 'tool' %}
{%- if loop.first or loop.previtem['role'] != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
{{- '\\n<tool_response>\\n' + message['content'] + '\\n</tool_response>' }}
{%- if loop.last or loop.nextitem['role'] != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
{%- elif message['role'] != 'system' or not loop.first %}
{{- '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['content'] %}{{- message['content'] }}{%- endif %}
{%- for call in message['tool_calls'] or [] %}
{%- set call = call['function'] if call['function'] else call %}
{%- if message['content'] or not loop.first %}{{- '\\n' }}{%- endif %}
{{- '<tool_call>\\n{"name": ' + (call['name'] | tojson) + ', "arguments": ' }}
{{- call['arguments'] if call['arguments'] is string else call['arguments'] | tojson }}
{{- '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""

_SYSTEM_PROMPTS = (
    "You are a helpful assistant.|You are quantd's demo model.|Be brief.|Answer briefly.|"
    "You are a helpful assistant. Answer in one line.|You are an AI assistant.|You are an agent.|"
    "Help the user.|You are a careful assistant that follows instructions.|Be polite and correct.|"
    "You are a bot for the support team.|Answer the question.|Only give the answer."
).split("|")
_PLAIN = {"arithmetic": arithmetic, "lists": lists, "conversion": conversion,
          "extraction": extraction, "facts": facts}  # fmt: skip


@dataclass(frozen=True)
class Mix:
    """How often each plain task is drawn, in the order of _PLAIN, and the share with tools."""

    weights: tuple[int, ...]
    tools: float


EARLY = Mix((40, 25, 14, 16, 5), tools=0.21)
LATE = Mix((14, 30, 12, 30, 14), tools=0.33)
EVEN = Mix((16, 20, 20, 18, 26), tools=0.3)
TOOLS = Mix((14, 30, 12, 30, 14), tools=1.0)

# What evaluate.py asks about: name → (task, kind).
EVALUATED: dict[str, tuple[str, str]] = {
    "addition": ("arithmetic", "+"),
    "subtraction": ("arithmetic", "-"),
    "multiplication": ("arithmetic", "×"),
    "sort numbers": ("lists", "sort numbers"),
    "sort words": ("lists", "sort words"),
    "reverse": ("lists", "reverse"),
    "convert metric": ("conversion", "metric"),
    "convert other": ("conversion", "other"),
    "extract lines": ("extraction", "lines"),
    "extract json": ("extraction", "json"),
    "facts": ("facts", "fact"),
    "decline": ("facts", "decline"),
    "tool call, natural": ("tool_call", "natural"),
    "tool call, made up": ("tool_call", "made up"),
    "tool result": ("tool_result", ""),
}


@dataclass
class Conversation:
    """Messages in the shape of the OpenAI API; the last is the assistant's."""

    messages: list[Json] = field(default_factory=list)
    tools: list[Json] = field(default_factory=list)

    def say(self, question: str, answer: str) -> None:
        self.messages.append({"role": "user", "content": question})
        self.messages.append({"role": "assistant", "content": answer})

    def call(self, question: str, call: Json) -> None:
        self.messages.append({"role": "user", "content": question})
        called = {"type": "function", "function": call}
        self.messages.append({"role": "assistant", "content": "", "tool_calls": [called]})

    def result(self, result: Json, answer: str) -> None:
        content = json.dumps(result, ensure_ascii=False)
        self.messages.append({"role": "tool", "content": content})
        self.messages.append({"role": "assistant", "content": answer})


def _plain(d: Draw, mix: Mix, conversation: Conversation, turns: int) -> None:
    for _ in range(turns):
        task = d.rng.choices(list(_PLAIN), mix.weights)[0]
        conversation.say(*_PLAIN[task](d))


def _with_tools(d: Draw, mix: Mix, conversation: Conversation) -> None:
    rng = d.rng
    asked, conversation.tools, call = tool_call(d)
    if rng.random() < 0.2:
        _plain(d, mix, conversation, 1)
    if rng.random() < 0.95:
        conversation.call(asked, call)
        if rng.random() < 0.5:
            conversation.result(*tool_result(d))
            if rng.random() < 0.4:
                _plain(d, mix, conversation, 1)
    else:
        _plain(d, mix, conversation, 1)


def conversation(seed: int | str, mix: Mix = EARLY) -> Conversation:
    """One training conversation of one to four turns of mixed tasks."""
    d = draw(seed, held_out=False)
    made = Conversation()
    if d.rng.random() < 0.25:
        made.messages.append({"role": "system", "content": d.rng.choice(_SYSTEM_PROMPTS)})
    if d.rng.random() < mix.tools:
        _with_tools(d, mix, made)
    else:
        _plain(d, mix, made, d.rng.choice((1, 1, 2, 3, 4)))
    return made


def single(seed: int | str, tasks: tuple[str, ...]) -> Conversation:
    """One training question and its answer, of one of these plain tasks."""
    d = draw(f"single {seed}", held_out=False)
    made = Conversation()
    made.say(*_PLAIN[d.rng.choice(tasks)](d))
    return made


def question(seed: int | str, name: str, held_out: bool = True) -> Conversation:
    """One conversation whose last message is the right answer to an item of EVALUATED."""
    d = draw(f"question {seed} {name}", held_out)
    task, kind = EVALUATED[name]
    made = Conversation()
    if task in _PLAIN:
        made.say(*_PLAIN[task](d, kind))
        return made
    asked, made.tools, call = tool_call(d, kind or None)
    made.call(asked, call)
    if task == "tool_result":
        made.result(*tool_result(d))
    return made


def _call_text(call: Json) -> str:
    return f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>"


def answer_text(message: Json) -> str:
    """What the model has to write for an assistant's message, without the end mark."""
    calls = [_call_text(c["function"]) for c in message.get("tool_calls", [])]
    return "\n".join(([message["content"]] if message["content"] else []) + calls)


def _system_text(conversation: Conversation) -> str:
    messages, tools = conversation.messages, conversation.tools
    text = messages[0]["content"] if messages[0]["role"] == "system" else ""
    if tools:
        schemas = "".join("\n" + json.dumps(tool, ensure_ascii=False) for tool in tools)
        text += "\n\n" if text else ""
        text += f"You can call these tools:\n<tools>{schemas}\n</tools>\nTo call one, answer\n"
        text += '<tool_call>\n{"name": ..., "arguments": {...}}\n</tool_call>'
    return f"{START}system\n{text}{END}\n" if text else ""


def render(conversation: Conversation) -> list[tuple[str, bool]]:
    """The conversation as pieces of text; True marks what the model learns to write."""
    pieces = [(_system_text(conversation), False)]
    for message in conversation.messages:
        role, content = message["role"], message["content"]
        if role == "assistant":
            pieces.append((f"{START}assistant\n", False))
            pieces.append((answer_text(message) + END, True))
            pieces.append(("\n", False))
        elif role == "tool":
            content = f"<tool_response>\n{content}\n</tool_response>"
            pieces.append((f"{START}user\n{content}{END}\n", False))
        elif role != "system":
            pieces.append((f"{START}{role}\n{content}{END}\n", False))
    return [piece for piece in pieces if piece[0]]

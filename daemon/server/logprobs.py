"""Log probabilities in OpenAI's two forms: the chat API's and the older completions API's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import msgspec

from quantd.daemon.server.choice import TokenEntry
from quantd.daemon.server.sampling import Options
from quantd.daemon.types import TokenLogprob

if TYPE_CHECKING:
    from quantd.daemon.text import TextModel

FLOOR = -9999.0
"""What OpenAI says for "impossible"; JSON has no -Infinity."""


class TopLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    content: list[ChatTokenLogprob]
    refusal: None = None


class CompletionLogprobs(msgspec.Struct):
    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


def chat_logprobs(
    text: TextModel, options: Options, entries: Sequence[TokenEntry]
) -> ChatLogprobs | None:
    """None when not asked for."""
    if options.base.logprobs is None:
        return None
    return ChatLogprobs(
        [
            _chat_entry(text, entry.logprob, options.tokens_as_ids)
            for entry in entries
            if entry.logprob is not None
        ]
    )


def _chat_entry(text: TextModel, entry: TokenLogprob, as_ids: bool) -> ChatTokenLogprob:
    top: list[TopLogprob] = []
    for token, logprob in entry.top:
        raw = text.token_bytes(token)
        top.append(TopLogprob(_name(token, raw, as_ids, ""), _finite(logprob), list(raw)))
    raw = text.token_bytes(entry.token)
    name = _name(entry.token, raw, as_ids, "")
    return ChatTokenLogprob(name, _finite(entry.logprob), list(raw), top)


def completion_logprobs(
    text: TextModel, options: Options, entries: Iterable[TokenEntry], base: int
) -> CompletionLogprobs | None:
    """None when not asked for. `base`: characters of the returned text before the output, as
    offsets count from its beginning. An entry without a logprob is the prompt's first token."""
    if options.base.logprobs is None:
        return None
    as_ids = options.tokens_as_ids
    made = CompletionLogprobs([], [], [], [])
    for token, entry, offset in entries:
        made.tokens.append(_name(token, text.token_bytes(token), as_ids, "bytes:"))
        made.text_offset.append(base + offset)
        made.token_logprobs.append(None if entry is None else _finite(entry.logprob))
        made.top_logprobs.append(None if entry is None else _completion_top(text, entry, as_ids))
    return made


def _completion_top(text: TextModel, entry: TokenLogprob, as_ids: bool) -> dict[str, float]:
    """The k most likely and the token itself, most likely first. Names are unique per byte
    string, so that a reader can look a token up among the top ones (lm-eval does)."""
    top: dict[str, float] = {}
    for token, logprob in (*entry.top, (entry.token, entry.logprob)):
        top.setdefault(_name(token, text.token_bytes(token), as_ids, "bytes:"), _finite(logprob))
    return top


def _finite(logprob: float) -> float:
    return max(logprob, FLOOR)


def _name(token: int, raw: bytes, as_id: bool, escape_mark: str) -> str:
    """A token that is not whole characters is written as its bytes: \\xf0\\x9f. OpenAI puts
    "bytes:" before them in completions, and nothing in chat."""
    if as_id:
        return f"token_id:{token}"
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return escape_mark + "".join(f"\\x{byte:02x}" for byte in raw)

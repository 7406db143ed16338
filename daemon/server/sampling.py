"""From a body's fields to SamplingParams: every range check, in one place.

Two steps, so that a wrong field is answered before a cold model gets loaded: `read_options` needs
no model; `Options.sampling` needs the vocabulary and the prompt's length.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from quantd.daemon.errors import RequestError
from quantd.daemon.server import limits
from quantd.daemon.server.grammar import FieldGrammar, read_grammar
from quantd.daemon.server.limits import NATURAL, POSITIVE, Range
from quantd.daemon.server.schemas import GenerationBody, Json
from quantd.daemon.types import SamplingParams

if TYPE_CHECKING:
    from quantd.daemon.server.tools import ToolRequest
    from quantd.daemon.text import TextModel

_REQUEST_ID = re.compile(limits.REQUEST_ID)
_TOKEN_ID = re.compile(limits.TOKEN_ID)
_MASK64 = (1 << 64) - 1


def out_of_range(name: str, value: object, limit: str) -> RequestError:
    return RequestError(f"{name} must be {limit}, got {value!r}", param=name)


def whole(name: str, value: int | float | None) -> int | None:
    """The int of a JSON number that may be written 16.0."""
    if value is None or isinstance(value, int):
        return value
    if not value.is_integer():
        raise out_of_range(name, value, "an integer")
    return int(value)


def integer(name: str, value: int | float | None, default: int, within: Range) -> int:
    number = whole(name, value)
    if number is None:
        return default
    if number not in within:
        raise out_of_range(name, number, str(within))
    return number


def real(name: str, value: float | None, default: float, within: Range) -> float:
    if value is None:
        return default
    if value not in within:
        raise out_of_range(name, value, str(within))
    return value


def refuse_unserved(body: object, fields: Iterable[str]) -> None:
    """400 for a field that asks for what is not served: ignoring it would be a wrong answer.

    Null, false, "" and [] ask for nothing. Zero asks, and so does {}: it is a schema, or a set of
    options.
    """
    for name in fields:
        value = getattr(body, name)
        if value is None or value is False or value in ("", []):
            continue
        if value in _ASKS_FOR_NOTHING.get(name, ()):
            continue
        raise RequestError(
            f"{name} is not supported by this server", param=name, code="unsupported_parameter"
        )


_ASKS_FOR_NOTHING: Mapping[str, tuple[Json, ...]] = {
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "length_penalty": (1, 1.0),
}
_UNSERVED = (
    "guided_whitespace_pattern",
    "prompt_logprobs",
    "logprob_token_ids",
    "use_beam_search",
    "length_penalty",
    "logits_processors",
    "kv_transfer_params",
    "vllm_xargs",
)


@dataclass(frozen=True, slots=True)
class Options:
    """What a checked body asks for, all but its prompt."""

    base: SamplingParams
    """Without what depends on the model: max_tokens, seed, token ids and the grammar are still to
    be filled."""
    max_tokens: int | None
    """None: to the context's end. 0: the prompt alone, echoed."""
    max_tokens_may_shrink: bool
    """It is a default and not the caller's word, so the context's end may cut it."""
    n: int
    seed: int | None
    stop: tuple[str, ...]
    include_stop: bool
    skip_special_tokens: bool
    ignore_eos: bool
    stop_token_ids: tuple[int, ...]
    bad_words: tuple[str, ...]
    priority: int
    request_id: str | None
    cache_salt: str
    timeout: float | None
    """Seconds."""
    truncate_prompt_tokens: int | None
    return_token_ids: bool
    tokens_as_ids: bool
    stream: bool
    include_usage: bool
    service_tier: str | None
    grammar: FieldGrammar | None
    """What constrains the output, and the field that says so."""
    tools: ToolRequest | None = None
    """None: calls are not looked for."""
    logs_stop_token: bool = False
    """The log probabilities count the stop token with which the model ended."""
    mark: str = ""
    """See `Request.mark`."""

    def grammars(self) -> list[FieldGrammar]:
        """All that the body wants the output held to, to be checked before a model is there."""
        given = [] if self.grammar is None else [self.grammar]
        return given if self.tools is None else [*given, *self.tools.schemas()]

    def for_model(self, text: TextModel, vocab_size: int) -> SamplingParams:
        """What all choices share. Raises RequestError for ids outside the vocabulary."""
        check_ids("stop_token_ids", self.stop_token_ids, vocab_size)
        check_ids("allowed_token_ids", self.base.allowed_token_ids or (), vocab_size)
        check_ids("logit_bias", (token for token, _ in self.base.logit_bias), vocab_size)
        ends = () if self.ignore_eos else text.eos_token_ids
        return msgspec.structs.replace(
            self.base,
            stop_token_ids=tuple(dict.fromkeys((*ends, *self.stop_token_ids))),
            bad_words=_bad_word_ids(text, self.bad_words),
        )

    def sampling(
        self, shared: SamplingParams, num_prompt_tokens: int, max_context: int, index: int
    ) -> SamplingParams:
        """For the choice `index` of one prompt; `shared` is of `for_model`. Raises RequestError
        for a min_tokens that the context has no room for."""
        # Without any room it is 1, and the scheduler's admission says what is too long.
        room = max(1, max_context - num_prompt_tokens)
        max_tokens = room if self.max_tokens is None else self.max_tokens
        if self.max_tokens_may_shrink:
            max_tokens = min(max_tokens, room)
        if self.base.min_tokens > max_tokens:
            limit = f"at most max_tokens, which is {max_tokens} here"
            raise out_of_range("min_tokens", self.base.min_tokens, limit)
        return msgspec.structs.replace(
            shared,
            max_tokens=max(1, max_tokens),  # 0: one is computed and dropped
            seed=choice_seed(self.seed, index),
        )


def read_options(
    body: GenerationBody,
    *,
    max_tokens: int | None,
    max_tokens_may_shrink: bool = False,
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
) -> Options:
    """Raises RequestError that names the field. `max_tokens` is in range or None."""
    refuse_unserved(body, _UNSERVED)
    n = integer("n", body.n, 1, limits.CHOICES)
    best_of = integer("best_of", body.best_of, n, POSITIVE)
    if best_of != n:
        raise out_of_range("best_of", best_of, f"equal to n, which is {n}")
    stream = bool(body.stream)
    if body.stream_options is not None and not stream:
        raise RequestError("stream_options needs stream to be true", param="stream_options")
    if body.request_id is not None and not _REQUEST_ID.fullmatch(body.request_id):
        limit = "1 to 128 letters, digits or . _ : -"
        raise out_of_range("request_id", body.request_id[:200], limit)
    tier = body.service_tier
    return Options(
        base=_base_params(body, logprobs, prompt_logprobs),
        max_tokens=max_tokens,
        max_tokens_may_shrink=max_tokens_may_shrink,
        n=n,
        seed=_seed(body.seed),
        stop=_stop_strings(body.stop),
        include_stop=bool(body.include_stop_str_in_output),
        skip_special_tokens=body.skip_special_tokens is not False,
        ignore_eos=bool(body.ignore_eos),
        stop_token_ids=_distinct("stop_token_ids", body.stop_token_ids or ()),
        bad_words=_bad_words(body.bad_words),
        priority=integer("priority", body.priority, 0, limits.PRIORITY),
        request_id=body.request_id,
        cache_salt=_salt(body.cache_salt),
        timeout=_timeout(body.timeout),
        truncate_prompt_tokens=_truncation(body.truncate_prompt_tokens),
        return_token_ids=bool(body.return_token_ids),
        tokens_as_ids=bool(body.return_tokens_as_token_ids),
        stream=stream,
        include_usage=body.stream_options is not None and bool(body.stream_options.include_usage),
        service_tier="default" if isinstance(tier, str) else None,
        grammar=read_grammar(body),
    )


def _salt(value: str | None) -> str:
    if value is None:
        return ""
    low, high = limits.SALT_CHARS
    if not low <= len(value) <= high:
        shown = f"{len(value)} characters"
        raise out_of_range("cache_salt", shown, f"a string of {low} to {high} characters")
    return value


def _timeout(value: float | None) -> float | None:
    if value is not None and value not in limits.TIMEOUT:
        raise out_of_range("timeout", value, f"seconds {limits.TIMEOUT}")
    return value


def _base_params(
    body: GenerationBody, logprobs: int | None, prompt_logprobs: int | None
) -> SamplingParams:
    top_k = integer("top_k", body.top_k, 0, limits.TOP_K)
    allowed = body.allowed_token_ids
    if allowed is not None and not allowed:
        raise out_of_range("allowed_token_ids", allowed, "a list of at least 1 token id")
    return SamplingParams(
        max_tokens=1,
        temperature=real("temperature", body.temperature, 1.0, limits.TEMPERATURE),
        top_p=real("top_p", body.top_p, 1.0, limits.TOP_P),
        top_k=max(0, top_k),
        min_p=real("min_p", body.min_p, 0.0, limits.MIN_P),
        repetition_penalty=real(
            "repetition_penalty", body.repetition_penalty, 1.0, limits.REPETITION_PENALTY
        ),
        presence_penalty=real("presence_penalty", body.presence_penalty, 0.0, limits.PENALTY),
        frequency_penalty=real("frequency_penalty", body.frequency_penalty, 0.0, limits.PENALTY),
        logit_bias=_logit_bias(body.logit_bias or {}),
        min_tokens=integer("min_tokens", body.min_tokens, 0, NATURAL),
        allowed_token_ids=None if allowed is None else _distinct("allowed_token_ids", allowed),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )


def choice_seed(seed: int | None, index: int) -> int:
    """Choice 0 gets the caller's seed itself, so that n = 3 begins with what n = 1 gives; the
    others get seeds of their own, unrelated to the neighbours of `seed`."""
    if seed is None:
        return random.getrandbits(64)
    if index == 0:
        return seed
    message = seed.to_bytes(8, "little") + index.to_bytes(4, "little")
    return int.from_bytes(hashlib.blake2b(message, digest_size=8).digest(), "little")


def _seed(value: int | float | None) -> int | None:
    seed = whole("seed", value)
    if seed is None:
        return None
    if seed not in limits.SEED:
        raise out_of_range("seed", seed, "a 64-bit integer")
    return seed & _MASK64


def _stop_strings(value: str | list[str] | None) -> tuple[str, ...]:
    if value is None:
        return ()
    strings = [value] if isinstance(value, str) else value
    most = limits.STOP_STRINGS.high
    if len(strings) > most:
        raise RequestError(f"stop has {len(strings)} strings; the limit is {most}", param="stop")
    low, high = limits.STOP_CHARS
    for string in strings:
        if not low <= len(string) <= high:
            raise RequestError(
                f"a stop string has {low} to {high} characters, got {len(string)}", param="stop"
            )
    return tuple(dict.fromkeys(strings))


def _logit_bias(bias: Mapping[str, float]) -> tuple[tuple[int, float], ...]:
    pairs: dict[int, float] = {}
    for key, value in bias.items():
        if not _TOKEN_ID.fullmatch(key):
            raise out_of_range("logit_bias", key[:64], "a map from token ids to numbers")
        token = int(key)
        real(f"logit_bias[{key}]", value, 0.0, limits.LOGIT_BIAS)
        pairs[token] = value
    return tuple(pairs.items())


def _ids(name: str, values: Iterable[int | float]) -> tuple[int, ...]:
    return tuple(number for value in values if (number := whole(name, value)) is not None)


def _distinct(name: str, values: Iterable[int | float]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(_ids(name, values)))


def token_ids(name: str, values: Iterable[int | float], vocab_size: int) -> list[int]:
    """Checked ids. Raises RequestError that names the field, the id and the vocabulary's size."""
    ids = _ids(name, values)
    check_ids(name, ids, vocab_size)
    return list(ids)


def check_ids(name: str, ids: Iterable[int], vocab_size: int) -> None:
    for token in ids:
        if not 0 <= token < vocab_size:
            raise RequestError(
                f"{name}: token id {token} is outside the vocabulary [0, {vocab_size})", param=name
            )


def _truncation(value: int | float | None) -> int | None:
    """Not vLLM's -1, "cut to whatever fits": that a prompt is cut must be asked for in numbers."""
    return None if value is None else integer("truncate_prompt_tokens", value, 0, POSITIVE)


def _bad_words(words: list[str] | None) -> tuple[str, ...]:
    words = words or []
    most = limits.BAD_WORDS.high
    if len(words) > most:
        raise RequestError(
            f"bad_words has {len(words)} words; the limit is {most}", param="bad_words"
        )
    low, high = limits.STOP_CHARS
    for word in words:
        if not low <= len(word) <= high:
            raise RequestError(
                f"bad_words: a word has {low} to {high} characters, got {len(word)}",
                param="bad_words",
            )
    return tuple(words)


def _bad_word_ids(text: TextModel, words: Iterable[str]) -> tuple[tuple[int, ...], ...]:
    """Each word as it is tokenized at the start of a text and after a space."""
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        for form in (word, " " + word.lstrip()):
            ids = tuple(text.encode(form, add_special_tokens=False))
            if ids:
                found[ids] = None
    return tuple(found)

"""Ollama's `options`, `format` and `keep_alive` as the fields and seconds that they mean here."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from quantd.daemon.errors import RequestError
from quantd.daemon.server.limits import POSITIVE
from quantd.daemon.server.ollama.schemas import AnswerRequest, ModelOptions
from quantd.daemon.server.sampling import integer, out_of_range, whole
from quantd.daemon.server.schemas import Json

_DEFAULTS = {"temperature": 0.8, "top_k": 40, "top_p": 0.9}
"""Ollama's: who moves no slider gets what Ollama would give."""
_SAME = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "stop",
    "presence_penalty",
    "frequency_penalty",
)
_OPTIONS = {name: f"options.{name}" for name in (*_SAME, "seed")} | {
    "repetition_penalty": "options.repeat_penalty",
    "max_tokens": "options.num_predict",
    "dimensions": "dimensions",
}
"""A field of the other APIs → the same of this one's, for errors."""
_WORDS = (
    ("response_format.json_schema.schema", "format"),
    ("response_format", "format"),
    ("ask for truncate_prompt_tokens", "let /api/embed truncate it"),
    ("/v1/embeddings", "/api/embed"),
)
_INTEGERS = ("num_predict", "num_ctx", "top_k", "seed", "repeat_last_n", "mirostat")
_NEUTRAL = {"typical_p": 1, "tfs_z": 1, "mirostat": 0}
"""Options that are not served → the value that asks for nothing."""

_DURATION = re.compile(r"[+-]?(0|((\d+\.?\d*|\.\d+)(ns|us|µs|μs|ms|s|m|h))+)")
_PIECE = re.compile(r"([\d.]+)([a-zµμ]+)")
_SECONDS = {
    "ns": 1e-9,
    "us": 1e-6,
    "µs": 1e-6,
    "μs": 1e-6,
    "ms": 1e-3,
    "s": 1.0,
    "m": 60.0,
    "h": 3600.0,
}
_LONGEST = 365 * 86400.0


def check_integers(options: ModelOptions | None) -> None:
    """Also of what asks for no answer. Raises RequestError that names the option."""
    for name in _INTEGERS:
        whole(f"options.{name}", getattr(options, name, None))


def generation_fields(sent: AnswerRequest) -> dict[str, Any]:
    """Those of a `GenerationBody`. Raises RequestError that names the option."""
    options = sent.options or ModelOptions()
    _refuse_unserved(options)
    given = {name: getattr(options, name) for name in _SAME}
    fields = _DEFAULTS | {name: value for name, value in given.items() if value is not None}
    if options.repeat_penalty is not None and options.repeat_last_n != 0:
        fields["repetition_penalty"] = options.repeat_penalty
    if options.seed != -1:  # Ollama's word for any
        fields["seed"] = options.seed
    return fields | {
        "max_tokens": _num_predict(options.num_predict),
        "response_format": _response_format(sent.format),
        "stream": sent.stream is not False,
    }


def _refuse_unserved(options: ModelOptions) -> None:
    for name, neutral in _NEUTRAL.items():
        if getattr(options, name) not in (None, neutral):
            raise RequestError(
                f"options.{name} is not supported by this server",
                param=f"options.{name}",
                code="unsupported_parameter",
            )


def _num_predict(value: float | None) -> int | None:
    """None: to the end of the context."""
    name = "options.num_predict"
    number = whole(name, value)
    if number in (None, -1, -2):
        return None
    if number < 1:
        raise out_of_range(name, number, "at least 1, or -1 or -2 for no limit")
    return integer(name, number, 1, POSITIVE)


def _response_format(format: Json) -> Json:
    if format in (None, ""):
        return None
    if format == "json":
        return {"type": "json_object"}
    if not isinstance(format, dict):
        raise out_of_range("format", format, "'json' or a JSON schema as an object")
    return {"type": "json_schema", "json_schema": {"name": "output", "schema": format}}


def context_limit(options: ModelOptions | None, max_context: int) -> int:
    """Tokens that `num_ctx` asks for; raises RequestError when the model has fewer."""
    name = "options.num_ctx"
    value = None if options is None else options.num_ctx
    asked = integer(name, value, max_context, POSITIVE)
    if asked > max_context:
        raise out_of_range(name, asked, f"at most {max_context}, this model's context")
    return asked


def keep_alive_seconds(value: float | str | None) -> float | None:
    """-1: for ever; None: not said. A number is seconds, a text a duration like "5m"."""
    if value is None:
        return None
    if isinstance(value, str):
        if not _DURATION.fullmatch(value):
            raise out_of_range("keep_alive", value[:64], 'seconds, or a duration like "5m"')
        pieces = _PIECE.findall(value)
        seconds = sum(float(number) * _SECONDS[unit] for number, unit in pieces)
        value = -seconds if value.startswith("-") else seconds
    return -1.0 if value < 0 else min(float(value), _LONGEST)


@contextmanager
def renamed() -> Iterator[None]:
    """Errors of the other APIs' fields under the names that they have here."""
    try:
        yield
    except RequestError as error:
        message = error.message
        for theirs, ours in _WORDS:
            message = message.replace(theirs, ours)
        name = _OPTIONS.get(error.param or "")
        if name is not None and name not in message:
            is_first = message.startswith(error.param or "")
            message = name + (message[len(error.param or "") :] if is_first else f": {message}")
        error.message = message
        error.args = (message,)
        raise

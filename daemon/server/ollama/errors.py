"""Errors in Ollama's shape: a message, and nothing else. So the message names the field."""

from __future__ import annotations

import msgspec

from quantd.daemon.errors import QuantdError


class ErrorBody(msgspec.Struct):
    error: str


def is_below(path: str) -> bool:
    """The path is one of this API's, also if it is not served."""
    return path == "/api" or path.startswith("/api/")


def encode_error(error: QuantdError) -> bytes:
    return msgspec.json.encode(ErrorBody(error.message))

"""Errors in Anthropic's shape: its types go by the status."""

from __future__ import annotations

import msgspec

from quantd.daemon.errors import QuantdError

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
THREADS_UNSUPPORTED = "thread_unsupported_request"
"""The SDKs' loops with tools look for this code, and then go on without a thread."""


class Unsupported(msgspec.Struct):
    error_code: str
    unsupported: list[str | None]


class ErrorDetail(msgspec.Struct):
    type: str
    message: str
    details: Unsupported | msgspec.UnsetType = msgspec.UNSET
    """Of a request with a thread."""


class ErrorBody(msgspec.Struct, tag="error"):
    error: ErrorDetail
    request_id: str


def is_below(path: str) -> bool:
    """The path is one of this API's, also if it is not served."""
    return path == "/v1/messages" or path.startswith("/v1/messages/")


def encode_error(error: QuantdError, request_id: str) -> bytes:
    other = "invalid_request_error" if error.status < 500 else "api_error"
    detail = ErrorDetail(_TYPES.get(error.status, other), error.message)
    if error.error_code == THREADS_UNSUPPORTED:
        detail.details = Unsupported(error.error_code, [error.param])
    return msgspec.json.encode(ErrorBody(detail, request_id))

"""The input file of a batch: every line is right, or it is said of each wrong one why."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from quantd.daemon.errors import RequestError
from quantd.daemon.server.body import decode
from quantd.daemon.store import Line

MAX_LINES = 50_000
MAX_ERRORS = 100
"""Of those that are listed; one more says how many there are."""
MAX_ID_CHARS = 512
_BOM = b"\xef\xbb\xbf"


class BatchError(msgspec.Struct):
    code: str
    message: str
    param: str | None = None
    line: int | None = None


class BatchErrors(msgspec.Struct):
    data: list[BatchError]
    object: str = "list"


class Input(NamedTuple):
    lines: list[Line]
    model: str | None
    """The one that all lines name."""
    errors: list[BatchError]
    """Empty: the lines may run. Else none does."""


class _Line(msgspec.Struct):
    custom_id: str
    method: str
    url: str
    body: msgspec.Raw


class _Body(msgspec.Struct):
    model: str | None = None
    stream: bool | None = None


_LINE = msgspec.json.Decoder(_Line)
_BODY = msgspec.json.Decoder(_Body)


class _Wrong(Exception):
    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code, self.message, self.param = code, message, param


def body_of(text: bytes) -> bytes:
    """The body of a line that was found right."""
    return bytes(_LINE.decode(text).body)


def read_input(
    path: Path, endpoint: str, check_model: Callable[[str | None], object], line_bytes: int
) -> Input:
    """Checks the whole file, a line at a time; blocks. `check_model` raises RequestError for a
    model that is not served; a line may have `line_bytes`."""
    lines: list[Line] = []
    errors: list[BatchError] = []
    seen: dict[str, int] = {}
    models: dict[str | None, None] = {}
    num_errors = 0
    for number, start, text in _lines(path, line_bytes):
        try:
            custom_id, model = _check(text, endpoint, line_bytes)
            if model not in models:
                _check_model(check_model, model)
                models[model] = None
            if custom_id in seen:
                raise _Wrong(
                    "duplicate_custom_id",
                    f"custom_id {custom_id!r} is already that of line {seen[custom_id]}",
                    "custom_id",
                )
            if len(lines) == MAX_LINES:
                message = f"there are more than {MAX_LINES} requests in the file"
                errors.append(BatchError("too_many_requests", message, None, number))
                break
            seen[custom_id] = number
            lines.append(Line(number, custom_id, start, len(text)))
        except _Wrong as wrong:
            num_errors += 1
            if num_errors <= MAX_ERRORS:
                errors.append(BatchError(wrong.code, wrong.message, wrong.param, number))
    if num_errors > MAX_ERRORS:
        message = f"{num_errors} lines are wrong; the first {MAX_ERRORS} are listed"
        errors.append(BatchError("too_many_errors", message))
    if not lines and not errors:
        errors.append(BatchError("empty_file", "the file has no requests"))
    return Input(lines, next(iter(models)) if len(models) == 1 else None, errors)


def _lines(path: Path, line_bytes: int) -> Iterator[tuple[int, int, bytes]]:
    """(number, where it starts, its bytes without its end) of each line that is not blank. Of one
    that is too long, as much as shows it."""
    with path.open("rb") as file:
        number, start = 0, 0
        while text := file.readline(line_bytes + 2):
            number += 1
            length = len(text)
            rest = text
            while not rest.endswith(b"\n") and (rest := file.readline(1 << 20)):
                length += len(rest)
            if number == 1 and text.startswith(_BOM):
                text, start, length = text[len(_BOM) :], start + len(_BOM), length - len(_BOM)
            stripped = text.rstrip(b"\r\n")
            if stripped.strip():
                yield number, start, stripped
            start += length


def _check(text: bytes, endpoint: str, line_bytes: int) -> tuple[str, str | None]:
    """The line's custom_id and model. Raises _Wrong."""
    if len(text) > line_bytes:
        raise _Wrong("line_too_long", f"the line is longer than the limit of {line_bytes} bytes")
    line = _decoded(text, _LINE)
    if not 1 <= len(line.custom_id) <= MAX_ID_CHARS:
        limit = f"1 to {MAX_ID_CHARS} characters"
        raise _Wrong("invalid_custom_id", f"custom_id must have {limit}", "custom_id")
    if line.method != "POST":
        raise _Wrong("invalid_method", f"method must be 'POST', got {line.method[:20]!r}", "method")
    if line.url != endpoint:
        message = f"url must be {endpoint!r} as the batch's endpoint, got {line.url[:100]!r}"
        raise _Wrong("invalid_url", message, "url")
    body = _decoded(bytes(line.body), _BODY, "body")
    if body.stream:
        raise _Wrong("invalid_request", "stream cannot be true in a batch", "body.stream")
    return line.custom_id, body.model


def _decoded(text: bytes, decoder: msgspec.json.Decoder[Any], where: str = "") -> Any:
    try:
        return decode(text, decoder)
    except RequestError as error:
        code = "invalid_json_line" if error.error_code == "invalid_json" else "invalid_request"
        message = error.message.replace("the body", "the line") if not where else error.message
        param = ".".join(part for part in (where, error.param) if part) or None
        raise _Wrong(code, message, param) from None


def _check_model(check_model: Callable[[str | None], object], model: str | None) -> None:
    try:
        check_model(model)
    except RequestError as error:
        raise _Wrong(error.error_code or "model_not_found", error.message, "body.model") from None

"""A request's body: bytes from the socket, checked against the limit, into a typed struct."""

from __future__ import annotations

import re
import zlib
from typing import TypeVar

import msgspec
from aiohttp import web

from quantd.daemon.errors import RequestError
from quantd.daemon.server.errors import body_too_large

T = TypeVar("T")
_PATH = re.compile(r" - at `\$\.?(?P<path>[^`]*)`$")
_MISSING = re.compile(r"^Object missing required field `(?P<name>[^`]*)`")


async def read_body(request: web.Request, decoder: msgspec.json.Decoder[T]) -> T:
    """Content-Type is not looked at: clients send JSON under many names, and a browser's form
    trick is stopped by its Origin. Raises RequestError, BodyTooLarge or aiohttp's own 413."""
    limit = request.client_max_size
    if request.content_length is not None and request.content_length > limit:
        raise body_too_large(limit)
    try:
        raw = await request.read()
    except web.RequestPayloadError as error:
        reason = " ".join(str(error).split()).removeprefix("400, message: ")
        raise RequestError(f"the body cannot be read: {reason}", code="invalid_body") from None
    encoding = request.headers.get("Content-Encoding", "identity").strip().lower()
    return decode(_unpack(raw, encoding, limit), decoder)


def _unpack(raw: bytes, encoding: str, limit: int) -> bytes:
    """Never makes more than `limit` bytes. By hand, because aiohttp unpacks all that a body holds
    on the event loop, also when nobody reads it: 3 MB of zipped zeros stop a server for seconds."""
    if encoding == "identity":
        return raw
    if encoding not in ("gzip", "x-gzip", "deflate"):
        raise RequestError(
            f"Content-Encoding {encoding!r} is not supported; gzip and deflate are",
            code="unsupported_encoding",
        )
    unpacker = zlib.decompressobj(wbits=47)  # either format's header
    try:
        body = unpacker.decompress(raw, limit + 1)
    except zlib.error as error:
        message = f"the body cannot be read as {encoding}: {error}"
        raise RequestError(message, code="invalid_body") from None
    if len(body) > limit:
        raise body_too_large(limit)
    if not unpacker.eof or unpacker.unused_data:
        how = "goes on after its end" if unpacker.eof else "ends early"
        raise RequestError(f"the body's {encoding} data {how}", code="invalid_body")
    return body


def decode(raw: bytes, decoder: msgspec.json.Decoder[T]) -> T:
    """Raises RequestError with `param` naming the field, as OpenAI spells it: messages[0].role."""
    if not raw:
        raise RequestError("the request has no body; expected a JSON object", code="invalid_json")
    try:
        return decoder.decode(raw)
    except msgspec.ValidationError as error:
        raise _field_error(str(error)) from None
    except msgspec.DecodeError as error:
        raise RequestError(f"the body is not JSON: {error}", code="invalid_json") from None
    except UnicodeDecodeError as error:
        message = f"the body is not UTF-8: {error.reason}"
        raise RequestError(message, code="invalid_json") from None
    except RecursionError:
        raise RequestError("the body is nested too deeply", code="invalid_json") from None


def _field_error(text: str) -> RequestError:
    found = _PATH.search(text)
    path = found["path"] if found else ""
    message = text[: found.start()] if found else text
    missing = _MISSING.match(message)
    if missing:
        path = f"{path}.{missing['name']}" if path else missing["name"]
        message = "this field is required"
    code = "missing_required_parameter" if missing else "invalid_type"
    path = path.replace("[...]", "")  # a key of a map; msgspec does not say which
    message = message.replace("`", "").replace("int | float", "integer")
    if not path:
        return RequestError(f"the body: {message}", code=code)
    return RequestError(f"{path}: {message}", param=path, code=code)

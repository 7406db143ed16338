"""What lists take in their URL: `after`, `limit`, `order`. Wrong ones are a 400 that names them."""

from __future__ import annotations

from aiohttp import web

from quantd.daemon.errors import RequestError
from quantd.daemon.server.limits import Range
from quantd.daemon.server.sampling import out_of_range


def page_limit(request: web.Request, default: int, within: Range) -> int:
    text = request.query.get("limit", "")
    if not text:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) in within):
        raise out_of_range("limit", text[:20], str(within))
    return int(text)


def is_descending(request: web.Request, default: str = "desc") -> bool:
    order = request.query.get("order") or default
    if order not in ("asc", "desc"):
        raise out_of_range("order", order[:20], '"asc" or "desc"')
    return order == "desc"


def after(request: web.Request) -> str | None:
    return request.query.get("after") or None


def flag(request: web.Request, name: str) -> bool:
    text = request.query.get(name, "").lower()
    if text not in ("", "true", "false", "1", "0"):
        raise RequestError(f"{name} must be true or false, got {text[:20]!r}", param=name)
    return text in ("true", "1")

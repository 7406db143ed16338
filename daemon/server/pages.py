"""/openapi.json, and /docs, which shows it. Neither needs a key: they are the same everywhere."""

from __future__ import annotations

import asyncio
import base64
import functools
import hashlib
import re
from importlib import resources

import msgspec
from aiohttp import web

from quantd.daemon.server.admin import ACTIONS
from quantd.daemon.server.context import CONTEXT


async def openapi(request: web.Request) -> web.Response:
    """Made by the first request for it, in a thread: that takes a moment."""
    has_admin = ACTIONS in request.app
    needs_key = request.app[CONTEXT].keys.required
    body = await asyncio.to_thread(_document, has_admin, needs_key)
    return web.Response(body=body, content_type="application/json")


@functools.cache
def _document(has_admin: bool, needs_key: bool) -> bytes:
    from quantd.daemon.server.openapi import document

    return msgspec.json.encode(document(has_admin=has_admin, needs_key=needs_key))


async def docs(request: web.Request) -> web.Response:
    page, policy = _page()
    headers = {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"}
    return web.Response(body=page, content_type="text/html", charset="utf-8", headers=headers)


@functools.cache
def _page() -> tuple[bytes, str]:
    """The page, and what it may do: run its own script and ask this server."""
    page = resources.files("quantd.daemon.server").joinpath("docs.html").read_bytes()
    hashes = {
        tag: base64.b64encode(hashlib.sha256(_inside(tag, page)).digest()).decode()
        for tag in ("script", "style")
    }
    policy = (
        f"default-src 'none'; script-src 'sha256-{hashes['script']}'; "
        f"style-src 'sha256-{hashes['style']}'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page, policy


def _inside(tag: str, page: bytes) -> bytes:
    found = re.search(rf"<{tag}>(.*)</{tag}>".encode(), page, re.DOTALL)
    assert found is not None
    return found[1]

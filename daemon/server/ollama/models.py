"""GET /api/tags, /api/ps, /api/version and POST /api/show. None of them wakes a model."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from aiohttp import web

from quantd.daemon.errors import RequestError
from quantd.daemon.server.body import read_body
from quantd.daemon.server.context import CONTEXT, Context
from quantd.daemon.server.models import json_response
from quantd.daemon.server.ollama.events import timestamp
from quantd.daemon.server.ollama.facts import Facts, facts_of
from quantd.daemon.server.ollama.run import own_name, tagged
from quantd.daemon.server.ollama.schemas import ShowRequest
from quantd.daemon.server.schemas import Json
from quantd.daemon.server.system import package_version
from quantd.daemon.text.format import AnswerFormat

if TYPE_CHECKING:
    from quantd.daemon.fleet import ModelStatus

API_VERSION = "0.12.11"
"""The release of Ollama whose API this is, the first with log probabilities. Its own clients read
it and ask for none; editors do (VS Code's for 0.6.4, Continue for 0.6.5). A newer number would
promise what was added since."""
_NEVER = "9999-12-31T23:59:59Z"
_PLAIN = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_SHOW = msgspec.json.Decoder(ShowRequest)


async def tags(request: web.Request) -> web.Response:
    """One entry for each name that a model answers to, as after Ollama's `cp`."""
    listed = []
    for status in request.app[CONTEXT].fleet.models():
        facts = await _facts(status)
        entry = {
            "modified_at": timestamp(facts.modified or status.created),
            "size": facts.size,
            "digest": facts.digest,
            "details": _details(status, facts),
        }
        listed += [_named(name) | entry for name in (status.name, *status.aliases)]
    return json_response({"models": listed})


async def ps(request: web.Request) -> web.Response:
    context = request.app[CONTEXT]
    listed = []
    for status in context.fleet.models():
        if status.info is None:
            continue
        facts = await _facts(status)
        size = _bytes_in_use(status)
        listed.append(
            _named(status.name)
            | {
                "size": size,
                "size_vram": 0 if status.info.device == "cpu" else size,
                "digest": facts.digest,
                "details": _details(status, facts),
                "expires_at": _expiry(status, context),
                "context_length": status.info.max_context,
            }
        )
    return json_response({"models": listed})


async def show(request: web.Request) -> web.Response:
    body = await read_body(request, _SHOW)
    name = body.model or body.name
    if not name:
        raise RequestError("model: this field is required", param="model")
    fleet = request.app[CONTEXT].fleet
    own = own_name(fleet, name)
    [status] = [status for status in fleet.models() if status.name == own]
    facts = await _facts(status)
    return json_response(
        {
            "modified_at": timestamp(facts.modified or status.created),
            "template": facts.templates.get("default", ""),
            "details": _details(status, facts),
            "model_info": _model_info(status, facts),
            "capabilities": _capabilities(status, facts),
        }
    )


async def version(request: web.Request) -> web.Response:
    return json_response({"version": API_VERSION, "quantd": package_version()})


async def home(request: web.Request) -> web.Response:
    """Ollama's clients ask here whether anybody is there."""
    return web.Response(text="quantd is running")


async def _facts(status: ModelStatus) -> Facts:
    return await asyncio.to_thread(facts_of, Path(status.path))


def _named(name: str) -> dict[str, Json]:
    return {"name": tagged(name), "model": tagged(name)}


def _details(status: ModelStatus, facts: Facts) -> dict[str, Json]:
    info = status.info
    count = facts.info.get("general.parameter_count") if info is None else info.num_parameters
    level = "" if info is None else _level(info.quantizers, info.dtype)
    return {
        "parent_model": "",
        "format": facts.format,
        "family": facts.family,
        "families": [facts.family] if facts.family else [],
        # Of folders these two are known of a model in memory only.
        "parameter_size": "" if count is None else _short(count),
        "quantization_level": facts.level or level,
    }


def _short(number: int) -> str:
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= unit:
            return f"{number / unit:.3g}{letter}"
    return str(number)


def _level(quantizers: tuple[tuple[str, int], ...], dtype: str) -> str:
    """The format of most layers."""
    name = max(quantizers, key=lambda pair: pair[1], default=("dense", 0))[0]
    return _PLAIN.get(dtype, dtype) if name == "dense" else name.upper()


def _model_info(status: ModelStatus, facts: Facts) -> dict[str, Json]:
    made = dict(facts.info)
    if status.max_context is not None and facts.family:
        made[f"{facts.family}.context_length"] = status.max_context
    if status.info is not None:
        made["general.parameter_count"] = status.info.num_parameters
    return made


def _capabilities(status: ModelStatus, facts: Facts) -> list[str]:
    task = facts.task if status.task == "auto" else status.task
    if status.info is not None:
        task = "generate" if status.info.pooling is None else status.info.pooling.task
    if task != "generate":
        return ["embedding"] if task == "embed" else []
    format = AnswerFormat.detect(facts.templates.values(), status.tool_dialect)
    made = ["completion"]
    if format.dialect is not None:
        made.append("tools")
    if format.reasons:
        made.append("thinking")
    return made


def _bytes_in_use(status: ModelStatus) -> int:
    """Weights, and the KV blocks that hold something."""
    assert status.info is not None
    kv = None if status.stats is None else status.stats.kv
    blocks = 0 if kv is None else kv.used + kv.cached
    return status.info.weight_bytes + blocks * status.info.block_bytes


def _expiry(status: ModelStatus, context: Context) -> str:
    if status.keep_alive < 0:
        return _NEVER
    left = status.keep_alive - (status.idle_seconds or 0.0)
    return timestamp(context.clock.wall() + max(left, 0.0))

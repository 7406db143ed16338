"""What every handler needs, put into the application once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aiohttp import web

from quantd.daemon.config import ServerSettings
from quantd.daemon.server.grammar import GrammarCheck

if TYPE_CHECKING:
    from quantd.daemon.fleet import Fleet
    from quantd.daemon.server.auth import ApiKeys
    from quantd.daemon.server.state import State
    from quantd.daemon.telemetry.metrics import Metrics


@dataclass(frozen=True, slots=True)
class Clock:
    """Time as the server sees it; tests put their own here."""

    wall: Callable[[], float] = time.time
    """Seconds since the epoch, for `created`."""
    monotonic: Callable[[], float] = time.monotonic
    """The engine's clock, for `Request.arrival`."""
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep


@dataclass(frozen=True, slots=True)
class Context:
    settings: ServerSettings
    fleet: Fleet
    metrics: Metrics
    keys: ApiKeys
    clock: Clock
    started: float
    """When the daemon came up, by `clock.monotonic`."""
    check_grammar: GrammarCheck
    state: State


@dataclass(frozen=True, slots=True)
class Asker:
    """On whose behalf a model works: of who sent a request, or of a batch's owner."""

    context: Context
    caller: str
    """The API key's name; "" without keys."""
    is_batch: bool = False

    @property
    def state(self) -> State:
        return self.context.state

    @property
    def fleet(self) -> Fleet:
        return self.context.fleet

    @property
    def clock(self) -> Clock:
        return self.context.clock


CONTEXT = web.AppKey("context", Context)
REQUEST_ID = web.RequestKey("request_id", str)
CALLER = web.RequestKey("caller", str)
"""The API key's name; "" without keys."""
ORIGIN = web.RequestKey("origin", str)
"""The Origin that was allowed; absent when the request has none."""


def asker(request: web.Request) -> Asker:
    return Asker(request.app[CONTEXT], request[CALLER])

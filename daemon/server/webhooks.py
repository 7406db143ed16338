"""Events to a URL of the operator's, as Standard Webhooks (standardwebhooks.com) has it.

An event is in the store with what it tells of, and leaves it when it was taken, or given up after
three days. What the other side may be is checked at each connection, for a name may resolve to
something else a minute later.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import ipaddress
import socket
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import structlog

from quantd.daemon.config import WebhookSettings
from quantd.daemon.errors import ConfigError
from quantd.daemon.server.context import Clock
from quantd.daemon.store import Event, Store
from quantd.daemon.store.rows import new_id

if TYPE_CHECKING:
    import aiohttp
    from aiohttp.abc import ResolveResult

_log = structlog.get_logger("quantd.webhooks")

_PREFIX = "whsec_"
_MIN_SECRET_BYTES = 16
DELAYS = (5.0, 30.0, 120.0, 600.0, 3600.0, 3600.0 * 6)
"""Seconds before each further attempt; the last one goes on."""
MAX_AGE = 3 * 86400
TIMEOUT = 15.0


class EventData(msgspec.Struct):
    id: str


class EventBody(msgspec.Struct):
    id: str
    type: str
    created_at: int
    data: EventData
    object: str = "event"


class ForbiddenTarget(OSError):
    """The URL leads to where events may not go."""


def read_secret(path: Path) -> bytes:
    """Raises ConfigError for what is not a secret."""
    try:
        text = path.read_text("ascii").strip()
        secret = base64.b64decode(text.removeprefix(_PREFIX), validate=True)
    except (OSError, UnicodeDecodeError, binascii.Error) as error:
        raise ConfigError(f"webhooks.secret_file {path}: {error}") from None
    if len(secret) < _MIN_SECRET_BYTES:
        raise ConfigError(
            f"webhooks.secret_file {path}: the secret has {len(secret)} bytes; at least "
            f"{_MIN_SECRET_BYTES} are needed, as `{_PREFIX}` and base64"
        )
    return secret


def signature(secret: bytes, id: str, timestamp: int, body: bytes) -> str:
    signed = b"%b.%d.%b" % (id.encode(), timestamp, body)
    return "v1," + base64.b64encode(hmac.digest(secret, signed, "sha256")).decode()


class Webhooks:
    """Event loop only."""

    def __init__(self, settings: WebhookSettings, store: Store, clock: Clock) -> None:
        """Raises ConfigError when the secret cannot be read."""
        self._settings = settings
        self._store = store
        self._clock = clock
        self._secret = b""
        if settings.url:
            assert settings.secret_file is not None, "the loader asks for it"
            self._secret = read_secret(settings.secret_file)
        self._sending: dict[str, asyncio.Task[None]] = {}
        self._waking: asyncio.Task[None] | None = None

    def event(self, kind: str, id: str) -> Event | None:
        """To be put into the store with what it tells of; None: nobody wants to know."""
        if not self._settings.url or kind not in (self._settings.events or (kind,)):
            return None
        now = int(self._clock.wall())
        body = EventBody(new_id("evt_"), kind, now, EventData(id))
        return Event(body.id, msgspec.json.encode(body), now)

    def wake(self) -> None:
        """There may be events in the store."""
        if self._settings.url and self._waking is None:
            self._waking = asyncio.create_task(self._start_all())
            self._waking.add_done_callback(self._woken)

    def _woken(self, task: asyncio.Task[None]) -> None:
        self._waking = None
        if not task.cancelled() and task.exception() is not None:
            _log.error("events cannot be read", exc_info=task.exception())

    async def stop(self) -> None:
        """What was not delivered is sent after the next start."""
        tasks = [*self._sending.values(), *([self._waking] if self._waking else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _start_all(self) -> None:
        for event in await self._store.outbox.all():
            if event.id not in self._sending:
                task = asyncio.create_task(self._deliver(event))
                self._sending[event.id] = task
                task.add_done_callback(partial(self._sent, event.id))

    def _sent(self, id: str, task: asyncio.Task[None]) -> None:
        del self._sending[id]
        if not task.cancelled() and task.exception() is not None:
            _log.error("an event cannot be sent", id=id, exc_info=task.exception())

    async def _deliver(self, event: Event) -> None:
        attempt = 0
        while (problem := await self._attempt(event)) is not None:
            given_up = self._clock.wall() - event.created_at > MAX_AGE
            _log.warning("an event was not taken", id=event.id, reason=problem, given_up=given_up)
            if given_up:
                break
            await self._clock.sleep(DELAYS[min(attempt, len(DELAYS) - 1)])
            attempt += 1
        await self._store.outbox.remove(event)

    async def _attempt(self, event: Event) -> str | None:
        """None: it was taken. A redirect is not followed: it could lead anywhere."""
        import aiohttp

        now = int(self._clock.wall())
        headers = {
            "Content-Type": "application/json",
            "User-Agent": "quantd",
            "webhook-id": event.id,
            "webhook-timestamp": str(now),
            "webhook-signature": signature(self._secret, event.id, now, event.body),
        }
        timeout = aiohttp.ClientTimeout(total=TIMEOUT)
        try:
            async with (
                aiohttp.ClientSession(connector=self._connector(), timeout=timeout) as session,
                session.post(
                    self._settings.url, data=event.body, headers=headers, allow_redirects=False
                ) as response,
            ):
                return None if 200 <= response.status < 300 else f"status {response.status}"
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            return str(error) or type(error).__name__

    def _connector(self) -> aiohttp.TCPConnector:
        import aiohttp

        if self._settings.allow_private:
            return aiohttp.TCPConnector()
        return _guarded_connector()


def _guarded_connector() -> aiohttp.TCPConnector:
    """Made here, so that an idle daemon has no HTTP client in memory."""
    import aiohttp

    class Guarded(aiohttp.TCPConnector):
        """Addresses are looked at when they are about to be connected to, literal ones too."""

        async def _resolve_host(
            self, host: str, port: int, traces: Any = None
        ) -> list[ResolveResult]:
            found = await super()._resolve_host(host, port, traces)
            for address in found:
                check_address(address["host"])
            return found

    return Guarded(use_dns_cache=False, family=socket.AF_UNSPEC)


def check_address(text: str) -> None:
    """Raises ForbiddenTarget unless it is an address of the open network."""
    address = ipaddress.ip_address(text.partition("%")[0])
    inner = getattr(address, "ipv4_mapped", None) or getattr(address, "sixtofour", None)
    for one in (address, inner):
        if one is not None and (not one.is_global or one.is_multicast):
            raise ForbiddenTarget(
                f"{text} is not a public address; webhooks.allow_private would allow it"
            )

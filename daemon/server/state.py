"""What outlives a request: the store, batches and responses at work, events to
be sent. One for both faces."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import structlog

from quantd.daemon.config import ServerSettings, Settings
from quantd.daemon.server.auth import ApiKeys
from quantd.daemon.server.background import Background
from quantd.daemon.server.batch_runner import BatchRunner
from quantd.daemon.server.context import Asker, Clock, Context
from quantd.daemon.server.grammar import GrammarCheck
from quantd.daemon.server.turns import Turns
from quantd.daemon.server.webhooks import Webhooks
from quantd.daemon.store import Store

if TYPE_CHECKING:
    from quantd.daemon.fleet import Fleet
    from quantd.daemon.telemetry.metrics import Metrics

_log = structlog.get_logger("quantd.store")


class State:
    """Made once; event loop only. Opens nothing until something is asked or was left behind."""

    def __init__(
        self, settings: Settings, fleet: Fleet, metrics: Metrics, clock: Clock | None = None
    ) -> None:
        """Raises ConfigError when the webhooks' secret cannot be read."""
        clock = clock or Clock()
        context = Context(
            settings.server,
            fleet,
            metrics,
            ApiKeys(),
            clock,
            clock.monotonic(),
            GrammarCheck(),
            self,
        )
        self.store = Store(settings.store)
        self.webhooks = Webhooks(settings.webhooks, self.store, clock)
        self.batches = BatchRunner(
            self.store,
            self.webhooks,
            lambda owner: Asker(context, owner, is_batch=True),
            settings.store.batch_lines,
            settings.server.body_limit_bytes,
        )
        self.background = Background(self.store, self.webhooks, clock)
        self.turns = Turns()
        self._resuming: asyncio.Task[None] | None = None

    def resume(self) -> None:
        """Goes on with what a former process has left, in the background."""
        if self.store.exists():
            self._resuming = asyncio.create_task(self._resume())

    async def _resume(self) -> None:
        try:
            await self.background.resume()
            await self.batches.resume()
            self.webhooks.wake()
        except Exception as error:
            _log.error("what was kept cannot be used", reason=str(error))

    async def stop(self) -> None:
        """What runs in the background is given up; it goes on after the next start."""
        if self._resuming is not None:
            self._resuming.cancel()
        await self.background.stop()
        await self.batches.stop()
        await self.webhooks.stop()

    async def close(self) -> None:
        """After the last request."""
        await self.store.close()


def no_state(
    server: ServerSettings, fleet: Fleet, metrics: Metrics, clock: Clock | None = None
) -> State:
    """Of a server that keeps nothing: what asks for it is answered with 503."""
    return State(Settings(server=server), fleet, metrics, clock)

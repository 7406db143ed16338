"""What outlives a request: the store, batches and responses at work, events to be sent. One for
both faces.
"""

from __future__ import annotations

import asyncio
from functools import cached_property
from typing import TYPE_CHECKING

import structlog

from quantd.daemon.config import ServerSettings, Settings
from quantd.daemon.safety import read_policies
from quantd.daemon.server.auth import ApiKeys
from quantd.daemon.server.context import Asker, Clock, Context
from quantd.daemon.server.grammar import GrammarCheck

if TYPE_CHECKING:
    from quantd.daemon.fleet import Fleet
    from quantd.daemon.server.batches.runner import BatchRunner
    from quantd.daemon.server.responses.background import Background
    from quantd.daemon.server.responses.turns import Turns
    from quantd.daemon.server.webhooks import Webhooks
    from quantd.daemon.store import Store
    from quantd.daemon.telemetry.metrics import Metrics

_log = structlog.get_logger("quantd.store")


class State:
    """Made once; event loop only. Each part is imported and made when it is first asked for, so a
    daemon that keeps nothing starts as fast, and is as small, as if there were none of this."""

    def __init__(
        self, settings: Settings, fleet: Fleet, metrics: Metrics, clock: Clock | None = None
    ) -> None:
        """Raises ConfigError when the webhooks' secret cannot be read, or a policy is wrong."""
        self._settings = settings
        self._fleet = fleet
        self._metrics = metrics
        self._clock = clock or Clock()
        self._resuming: asyncio.Task[None] | None = None
        self.policies = read_policies(settings)
        """Of the safety filter; a reload puts others in their place, all at once."""
        if settings.webhooks.url:
            _ = self.webhooks

    @cached_property
    def store(self) -> Store:
        from quantd.daemon.store import Store

        return Store(self._settings.store, self._fleet.forget)

    @cached_property
    def webhooks(self) -> Webhooks:
        from quantd.daemon.server.webhooks import Webhooks

        return Webhooks(self._settings.webhooks, self.store, self._clock)

    @cached_property
    def batches(self) -> BatchRunner:
        from quantd.daemon.server.batches.runner import BatchRunner

        server, clock = self._settings.server, self._clock
        context = Context(
            server,
            self._fleet,
            self._metrics,
            ApiKeys(),
            clock,
            clock.monotonic(),
            GrammarCheck(),
            self,
        )
        return BatchRunner(
            self.store,
            self.webhooks,
            lambda owner: Asker(context, owner, is_batch=True),
            self._settings.store.batch_lines,
            server.body_limit_bytes,
        )

    @cached_property
    def background(self) -> Background:
        from quantd.daemon.server.responses.background import Background

        return Background(self.store, self.webhooks, self._clock)

    @cached_property
    def turns(self) -> Turns:
        from quantd.daemon.server.responses.turns import Turns

        return Turns()

    @property
    def num_batches(self) -> int:
        """That have not ended."""
        return self.batches.num_running if "batches" in self.__dict__ else 0

    def resume(self) -> None:
        """Goes on with what a former process has left, in the background."""
        folder = self._settings.store.path
        if folder is not None and folder.exists() and self.store.exists():
            self._resuming = asyncio.create_task(self._resume())

    async def _resume(self) -> None:
        try:
            await self.background.resume()
            await self.batches.resume()
            self.webhooks.wake()
        except Exception as error:
            _log.error("what was kept cannot be used", reason=str(error))

    async def stop(self) -> None:
        """What runs in the background is given up; batches go on after the next start."""
        if self._resuming is not None:
            self._resuming.cancel()
        for name in ("background", "batches", "webhooks"):
            if name in self.__dict__:
                await getattr(self, name).stop()

    async def close(self) -> None:
        """After the last request."""
        if "store" in self.__dict__:
            await self.store.close()


def no_state(
    server: ServerSettings, fleet: Fleet, metrics: Metrics, clock: Clock | None = None
) -> State:
    """Of a server that keeps nothing: what asks for it is answered with 503."""
    return State(Settings(server=server), fleet, metrics, clock)

"""The right to use a model: as long as it is held, the model is not unloaded."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

from quantd.daemon.engine.engine import Engine
from quantd.daemon.fleet.resident import Resident
from quantd.daemon.text import TextModel
from quantd.daemon.types import Grammar, ModelInfo


class Lease:
    """Held from `Fleet.lease` until the end of the `async with` block, or `release`.

    It keeps the model from being unloaded, not from dying: then `engine.submit` raises, streams
    end with an error, and a new lease waits for the model to be loaded again.
    """

    __slots__ = ("name", "_resident", "_release", "_keep")

    def __init__(
        self,
        name: str,
        resident: Resident,
        release: Callable[[], None],
        keep: Callable[[float], None],
    ) -> None:
        self.name = name
        """The model's own name, also when an alias was asked for."""
        self._resident = resident
        self._release: Callable[[], None] | None = release
        self._keep = keep

    @property
    def info(self) -> ModelInfo:
        return self._resident.info

    @property
    def engine(self) -> Engine:
        return self._resident.engine

    @property
    def text(self) -> TextModel:
        return self._resident.text

    async def prepare(self, grammar: Grammar) -> None:
        """To be awaited before a request with this grammar is submitted: nobody else's step waits
        for its compiler then. Raises RequestError for one that this model cannot follow."""
        await self._resident.prepare(grammar)

    def keep(self, seconds: float) -> None:
        """How long the model stays without a request, -1 for ever, in place of its `keep_alive`:
        until it is unloaded or this is called again, by anyone."""
        self._keep(seconds)

    def release(self) -> None:
        """Gives it back; idempotent."""
        if self._release is not None:
            release, self._release = self._release, None
            release()

    async def __aenter__(self) -> Lease:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()

"""Events that are still to be sent. Put in with what they tell of, so that none is lost."""

from __future__ import annotations

from dataclasses import dataclass

from quantd.daemon.store.database import Connection, Database
from quantd.daemon.store.rows import Table


@dataclass(frozen=True, slots=True)
class Event:
    id: str
    body: bytes
    """What is sent, encoded."""
    created_at: int


_EVENTS = Table("events", Event)


def put(db: Connection, event: Event) -> None:
    """Part of the caller's transaction."""
    _EVENTS.insert(db, event)


class Outbox:
    """Owned by `Store`; all calls on the event loop."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def all(self) -> list[Event]:
        return await self._database.run(lambda db: _EVENTS.select(db, "1 ORDER BY created_at, id"))

    async def remove(self, event: Event) -> None:
        """It was delivered, or given up."""
        query = "DELETE FROM events WHERE id = ?"
        await self._database.run(lambda db: db.execute(query, (event.id,)))

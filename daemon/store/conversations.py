"""Conversations: a list of items that responses append to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quantd.daemon.errors import NotFound, RequestError
from quantd.daemon.store import items
from quantd.daemon.store.bounds import Bounds, OnGone, touch
from quantd.daemon.store.database import Connection, Database
from quantd.daemon.store.items import Item
from quantd.daemon.store.rows import Page, Table


@dataclass(frozen=True, slots=True)
class Conversation:
    id: str
    owner: str
    created_at: int
    used_at: int
    num_bytes: int
    metadata: bytes
    """A JSON object, which only the server reads."""


_CONVERSATIONS = Table("conversations", Conversation)


class Conversations:
    """Owned by `Store`; all calls on the event loop. Each raises NotFound for what is not there,
    or another owner's."""

    def __init__(self, database: Database, bounds: Bounds, on_gone: OnGone) -> None:
        self._database = database
        self._bounds = bounds
        self._on_gone = on_gone

    async def add(self, conversation: Conversation, first: Sequence[Item]) -> None:
        def add(db: Connection) -> list[str]:
            _CONVERSATIONS.insert(db, conversation)
            append(db, conversation.owner, conversation.id, first, conversation.used_at)
            return self._bounds.enforce(db, conversation.used_at, conversation.id)

        for id in await self._database.run(add):
            self._on_gone(id)

    async def get(self, owner: str, id: str, now: int) -> Conversation:
        def get(db: Connection) -> Conversation:
            found = self._find(db, owner, id, now)
            touch(db, "conversations", id, now)
            return found

        return await self._database.run(get)

    async def update(self, owner: str, id: str, metadata: bytes, now: int) -> Conversation:
        def update(db: Connection) -> Conversation:
            self._find(db, owner, id, now)
            db.execute(
                "UPDATE conversations SET metadata = ?, used_at = ? WHERE id = ?",
                (metadata, now, id),
            )
            return self._find(db, owner, id, now)

        return await self._database.run(update)

    async def delete(self, owner: str, id: str, now: int) -> None:
        """With its items."""

        def delete(db: Connection) -> None:
            self._find(db, owner, id, now)
            db.execute("DELETE FROM conversations WHERE id = ?", (id,))

        await self._database.run(delete)
        self._on_gone(id)

    async def append(self, owner: str, id: str, more: Sequence[Item], now: int) -> None:
        """Raises RequestError, too, for an item that is there already."""

        def add(db: Connection) -> list[str]:
            self._find(db, owner, id, now)
            for index, item in enumerate(more):
                if items.one(db, id, item.id) is not None:
                    raise RequestError(
                        f"items[{index}].id: an item {item.id!r} is in the conversation already",
                        param=f"items[{index}].id",
                        code="duplicate_item",
                    )
            append(db, owner, id, more, now)
            return self._bounds.enforce(db, now, id)

        for gone in await self._database.run(add):
            self._on_gone(gone)

    async def items(self, owner: str, id: str, now: int) -> list[Item]:
        def read(db: Connection) -> list[Item]:
            self._find(db, owner, id, now)
            touch(db, "conversations", id, now)
            return items.of(db, id)

        return await self._database.run(read)

    async def page(
        self, owner: str, id: str, now: int, *, after: str | None, limit: int, descending: bool
    ) -> Page[Item]:
        def page(db: Connection) -> Page[Item]:
            self._find(db, owner, id, now)
            return items.page(db, id, after=after, limit=limit, descending=descending)

        return await self._database.run(page)

    async def item(self, owner: str, id: str, item_id: str, now: int) -> Item:
        def read(db: Connection) -> Item:
            self._find(db, owner, id, now)
            found = items.one(db, id, item_id)
            if found is None:
                raise NotFound(f"Item with id '{item_id}' not found in it.", param="item_id")
            return found

        return await self._database.run(read)

    async def delete_item(self, owner: str, id: str, item_id: str, now: int) -> Conversation:
        def delete(db: Connection) -> Conversation:
            self._find(db, owner, id, now)
            found = items.one(db, id, item_id)
            if found is None:
                raise NotFound(f"Item with id '{item_id}' not found in it.", param="item_id")
            db.execute("DELETE FROM items WHERE holder = ? AND id = ?", (id, item_id))
            db.execute(
                "UPDATE conversations SET num_bytes = num_bytes - ?, used_at = ? WHERE id = ?",
                (len(found.body), now, id),
            )
            return self._find(db, owner, id, now)

        left = await self._database.run(delete)
        self._on_gone(id)
        return left

    def _find(self, db: Connection, owner: str, id: str, now: int) -> Conversation:
        where = "id = ? AND owner = ? AND used_at > ?"
        found = _CONVERSATIONS.select(db, where, id, owner, self._bounds.since(now))
        if not found:
            raise NotFound(f"Conversation with id '{id}' not found.", param="conversation")
        return found[0]


def append(db: Connection, owner: str, id: str, more: Sequence[Item], now: int) -> None:
    """Part of the caller's transaction; nothing happens where the conversation is gone."""
    there = db.execute("SELECT 1 FROM conversations WHERE id = ? AND owner = ?", (id, owner))
    if there.fetchone() is None:
        return
    before = len(items.of(db, id))
    items.put(db, id, owner, more)
    added = items.of(db, id)[before:]
    db.execute(
        "UPDATE conversations SET num_bytes = num_bytes + ?, used_at = ? WHERE id = ?",
        (items.size(added), now, id),
    )

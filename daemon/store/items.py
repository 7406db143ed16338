"""Items: what was said, called and answered, in order; of a response or of a conversation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quantd.daemon.store.database import Connection
from quantd.daemon.store.rows import Page, Table


@dataclass(frozen=True, slots=True)
class Item:
    id: str
    body: bytes
    """JSON, which only the server reads."""


_ITEMS = Table("items", Item)


def put(
    db: Connection, holder: str, owner: str, items: Sequence[Item], is_output: bool | None = None
) -> None:
    """At the end of the holder's. An item that is there already stays as it is."""
    db.executemany(
        "INSERT OR IGNORE INTO items (holder, id, owner, is_output, body) VALUES (?, ?, ?, ?, ?)",
        [(holder, item.id, owner, is_output, item.body) for item in items],
    )


def of(db: Connection, holder: str) -> list[Item]:
    return _ITEMS.select(db, "holder = ? ORDER BY seq", holder)


def one(db: Connection, holder: str, id: str) -> Item | None:
    found = _ITEMS.select(db, "holder = ? AND id = ?", holder, id)
    return found[0] if found else None


def page(
    db: Connection,
    holder: str,
    *,
    after: str | None,
    limit: int,
    descending: bool,
    inputs_only: bool = False,
) -> Page[Item]:
    where = "holder = ?" + (" AND is_output = 0" if inputs_only else "")
    return _ITEMS.page(db, where, [holder], after=after, limit=limit, descending=descending)


def size(items: Sequence[Item]) -> int:
    return sum(len(item.body) for item in items)

"""How much of what was said is kept, and for how long: the least recently used goes first."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from quantd.daemon.store.database import Connection

TOUCH_SECONDS = 3600
"""Uses are noted this exactly: else every reading would be a write."""
UNFINISHED = ("queued", "in_progress")
"""A response in one of these is being made, and stays."""
OnGone = Callable[[str], None]
"""Told the id of each response and conversation of which something is there no more, however it
went; on the event loop, when it has gone."""


class Bounds(NamedTuple):
    num_bytes: int
    seconds: float
    """Since the last use; negative: for ever."""

    def since(self, now: int) -> int:
        """What was used last at this time or before is gone."""
        return -1 if self.seconds < 0 else int(now - self.seconds)

    def enforce(self, db: Connection, now: int, kept_id: str) -> list[str]:
        """Removes what is too old, then what is too much; never `kept_id`, just written. Gives the
        ids of what is gone."""
        over = self.since(now)
        marks = "status NOT IN ('queued', 'in_progress')"
        gone: list[str] = []
        for old in (
            f"responses WHERE used_at <= ? AND {marks}",
            "conversations WHERE used_at <= ?",
        ):
            rows = db.execute(f"DELETE FROM {old} RETURNING id", (over,))
            gone += [id for (id,) in rows.fetchall()]
        query = (
            f"SELECT used_at, seq, 'responses', id FROM responses WHERE {marks} AND id != ? "
            "UNION ALL SELECT used_at, seq, 'conversations', id FROM conversations WHERE id != ? "
            "ORDER BY 1, 2 LIMIT 100"
        )
        while _kept(db) > self.num_bytes:
            oldest = db.execute(query, (kept_id, kept_id)).fetchall()
            if not oldest:
                break
            for _, _, table, id in oldest:
                db.execute(f"DELETE FROM {table} WHERE id = ?", (id,))
                gone.append(id)
                if _kept(db) <= self.num_bytes:
                    break
        return gone


def touch(db: Connection, table: str, id: str, now: int) -> None:
    db.execute(
        f"UPDATE {table} SET used_at = ? WHERE id = ? AND used_at < ?",
        (now, id, now - TOUCH_SECONDS),
    )


def _kept(db: Connection) -> int:
    num_bytes: int = db.execute("SELECT num_bytes FROM kept").fetchone()[0]
    return num_bytes

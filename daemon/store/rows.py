"""Rows as the dataclass of the same fields, and pages of a list."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Sequence
from typing import Any, Generic, NamedTuple, TypeVar

from quantd.daemon.errors import NotFound
from quantd.daemon.store.database import Connection

R = TypeVar("R")


def new_id(prefix: str) -> str:
    return prefix + uuid.uuid4().hex


class Page(NamedTuple, Generic[R]):
    items: list[R]
    has_more: bool


class Table(Generic[R]):
    """SELECTs of one table whose rows are `struct`s; names of fields are names of columns."""

    def __init__(self, name: str, struct: type[R]) -> None:
        self.name = name
        self._struct = struct
        self._fields = [field.name for field in dataclasses.fields(struct)]  # type: ignore[arg-type]
        self._columns = ", ".join(self._fields)

    def select(self, db: Connection, where: str, *values: Any) -> list[R]:
        query = f"SELECT {self._columns} FROM {self.name} WHERE {where}"
        return [self._struct(*row) for row in db.execute(query, values)]

    def insert(self, db: Connection, row: R) -> None:
        marks = ", ".join("?" * len(self._fields))
        values = [getattr(row, name) for name in self._fields]
        db.execute(f"INSERT INTO {self.name} ({self._columns}) VALUES ({marks})", values)

    def page(
        self,
        db: Connection,
        where: str,
        values: Sequence[Any],
        *,
        after: str | None,
        limit: int,
        descending: bool,
        order: str = "seq",
    ) -> Page[R]:
        """`limit` rows in the order in which they were made, from behind the id `after` on. Raises
        NotFound when that id is not in the list."""
        values = [*values]
        if after is not None:
            found = db.execute(
                f"SELECT {order} FROM {self.name} WHERE id = ? AND {where}", (after, *values)
            ).fetchone()
            if found is None:
                raise NotFound(f"after: there is no {after!r} in this list", param="after")
            where += f" AND {order} {'<' if descending else '>'} ?"
            values.append(found[0])
        direction = "DESC" if descending else "ASC"
        where += f" ORDER BY {order} {direction} LIMIT {limit + 1}"
        rows = self.select(db, where, *values)
        return Page(rows[:limit], len(rows) > limit)

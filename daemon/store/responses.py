"""Responses and the chains that they form: each names the one before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quantd.daemon.errors import NotFound, RequestError
from quantd.daemon.store import conversations, items, outbox
from quantd.daemon.store.bounds import UNFINISHED, Bounds, OnGone, touch
from quantd.daemon.store.database import Connection, Database
from quantd.daemon.store.items import Item
from quantd.daemon.store.outbox import Event
from quantd.daemon.store.rows import Page, Table


@dataclass(frozen=True, slots=True)
class Response:
    id: str
    owner: str
    previous: str | None
    """The id of the one before it."""
    status: str
    created_at: int
    used_at: int
    num_bytes: int
    body: bytes
    """The response object, as JSON."""
    stream: bytes | None = None
    """The events of one that was made in the background and streamed, as they were sent."""


_RESPONSES = Table("responses", Response)


class Responses:
    """Owned by `Store`; all calls on the event loop."""

    def __init__(self, database: Database, bounds: Bounds, on_gone: OnGone) -> None:
        self._database = database
        self._bounds = bounds
        self._on_gone = on_gone

    async def begin(self, response: Response, inputs: Sequence[Item]) -> None:
        """One that will be made in the background."""

        def begin(db: Connection) -> None:
            _RESPONSES.insert(db, response)
            items.put(db, response.id, response.owner, inputs, is_output=False)

        await self._database.run(begin)

    async def finish(
        self,
        response: Response,
        inputs: Sequence[Item],
        outputs: Sequence[Item],
        conversation: str | None = None,
        event: Event | None = None,
    ) -> None:
        """One that is made, with what was said; all or nothing. No effect on one that has
        ended before. A conversation that is gone by now gets nothing."""

        def finish(db: Connection) -> list[str]:
            begun = db.execute("SELECT status FROM responses WHERE id = ?", (response.id,))
            row = begun.fetchone()
            if row is not None and row[0] not in UNFINISHED:
                return []
            if row is None:
                _RESPONSES.insert(db, response)
            else:
                _update(db, response)
            items.put(db, response.id, response.owner, inputs, is_output=False)
            items.put(db, response.id, response.owner, outputs, is_output=True)
            if conversation is not None:
                said = [*inputs, *outputs]
                conversations.append(db, response.owner, conversation, said, response.used_at)
            gone = self._bounds.enforce(db, response.used_at, response.id)
            if event is not None:
                outbox.put(db, event)
            return gone

        for id in await self._database.run(finish):
            self._on_gone(id)

    async def change(self, id: str, body: bytes, status: str) -> None:
        """The object of one that is being made; no effect if it has ended."""
        query = (
            "UPDATE responses SET body = ?, status = ? "
            "WHERE id = ? AND status IN ('queued', 'in_progress')"
        )
        await self._database.run(lambda db: db.execute(query, (body, status, id)))

    async def get(self, owner: str, id: str, now: int) -> Response:
        """Raises NotFound, also for another owner's."""

        def get(db: Connection) -> Response:
            found = self._find(db, owner, id, now)
            touch(db, "responses", id, now)
            return found

        return await self._database.run(get)

    async def unfinished(self) -> list[Response]:
        """What a former process was making in the background."""
        return await self._database.run(
            lambda db: _RESPONSES.select(db, "status IN ('queued', 'in_progress')")
        )

    async def chain(self, owner: str, id: str, now: int) -> list[Item]:
        """All that was said up to and with this response, in order. Raises RequestError when a
        part of it is gone, or not yet there."""

        def chain(db: Connection) -> list[Item]:
            parts: list[list[Item]] = []
            at: str | None = id
            while at is not None:
                response = self._link(db, owner, at, id, now)
                touch(db, "responses", at, now)
                parts.append(items.of(db, at))
                at = response.previous
            return [item for part in reversed(parts) for item in part]

        return await self._database.run(chain)

    def _link(self, db: Connection, owner: str, at: str, id: str, now: int) -> Response:
        try:
            response = self._find(db, owner, at, now)
        except NotFound:
            what = f"Previous response with id '{id}' not found."
            if at != id:
                what = f"The response '{at}', which '{id}' follows on, is not there any more."
            raise NotFound(
                what, param="previous_response_id", code="previous_response_not_found"
            ) from None
        if response.status in UNFINISHED:
            raise RequestError(
                f"The response '{at}' is {response.status}: it can be followed when it has ended.",
                param="previous_response_id",
                code="previous_response_not_finished",
            )
        return response

    async def inputs(
        self, owner: str, id: str, now: int, *, after: str | None, limit: int, descending: bool
    ) -> Page[Item]:
        """The response's own input. Raises NotFound."""

        def page(db: Connection) -> Page[Item]:
            self._find(db, owner, id, now)
            return items.page(
                db, id, after=after, limit=limit, descending=descending, inputs_only=True
            )

        return await self._database.run(page)

    async def item(self, owner: str, id: str) -> Item:
        """Any item of this owner's, wherever it is. Raises NotFound."""

        def find(db: Connection) -> Item:
            query = "SELECT holder FROM items WHERE id = ? AND owner = ? LIMIT 1"
            found = db.execute(query, (id, owner)).fetchone()
            item = None if found is None else items.one(db, found[0], id)
            if item is None:
                raise NotFound(f"Item with id '{id}' not found.", param="input")
            return item

        return await self._database.run(find)

    async def delete(self, owner: str, id: str, now: int) -> None:
        """With what was said in it. Raises NotFound."""

        def delete(db: Connection) -> None:
            self._find(db, owner, id, now)
            db.execute("DELETE FROM responses WHERE id = ?", (id,))

        await self._database.run(delete)
        self._on_gone(id)

    def _find(self, db: Connection, owner: str, id: str, now: int) -> Response:
        where = "id = ? AND owner = ? AND used_at > ?"
        found = _RESPONSES.select(db, where, id, owner, self._bounds.since(now))
        if not found:
            raise NotFound(f"Response with id '{id}' not found.", param="response_id")
        return found[0]


def _update(db: Connection, response: Response) -> None:
    db.execute(
        "UPDATE responses SET status = ?, used_at = ?, num_bytes = ?, body = ?, stream = ? "
        "WHERE id = ?",
        (
            response.status,
            response.used_at,
            response.num_bytes,
            response.body,
            response.stream,
            response.id,
        ),
    )

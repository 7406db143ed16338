"""Batches and their lines.

A line's result and its mark are one row, so a line has run exactly when its result is here: that is
what makes each `custom_id` come out once, whenever the process is killed. Files are made of the
results when all are there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from quantd.daemon.errors import NotFound
from quantd.daemon.store import files, outbox
from quantd.daemon.store.database import Connection, Database
from quantd.daemon.store.files import UNFINISHED, File, Files, Upload
from quantd.daemon.store.outbox import Event
from quantd.daemon.store.rows import Page, Table

_PAGE_LINES = 500
"""Results read in one transaction: others wait for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """OpenAI's fields; `metadata` and `errors` are JSON, which only the server reads."""

    id: str
    owner: str
    endpoint: str
    input_file_id: str
    completion_window: str
    created_at: int
    expires_at: int
    metadata: bytes | None = None
    output_seconds: int | None = None
    """How long the files that come of it are kept; None: for ever."""
    status: str = "validating"
    outcome: str | None = None
    """What `status` becomes when it is finalized."""
    model: str | None = None
    """The lines' one model; None: they name several."""
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    errors: bytes | None = None
    total: int = 0
    completed: int = 0
    failed: int = 0
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0

    @property
    def has_ended(self) -> bool:
        return self.status not in UNFINISHED


class Line(NamedTuple):
    """One request of a batch: where it stands in the input file, in bytes."""

    number: int
    """Counted from 1, as an editor does."""
    custom_id: str
    start: int
    length: int


class Result(NamedTuple):
    """What a line came to."""

    line: Line
    text: bytes
    """A line of the output or error file, without its end."""
    has_failed: bool
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0


class _Rows(Table[Batch]):
    """Fields of `Batch` are by keyword only."""

    def select(self, db: Connection, where: str, *values: Any) -> list[Batch]:
        query = f"SELECT {self._columns} FROM {self.name} WHERE {where}"
        rows = db.execute(query, values)
        return [Batch(**dict(zip(self._fields, row, strict=True))) for row in rows]


_BATCHES = _Rows("batches", Batch)


class Batches:
    """Owned by `Store`; all calls on the event loop. Who runs a batch is its only writer, but for
    `cancel`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    # --- what clients ask --------------------------------------------------------------------

    async def add(self, batch: Batch) -> None:
        """Raises NotFound when its input file is not there for its owner."""

        def add(db: Connection) -> None:
            files.find(db, batch.owner, batch.input_file_id, batch.created_at)
            _BATCHES.insert(db, batch)

        await self._database.run(add)

    async def get(self, owner: str, id: str) -> Batch:
        """Raises NotFound, also for another owner's."""
        return await self._database.run(lambda db: _find(db, owner, id))

    async def page(self, owner: str, *, after: str | None, limit: int) -> Page[Batch]:
        """The newest first."""
        return await self._database.run(
            lambda db: _BATCHES.page(
                db, "owner = ?", [owner], after=after, limit=limit, descending=True
            )
        )

    async def cancel(self, owner: str, id: str, now: int) -> Batch:
        """As it is afterwards: "cancelling" if it was validating or in progress, else unchanged."""

        def cancel(db: Connection) -> Batch:
            _find(db, owner, id)
            db.execute(
                "UPDATE batches SET status = 'cancelling', cancelling_at = ? "
                "WHERE id = ? AND status IN ('validating', 'in_progress')",
                (now, id),
            )
            return _find(db, owner, id)

        return await self._database.run(cancel)

    async def unfinished(self) -> list[Batch]:
        """Everybody's, the oldest first."""
        marks = ", ".join("?" * len(UNFINISHED))
        return await self._database.run(
            lambda db: _BATCHES.select(db, f"status IN ({marks}) ORDER BY seq", *UNFINISHED)
        )

    # --- what the one who runs it does -------------------------------------------------------

    async def refuse(self, batch: Batch, errors: bytes, now: int, event: Event | None) -> None:
        """The input is not valid: the batch has failed, unless it was cancelled meanwhile."""

        def refuse(db: Connection) -> None:
            changed = db.execute(
                "UPDATE batches SET status = 'failed', failed_at = ?, errors = ? "
                "WHERE id = ? AND status = 'validating'",
                (now, errors, batch.id),
            )
            if changed.rowcount and event is not None:
                outbox.put(db, event)

        await self._database.run(refuse)

    async def begin(self, batch: Batch, lines: Sequence[Line], model: str | None, now: int) -> None:
        """The input is valid: from "validating" to "in_progress", with all lines to be run. Of a
        batch that was cancelled meanwhile, the lines are there too, so that each is answered."""

        def begin(db: Connection) -> None:
            columns = "batch, number, custom_id, start, length"
            db.executemany(
                f"INSERT INTO lines ({columns}) VALUES (?, ?, ?, ?, ?)",
                [(batch.id, *line) for line in lines],
            )
            db.execute(
                "UPDATE batches SET total = ?, model = ? WHERE id = ?",
                (len(lines), model, batch.id),
            )
            db.execute(
                "UPDATE batches SET status = 'in_progress', in_progress_at = ? "
                "WHERE id = ? AND status = 'validating'",
                (now, batch.id),
            )

        await self._database.run(begin)

    async def pending(self, batch: Batch, behind: int, limit: int) -> list[Line]:
        """Lines that have not run, in order, from behind the line number `behind` on."""
        query = (
            "SELECT number, custom_id, start, length FROM lines "
            "WHERE batch = ? AND number > ? AND has_failed IS NULL ORDER BY number LIMIT ?"
        )
        return await self._database.run(
            lambda db: [Line(*row) for row in db.execute(query, (batch.id, behind, limit))]
        )

    async def record(self, batch: Batch, result: Result) -> None:
        """A line has run; a second result of it changes nothing."""
        await self._database.run(lambda db: _record(db, batch, result))

    async def finalize(self, batch: Batch, outcome: str, unrun: Sequence[Result], now: int) -> None:
        """No line runs any more: `unrun` is what those came to that never did."""

        def finalize(db: Connection) -> None:
            for result in unrun:
                _record(db, batch, result)
            db.execute(
                "UPDATE batches SET status = 'finalizing', outcome = ?, finalizing_at = ? "
                "WHERE id = ? AND outcome IS NULL",
                (outcome, now, batch.id),
            )

        await self._database.run(finalize)

    async def finish(self, batch: Batch, store: Files, now: int, event: Event | None) -> None:
        """Makes the files of a batch that is finalized, and ends it. Each part can be done again
        after a crash: the files count only with the transaction that ends the batch."""
        outputs = await self._write(batch, store, False)
        errors = await self._write(batch, store, True)
        made = [file for file in (outputs, errors) if file is not None]
        ids = [None if upload is None else upload.id for upload in (outputs, errors)]
        expires = None if batch.output_seconds is None else now + batch.output_seconds

        def finish(db: Connection) -> None:
            outcome: str = db.execute(
                "SELECT outcome FROM batches WHERE id = ?", (batch.id,)
            ).fetchone()[0]
            for upload, kind in ((outputs, "output"), (errors, "error")):
                if upload is not None:
                    name = f"{batch.id}_{kind}.jsonl"
                    file = File(
                        upload.id, batch.owner, name, "batch_output", upload.num_bytes, now, expires
                    )
                    files.insert(db, file)
            db.execute(
                f"UPDATE batches SET status = outcome, {outcome}_at = ?, output_file_id = ?, "
                "error_file_id = ? WHERE id = ?",
                (now, *ids, batch.id),
            )
            db.execute("DELETE FROM lines WHERE batch = ?", (batch.id,))
            if event is not None:
                outbox.put(db, event)

        try:
            await self._database.run(finish)
        except Exception:
            for upload in made:
                (store.folder / upload.id).unlink(missing_ok=True)
            raise
        await self._database.run(_give_back)

    async def _write(self, batch: Batch, store: Files, has_failed: bool) -> Upload | None:
        """A file of all results of one kind; None: there are none."""
        query = (
            "SELECT number, result FROM lines WHERE batch = ? AND number > ? AND has_failed = ? "
            f"ORDER BY number LIMIT {_PAGE_LINES}"
        )
        behind = 0
        async with Upload(store.folder, 1 << 62) as upload:
            while True:
                values = (batch.id, behind, has_failed)
                rows = await self._database.run(partial(_fetch_all, query, values))
                if not rows:
                    break
                behind = rows[-1][0]
                await upload.write(b"".join(text + b"\n" for _, text in rows))
            if upload.num_bytes:
                await asyncio.to_thread(upload.finish)
                return upload
        return None


def _find(db: Connection, owner: str, id: str) -> Batch:
    found = _BATCHES.select(db, "id = ? AND owner = ?", id, owner)
    if not found:
        raise NotFound(f"No batch found with id '{id}'.", param="id")
    return found[0]


def _record(db: Connection, batch: Batch, result: Result) -> None:
    changed = db.execute(
        "UPDATE lines SET has_failed = ?, result = ? "
        "WHERE batch = ? AND number = ? AND has_failed IS NULL",
        (result.has_failed, result.text, batch.id, result.line.number),
    )
    if not changed.rowcount:
        return
    counter = "failed" if result.has_failed else "completed"
    db.execute(
        f"UPDATE batches SET {counter} = {counter} + 1, input_tokens = input_tokens + ?, "
        "cached_tokens = cached_tokens + ?, output_tokens = output_tokens + ?, "
        "reasoning_tokens = reasoning_tokens + ? WHERE id = ?",
        (
            result.input_tokens,
            result.cached_tokens,
            result.output_tokens,
            result.reasoning_tokens,
            batch.id,
        ),
    )


def _fetch_all(query: str, values: tuple[Any, ...], db: Connection) -> list[Any]:
    return db.execute(query, values).fetchall()


def _give_back(db: Connection) -> None:
    """To the file system, what the results took."""
    db.execute("PRAGMA incremental_vacuum").fetchall()

"""Files: a row for each, and its bytes in a file whose name is the id."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from quantd.daemon.errors import BodyTooLarge, Conflict, NotFound, StorageFull
from quantd.daemon.store.database import Connection, Database, explained
from quantd.daemon.store.rows import Page, Table, new_id

FOLDER = "files"
_PART = ".part"
_CHUNK_BYTES = 1 << 20
UNFINISHED = ("validating", "in_progress", "finalizing", "cancelling")
"""A batch in one of these still reads its input."""
_IN_USE = (
    "SELECT 1 FROM batches WHERE input_file_id = files.id AND status IN "
    "('validating', 'in_progress', 'finalizing', 'cancelling')"
)


@dataclass(frozen=True, slots=True)
class File:
    id: str
    owner: str
    filename: str
    """As the client gave it; never part of a path."""
    purpose: str
    bytes: int
    created_at: int
    """Seconds since the epoch, as all times here."""
    expires_at: int | None


_FILES = Table("files", File)


class Upload:
    """Bytes on their way to a file; a context that leaves nothing behind unless `Files.keep` took
    them. One writer."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.id = new_id("file-")
        self.num_bytes = 0
        self._limit = limit
        self._folder = folder
        self.path = folder / (self.id + _PART)
        self._buffer = bytearray()
        self._file = -1

    async def write(self, data: bytes) -> None:
        """Raises BodyTooLarge over the limit, StorageFull, StoreUnavailable."""
        self.num_bytes += len(data)
        if self.num_bytes > self._limit:
            raise BodyTooLarge(
                f"the file is larger than the limit of {self._limit} bytes (store.file_bytes)",
                param="file",
            )
        self._buffer += data
        if len(self._buffer) >= _CHUNK_BYTES:
            await asyncio.to_thread(self.flush)

    def flush(self) -> None:
        """Blocks."""
        with explained(self._folder):
            if self._file < 0:
                self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            view = memoryview(bytes(self._buffer))
            while view:
                view = view[os.write(self._file, view) :]
            self._buffer.clear()

    def finish(self) -> None:
        """The bytes are on the disk and the file has its name. Blocks."""
        self.flush()
        with explained(self._folder):
            os.fsync(self._file)
            os.rename(self.path, self._folder / self.id)
            _sync_folder(self._folder)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        if self._file >= 0:
            os.close(self._file)
            self.path.unlink(missing_ok=True)


class Files:
    """Owned by `Store`; all calls on the event loop."""

    def __init__(self, database: Database, file_bytes: int, files_bytes: int) -> None:
        self._database = database
        self._file_bytes = file_bytes
        self._files_bytes = files_bytes

    @property
    def folder(self) -> Path:
        return self._database.folder / FOLDER

    def path(self, file: File) -> Path:
        return self.folder / file.id

    async def begin(self, now: int) -> Upload:
        """Raises StorageFull when the limit of all files is reached already."""
        used = await self._database.run(lambda db: _used(db, self.folder, now))
        if used >= self._files_bytes:
            raise self._full(used, 0)
        return Upload(self.folder, self._file_bytes)

    async def keep(
        self, upload: Upload, owner: str, filename: str, purpose: str, now: int, seconds: int | None
    ) -> File:
        """The upload becomes a file; `seconds` until it expires, None: never."""
        await asyncio.to_thread(upload.finish)
        expires = None if seconds is None else now + seconds
        file = File(upload.id, owner, filename, purpose, upload.num_bytes, now, expires)

        def insert(db: Connection) -> None:
            used = _used(db, self.folder, now)
            if used + file.bytes > self._files_bytes:
                raise self._full(used, file.bytes)
            _FILES.insert(db, file)

        try:
            await self._database.run(insert)
        except Exception:
            self.path(file).unlink(missing_ok=True)
            raise
        return file

    def _full(self, used: int, more: int) -> StorageFull:
        return StorageFull(
            f"the files need {used + more} bytes, and the limit is {self._files_bytes} "
            "(store.files_bytes); delete some first"
        )

    async def get(self, owner: str, id: str, now: int) -> File:
        """Raises NotFound."""
        return await self._database.run(lambda db: find(db, owner, id, now))

    async def page(
        self,
        owner: str,
        now: int,
        *,
        purpose: str | None,
        after: str | None,
        limit: int,
        descending: bool,
    ) -> Page[File]:
        where, values = "owner = ? AND (expires_at IS NULL OR expires_at > ?)", [owner, now]
        if purpose is not None:
            where, values = where + " AND purpose = ?", [*values, purpose]
        return await self._database.run(
            lambda db: _FILES.page(
                db, where, values, after=after, limit=limit, descending=descending
            )
        )

    async def delete(self, owner: str, id: str, now: int) -> None:
        """Raises NotFound, and Conflict while a batch still reads it."""

        def delete(db: Connection) -> None:
            file = find(db, owner, id, now)
            if _FILES.select(db, f"id = ? AND EXISTS ({_IN_USE})", id):
                raise Conflict(f"{id} is the input of a batch that has not ended; cancel it first")
            db.execute("DELETE FROM files WHERE id = ?", (file.id,))

        await self._database.run(delete)
        (self.folder / id).unlink(missing_ok=True)


def insert(db: Connection, file: File) -> None:
    """For results of batches, which no limit refuses: the work has been done."""
    _FILES.insert(db, file)


def find(db: Connection, owner: str, id: str, now: int) -> File:
    """Raises NotFound, also for another owner's."""
    where = "id = ? AND owner = ? AND (expires_at IS NULL OR expires_at > ?)"
    found = _FILES.select(db, where, id, owner, now)
    if not found:
        raise NotFound(f"No such File object: {id}", param="id")
    return found[0]


def tidy(db: Connection, folder: Path) -> None:
    """Removes what an upload left that was cut short; only while nobody uploads."""
    folder.mkdir(mode=0o700, exist_ok=True)
    known = {id for (id,) in db.execute("SELECT id FROM files")}
    for path in folder.iterdir():
        if path.name not in known:
            path.unlink()


def _used(db: Connection, folder: Path, now: int) -> int:
    """Bytes of all files, after those have gone whose time is over."""
    where = f"expires_at <= ? AND NOT EXISTS ({_IN_USE})"
    for file in _FILES.select(db, where, now):
        db.execute("DELETE FROM files WHERE id = ?", (file.id,))
        (folder / file.id).unlink(missing_ok=True)
    used: int = db.execute("SELECT coalesce(sum(bytes), 0) FROM files").fetchone()[0]
    return used


def _sync_folder(folder: Path) -> None:
    """A name is on the disk only when its folder is."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

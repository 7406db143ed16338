"""One SQLite file, and the one thread that talks to it."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import structlog

from quantd.daemon.errors import QuantdError, StorageFull, StoreUnavailable
from quantd.daemon.store.schema import STEPS

_log = structlog.get_logger("quantd.store")

FILE = "state.db"
LOCK = "lock"
T = TypeVar("T")
Connection = sqlite3.Connection
Work = Callable[[Connection], T]
_DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_FULL = (errno.ENOSPC, errno.EDQUOT)


class Database:
    """Opened by the first call, in its own thread; event loop only.

    A call is one transaction: it has happened as a whole when `run` returns, on the disk and not
    in a cache, or not at all. What cannot be read as a database is set aside under another name
    with everything that belongs to it, and a new one is begun: nothing is deleted.
    """

    def __init__(
        self, folder: Path | None, on_open: Work[None], belongings: tuple[str, ...]
    ) -> None:
        """`on_open` runs once when the database is open; `belongings` are names in the folder that
        go aside with a damaged database. Folder None: every call raises StoreUnavailable."""
        self._folder = folder
        self._on_open = on_open
        self._belongings = belongings
        self._connection: Connection | None = None
        self._lock: int | None = None
        self._thread: ThreadPoolExecutor | None = None

    @property
    def folder(self) -> Path:
        """Raises StoreUnavailable if there is none."""
        if self._folder is None:
            raise StoreUnavailable(
                "there is no folder to keep state in; set store.path in the configuration"
            )
        return self._folder

    def exists(self) -> bool:
        """Whether something may have been kept; opens nothing."""
        return self._folder is not None and (self._folder / FILE).exists()

    async def run(self, work: Work[T]) -> T:
        """`work` in one transaction, in the database's thread. Raises StoreUnavailable or
        StorageFull, which name the folder; and what `work` raises, after which nothing of it has
        happened."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "quantd-store")
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._transact, work)

    async def close(self) -> None:
        """Waits for what is under way. A call after it opens again."""
        if self._thread is not None:
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self._thread, self._close)
            self._thread.shutdown()
            self._thread = None

    # --- in the thread -----------------------------------------------------------------------

    def _transact(self, work: Work[T]) -> T:
        with explained(self.folder):
            if self._connection is None:
                self._connection = self._open()
            return _in_transaction(self._connection, work)

    def _open(self) -> Connection:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._take_lock()
        connection = self._connect()
        if connection is None:
            self._set_aside()
            connection = self._connect()
            assert connection is not None, "an empty file is a database"
        try:
            _in_transaction(connection, self._on_open)
        except BaseException:
            connection.close()
            raise
        return connection

    def _take_lock(self) -> None:
        """Two daemons with one folder would run each other's batches."""
        if self._lock is not None:
            return
        path = self.folder / LOCK
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            raise StoreUnavailable(
                f"{self.folder} is in use by another daemon; set store.path to another folder"
            ) from None
        self._lock = lock

    def _connect(self) -> Connection | None:
        """None: it is damaged."""
        path = self.folder / FILE
        connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        try:
            # Before anything is written: what is set aside is as it was found.
            if connection.execute("PRAGMA quick_check(1)").fetchone() != ("ok",):
                connection.close()
                return None
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version == 0:  # what large batches took can be given back; not changed later
                connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            self._migrate(connection, version)
        except sqlite3.DatabaseError as error:
            connection.close()
            if _code(error) in _DAMAGE:
                return None
            raise
        except BaseException:
            connection.close()
            raise
        return connection

    def _migrate(self, connection: Connection, version: int) -> None:
        if version > len(STEPS):
            raise StoreUnavailable(
                f"{self.folder / FILE} was written by a newer quantd (its version is {version}, "
                f"this one knows {len(STEPS)}); use that one, or set store.path to another folder"
            )
        for number, step in enumerate(STEPS[version:], start=version + 1):
            connection.executescript(f"BEGIN; {step}; PRAGMA user_version = {number}; COMMIT")

    def _set_aside(self) -> None:
        """Renames a damaged database and its belongings."""
        names = [FILE, f"{FILE}-wal", f"{FILE}-shm", *self._belongings]
        number = 1
        while (self.folder / f"{FILE}.damaged-{number}").exists():
            number += 1
        for name in names:
            if (self.folder / name).exists():
                os.rename(self.folder / name, self.folder / f"{name}.damaged-{number}")
        _log.error(
            "the database of files, batches and responses is damaged: it was set aside, and a new "
            "one is begun",
            path=str(self.folder / f"{FILE}.damaged-{number}"),
        )

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _in_transaction(connection: Connection, work: Work[T]) -> T:
    connection.execute("BEGIN")
    try:
        result = work(connection)
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:  # a full disk may have ended it already
            connection.execute("ROLLBACK")
        raise
    return result


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Errors of SQLite and the file system as ours, with the folder's name."""
    try:
        yield
    except QuantdError:
        raise
    except sqlite3.Error as error:
        if _code(error) == sqlite3.SQLITE_FULL:
            raise _full(folder) from error
        if isinstance(error, sqlite3.IntegrityError | sqlite3.ProgrammingError):
            raise  # ours
        raise StoreUnavailable(f"the state in {folder} cannot be used: {error}") from error
    except OSError as error:
        if error.errno in _FULL:
            raise _full(folder) from error
        raise StoreUnavailable(
            f"the state in {folder} cannot be used: {error.strerror or error}"
        ) from error


def _full(folder: Path) -> StorageFull:
    return StorageFull(f"there is no room left on the disk of {folder}")


def _code(error: sqlite3.Error) -> int:
    """The primary result code; -1 where SQLite itself has not spoken."""
    code = getattr(error, "sqlite_errorcode", None)
    return -1 if code is None else code & 0xFF

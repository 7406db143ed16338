"""KV blocks in files: one thread that writes, reads and checks them. No torch.

A file is a header and one place of the host pool, byte for byte:

    magic "QKV2" | key (32 bytes) | revision (32 bytes) | crc32 of the payload (u32) | payload

Its name is the key in hexadecimal, under a folder for each revision. A file that was cut, damaged
or renamed is found out when it is read; it is then removed and never served. crc32 finds every
burst of up to 32 bits and other damage but for one case in 2^32, at several times the speed of a
cryptographic digest; whoever could forge a file here could read the memory as well. Nothing is
synced: what a crash of the machine leaves of a file does not pass the check.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import queue
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path

from quantd.daemon.types import DiskDone, DiskIndex, DiskOp
from quantd.daemon.worker.disk_folder import (
    MAGIC,
    PREFIX,
    SUFFIX,
    TEMPORARY,
    OtherRevisions,
    folder_of,
    key_of,
    remove_stray,
)

_log = logging.getLogger("quantd.worker.disk")

_CHECKSUM = 4
_HEADER = PREFIX + _CHECKSUM

Send = Callable[[DiskDone | DiskIndex], None]
PlaceBytes = Callable[[int], memoryview]


class DiskTier:
    """Executes `DiskOp`s in order on its own thread; each write and read is answered through
    `send`. Whatever the disk does, the thread goes on and the step loop never waits for it."""

    def __init__(
        self,
        root: Path,
        revision: str,
        budget_bytes: int,
        place_bytes: int,
        bytes_of: PlaceBytes,
        send: Send,
    ) -> None:
        """`budget_bytes`: of all revisions' files. Of this one's the engine keeps it, which asks
        for their removal; those of others go, oldest first, when they would be beyond it.
        `place_bytes`: of a payload; `bytes_of` gives a place's own memory."""
        self._revision = hashlib.blake2b(revision.encode(), digest_size=32).digest()
        self._folder = folder_of(root, self._revision)
        self._budget_bytes = budget_bytes
        self._others = OtherRevisions(self._folder)
        self._num_files = 0
        """Of this revision."""
        self._place_bytes = place_bytes
        self._bytes_of = bytes_of
        self._send = send
        self._ops: queue.SimpleQueue[DiskOp] = queue.SimpleQueue()

    def start(self) -> None:
        """A daemon thread: what it is at when the process ends is left as a temporary file, which
        the next one removes."""
        threading.Thread(target=self._run, name="kv-disk", daemon=True).start()

    def put(self, op: DiskOp) -> None:
        self._ops.put(op)

    def _run(self) -> None:
        try:
            self._send(DiskIndex(self.scan(), self._file_bytes))
            while True:
                self.execute(self._ops.get())
        except OSError as error:
            _log.info("the engine is gone: %s", error)

    def execute(self, op: DiskOp) -> None:
        """One operation and its answer. Raises OSError only when the answer cannot be sent."""
        started = time.perf_counter()
        error: str | None = None
        try:
            if op.kind == "write":
                self._write(op.key, self._bytes_of(op.place))
            elif op.kind == "read":
                self._read(op.key, self._bytes_of(op.place))
            else:
                self._remove(self._path(op.key))
        except (OSError, ValueError) as problem:
            error = f"{type(problem).__name__}: {problem}"
            _log.warning("KV block on disk, %s: %s", op.kind, error)
        if op.kind != "remove":
            self._send(DiskDone(op.kind, op.key, error, time.perf_counter() - started))

    @property
    def _file_bytes(self) -> int:
        return _HEADER + self._place_bytes

    def _path(self, key: bytes) -> Path:
        return self._folder / (key.hex() + SUFFIX)

    def scan(self) -> tuple[bytes, ...]:
        """Keys of this revision's files, by name and size, least recently used first. Removes what
        a crash has left, and makes the other revisions keep the budget."""
        found: list[tuple[int, bytes]] = []
        try:
            # What was said stands in these files: nobody else may look.
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            for entry in os.scandir(self._folder):
                remove_stray(entry)
                if (key := key_of(entry)) is not None:
                    about = entry.stat(follow_symlinks=False)
                    if about.st_size == self._file_bytes:
                        found.append((about.st_mtime_ns, key))
                    else:  # a crash of the machine: files get their name when they are whole
                        Path(entry.path).unlink(missing_ok=True)
            self._others.scan()
        except OSError as error:
            _log.warning("the folder of KV blocks cannot be read: %s", error)
        self._num_files = len(found)
        self._keep_budget()
        return tuple(key for _, key in sorted(found))

    def _keep_budget(self) -> None:
        self._others.keep(self._budget_bytes - self._num_files * self._file_bytes)

    def _write(self, key: bytes, payload: memoryview) -> None:
        path = self._path(key)
        temporary = path.with_suffix(f".{os.urandom(8).hex()}{TEMPORARY}")
        try:
            with temporary.open("xb") as file:
                # A temporary file that can be locked has no writer; see `remove_stray`.
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                file.write(self._header(key, payload))
                file.write(payload)
                file.flush()
                temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        self._num_files += 1
        self._keep_budget()

    def _read(self, key: bytes, place: memoryview) -> None:
        """Fills the place, or raises; a file that is not what its name says is removed."""
        path = self._path(key)
        with path.open("rb", buffering=0) as file:
            header = file.read(_HEADER)
            filled = 0
            while filled < len(place) and (count := file.readinto(place[filled:])):
                filled += count
            complete = filled == len(place) and not file.read(1)
        if not complete or header != self._header(key, place):
            self._remove(path)
            raise ValueError(f"{path} is not what its name says; removed")
        os.utime(path)

    def _remove(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        self._num_files -= 1

    def _header(self, key: bytes, payload: memoryview) -> bytes:
        checksum = zlib.crc32(payload).to_bytes(_CHECKSUM, "little")
        return MAGIC + key + self._revision + checksum

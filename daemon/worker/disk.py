"""KV blocks in files: one thread that writes, reads and checks them. No torch.

A file is a header and one place of the host pool, byte for byte:

    magic "QKV1" | 32 bytes of key | 32 bytes of revision | 16 bytes of checksum | payload

Its name is the key in hexadecimal, under a folder for each revision. The checksum (BLAKE2b) is over
all that follows it and the header before it, so a file that was cut, changed or renamed is found
out when it is read; it is then removed and never served.
"""

from __future__ import annotations

import hashlib
import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path

from quantd.daemon.types import DiskDone, DiskIndex, DiskOp

_log = logging.getLogger("quantd.worker.disk")

_MAGIC = b"QKV1"
_DIGEST = 16
_HEADER = len(_MAGIC) + 32 + 32 + _DIGEST
_SUFFIX = ".kv"
_TEMPORARY = ".new"

Send = Callable[[DiskDone | DiskIndex], None]
PlaceBytes = Callable[[int], memoryview]


class DiskTier:
    """Executes `DiskOp`s in order on its own thread; each write and read is answered through
    `send`. Whatever the disk does, the thread goes on and the step loop never waits for it."""

    def __init__(
        self, folder: Path, revision: str, place_bytes: int, bytes_of: PlaceBytes, send: Send
    ) -> None:
        """`place_bytes`: of a payload; `bytes_of` gives a place's own memory."""
        self._revision = hashlib.blake2b(revision.encode(), digest_size=32).digest()
        self._folder = folder / self._revision[:8].hex()
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
            self._send(DiskIndex(self._scan(), _HEADER + self._place_bytes))
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
                self._path(op.key).unlink(missing_ok=True)
        except (OSError, ValueError) as problem:
            error = f"{type(problem).__name__}: {problem}"
            _log.warning("KV block on disk, %s: %s", op.kind, error)
        if op.kind != "remove":
            self._send(DiskDone(op.kind, op.key, error, time.perf_counter() - started))

    def _path(self, key: bytes) -> Path:
        return self._folder / (key.hex() + _SUFFIX)

    def _scan(self) -> tuple[bytes, ...]:
        """Keys of the files that may be ours, by name and size, least recently used first."""
        found: list[tuple[int, bytes]] = []
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            for entry in os.scandir(self._folder):
                if entry.name.endswith(_TEMPORARY):
                    self._remove_stray(Path(entry.path))
                elif (key := self._key_of(entry)) is not None:
                    found.append((entry.stat().st_mtime_ns, key))
        except OSError as error:
            _log.warning("the folder of KV blocks cannot be read: %s", error)
        return tuple(key for _, key in sorted(found))

    def _key_of(self, entry: os.DirEntry[str]) -> bytes | None:
        name, size = entry.name.removesuffix(_SUFFIX), _HEADER + self._place_bytes
        if len(name) != 64 or name == entry.name or entry.stat().st_size != size:
            return None
        try:
            return bytes.fromhex(name)
        except ValueError:
            return None

    @staticmethod
    def _remove_stray(path: Path) -> None:
        """Of a process that is gone; another living one may be writing next to us."""
        pid = path.name.split(".")[-2]
        if not (pid.isdecimal() and Path(f"/proc/{pid}").exists()):
            path.unlink(missing_ok=True)

    def _write(self, key: bytes, payload: memoryview) -> None:
        temporary = self._folder / f"{key.hex()}.{os.getpid()}{_TEMPORARY}"
        try:
            with temporary.open("wb") as file:
                file.write(self._header(key, payload))
                file.write(payload)
            temporary.replace(self._path(key))
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

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
            path.unlink(missing_ok=True)
            raise ValueError(f"{path} is not what its name says; removed")
        os.utime(path)

    def _header(self, key: bytes, payload: memoryview) -> bytes:
        start = _MAGIC + key + self._revision
        digest = hashlib.blake2b(start, digest_size=_DIGEST)
        digest.update(payload)
        return start + digest.digest()

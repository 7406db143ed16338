"""Names in the folder of KV blocks, and what others have left there.

    <root>/<16 hex digits of the revision's digest>/<64 hex digits of the key>.kv

and while one is written `<key>.<16 hex digits>.new`, locked by its writer. Whatever is called
otherwise is not ours and stays.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
from collections import deque
from contextlib import suppress
from pathlib import Path

_log = logging.getLogger("quantd.worker.disk")

MAGIC = b"QKV2"
PREFIX = len(MAGIC) + 32 + 32
"""Bytes of a file that say what it is: magic, key, revision."""
SUFFIX = ".kv"
TEMPORARY = ".new"
_REVISION = re.compile(r"[0-9a-f]{16}")
_KEY = re.compile(r"[0-9a-f]{64}\.kv")
_TEMPORARY_NAME = re.compile(r"[0-9a-f]{64}\.[0-9a-f]{16}\.new")


def folder_of(root: Path, revision: bytes) -> Path:
    return root / revision[:8].hex()


def key_of(entry: os.DirEntry[str]) -> bytes | None:
    """None: it is no block, by its name and kind."""
    if _KEY.fullmatch(entry.name) is None or not entry.is_file(follow_symlinks=False):
        return None
    return bytes.fromhex(entry.name.removesuffix(SUFFIX))


def remove_stray(entry: os.DirEntry[str]) -> None:
    """A temporary file whose writer is gone: the system has let go of its lock. No effect on
    anything else."""
    if _TEMPORARY_NAME.fullmatch(entry.name) is None or not entry.is_file(follow_symlinks=False):
        return
    with suppress(OSError), open(entry.path, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(entry.path)


class OtherRevisions:
    """Files of models that were here before, or are elsewhere: of another checkpoint, dtype or
    version. They may stay while there is room, because such a model may come back."""

    def __init__(self, own: Path) -> None:
        """`own`: the folder of the revision that is at work, beside which theirs lie."""
        self._own = own
        self._files: deque[tuple[int, Path, int]] = deque()
        """(time of the last use, path, bytes), oldest first; as of the scan."""
        self._num_bytes = 0

    def scan(self) -> None:
        found: list[tuple[int, Path, int]] = []
        for folder in os.scandir(self._own.parent):
            if _REVISION.fullmatch(folder.name) and folder.name != self._own.name:
                with suppress(OSError):
                    found += self._blocks(folder.path)
        self._files = deque(sorted(found))
        self._num_bytes = sum(size for _, _, size in found)

    @staticmethod
    def _blocks(folder: str) -> list[tuple[int, Path, int]]:
        found = []
        for entry in os.scandir(folder):
            remove_stray(entry)
            if key_of(entry) is not None:
                about = entry.stat(follow_symlinks=False)
                found.append((about.st_mtime_ns, Path(entry.path), about.st_size))
        return found

    def keep(self, most_bytes: int) -> None:
        """Remove the oldest until the rest is not above `most_bytes`. What does not say itself that
        it is a block is left and not counted any more."""
        while self._num_bytes > most_bytes and self._files:
            _, path, size = self._files.popleft()
            self._num_bytes -= size
            try:
                if _says_that_it_is_one(path):
                    path.unlink()
                if not any(path.parent.iterdir()):
                    path.parent.rmdir()
            except FileNotFoundError:
                continue  # somebody else has removed it
            except OSError as error:
                _log.warning("a KV block of another revision: %s", error)


def _says_that_it_is_one(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(PREFIX)
    key = bytes.fromhex(path.name.removesuffix(SUFFIX))
    revision = start[-32:]
    return start == MAGIC + key + revision and revision[:8].hex() == path.parent.name

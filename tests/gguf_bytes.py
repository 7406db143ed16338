"""GGUF files byte by byte, sound or not, without any package that writes them."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

U32, F32, BOOL, STRING, ARRAY, U64 = 4, 6, 7, 8, 9, 10
TYPE_F32, TYPE_Q4_0 = 0, 2


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def array_of(kind: int, count: int, items: bytes) -> bytes:
    return u32(kind) + u64(count) + items


def strings(items: Sequence[str]) -> bytes:
    return array_of(STRING, len(items), b"".join(string(item) for item in items))


def pair(key: str, kind: int, value: bytes) -> bytes:
    return string(key) + u32(kind) + value


def tensor(name: str, dims: Sequence[int] = (8,), kind: int = TYPE_F32, offset: int = 0) -> bytes:
    """`dims` as in the file: the length of a row first."""
    return string(name) + u32(len(dims)) + b"".join(map(u64, dims)) + u32(kind) + u64(offset)


@dataclass
class Gguf:
    """A file in the making; what is None is counted."""

    pairs: list[bytes] = field(default_factory=list)
    tensors: list[bytes] = field(default_factory=list)
    data: bytes = b""
    magic: bytes = b"GGUF"
    version: bytes = u32(3)
    num_pairs: int | None = None
    num_tensors: int | None = None
    alignment: int = 32

    def encode(self) -> bytes:
        num_tensors = len(self.tensors) if self.num_tensors is None else self.num_tensors
        num_pairs = len(self.pairs) if self.num_pairs is None else self.num_pairs
        head = self.magic + self.version + u64(num_tensors) + u64(num_pairs)
        head += b"".join(self.pairs) + b"".join(self.tensors)
        return head + bytes(-len(head) % self.alignment) + self.data

    def write(self, path: Path) -> Path:
        path.write_bytes(self.encode())
        return path

"""The GGUF container: metadata and where the tensors are, by whoever wrote it, trusted in nothing.

Layout (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), little-endian: "GGUF", u32
version, u64 number of tensors, u64 number of pairs; the pairs (string key, u32 type, value); the
tensors (string name, u32 dimensions, u64 of each, u32 type, u64 offset); then, aligned, the data,
to which the offsets are relative. A string is a u64 length and bytes of UTF-8. An array is a u32
type of its items, a u64 count and the items.

Memory stays below ten times `_MAX_HEADER`: a count or a length is compared with the bytes
that are left before anything is made of it.
"""

from __future__ import annotations

import math
import mmap
import re
import sys
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from struct import Struct

from quantd.daemon.gguf.types import BLOCKS, TYPE_NAMES

_MAX_HEADER = 1 << 26
"""Bytes before the data. The largest vocabularies take a third of it."""
_MAX_PAIRS = 1 << 16
_MAX_TENSORS = 1 << 17
_MAX_DIMS = 4
_MAX_NAME = 256
"""Bytes of a key or of a tensor's name."""
_MAX_DEPTH = 4
"""Of arrays of arrays, which the specification allows and nobody writes."""
_MAX_SHARDS = 99_999
"""Five digits in the file names."""
_VERSIONS = (2, 3)

_BOOL, _STRING, _ARRAY = 7, 8, 9
_SCALARS: Mapping[int, tuple[str, Struct]] = {
    number: (code, Struct(f"<{code}"))
    for number, code in {
        0: "B",
        1: "b",
        2: "H",
        3: "h",
        4: "I",
        5: "i",
        6: "f",
        _BOOL: "B",
        10: "Q",
        11: "q",
        12: "d",
    }.items()
}
"""By the number of a metadata type: its letter for struct and array."""
_U32, _U64 = Struct("<I"), Struct("<Q")
_SHARD_NAME = re.compile(r"(?P<prefix>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


class GgufError(ValueError):
    """The file is not what it says it is, or not understood. The text is for users."""


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor's place in its file."""

    name: str
    type_name: str
    """As ggml spells it: "F32", "Q4_K"."""
    dims: tuple[int, ...]
    """Slowest first, as numpy has it: (rows, columns). The file has them reversed."""
    offset: int
    """Of the first byte, from the start of the file."""
    nbytes: int
    path: Path


@dataclass(frozen=True, slots=True)
class GgufFile:
    path: Path
    version: int
    metadata: dict[str, object]
    """Values are str, int, float, bool, list (of strings, bools or lists) or array.array."""
    tensors: dict[str, GgufTensor]
    data_start: int


@dataclass(frozen=True, slots=True)
class GgufModel:
    """A model in one file, or in several of which the first has the metadata."""

    path: Path
    files: tuple[Path, ...]
    metadata: dict[str, object]
    tensors: dict[str, GgufTensor]


def open_gguf(path: Path) -> GgufModel:
    """Headers of all shards, no tensor. `path` is the file, or the first of the shards. Raises
    GgufError."""
    first = read_gguf(path)
    count = _split(first, "split.count", 1)
    if count <= 1:
        return GgufModel(path, (path,), first.metadata, first.tensors)
    number = _split(first, "split.no", 0)
    match = _SHARD_NAME.fullmatch(path.name)
    if match is None or int(match["count"]) != count or int(match["number"]) != number + 1:
        raise GgufError(
            f"{path.name}: split.no is {number} and split.count {count}, so its name must end in "
            f"-{number + 1:05d}-of-{count:05d}.gguf"
        )
    paths = [
        path.with_name(f"{match['prefix']}-{i + 1:05d}-of-{count:05d}.gguf") for i in range(count)
    ]
    if number != 0:
        raise GgufError(f"{path.name} is shard {number + 1} of {count}; open {paths[0].name}")
    tensors = dict(first.tensors)
    for i, shard in enumerate(paths[1:], 1):
        _add_shard(tensors, shard, i, count)
    total = _split(first, "split.tensors.count", len(tensors))
    if total != len(tensors):
        raise GgufError(
            f"{path.name}: split.tensors.count is {total}, but the {count} shards hold "
            f"{len(tensors)} tensors"
        )
    return GgufModel(path, tuple(paths), first.metadata, tensors)


def _add_shard(tensors: dict[str, GgufTensor], path: Path, number: int, count: int) -> None:
    if not path.is_file():
        raise GgufError(f"the shard {path.name} is missing (of {count})")
    file = read_gguf(path)
    for key, expected in (("split.no", number), ("split.count", count)):
        value = _split(file, key, None)
        if value != expected:
            raise GgufError(f"{path.name}: {key} is {value}, must be {expected}")
    for name, tensor in file.tensors.items():
        if name in tensors:
            raise GgufError(f"the tensor {name} is in {tensors[name].path.name} and in {path.name}")
        tensors[name] = tensor


def _split(file: GgufFile, key: str, default: int | None) -> int:
    value = file.metadata.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MAX_SHARDS:
        raise GgufError(f"{file.path.name}: {key} is {value!r}, must be at most {_MAX_SHARDS}")
    return value


def read_gguf(path: Path) -> GgufFile:
    """The header of one file. Raises GgufError, also for a file that cannot be opened."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            if size < 24:
                raise GgufError(f"{path.name} has {size} bytes, too few for a GGUF file")
            with mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as data:
                return _Header(path, data, size).read()
    except OSError as error:
        raise GgufError(f"{path} cannot be read: {error.strerror}") from error


class _Header:
    """One pass over a file's header. `_at` is the next byte, `_stop` the last that may be read."""

    def __init__(self, path: Path, data: mmap.mmap, size: int) -> None:
        self._path = path
        self._data = data
        self._size = size
        self._stop = min(size, _MAX_HEADER)
        self._at = 0

    def read(self) -> GgufFile:
        version = self._version()
        num_tensors = self._count("the number of tensors", 24, _MAX_TENSORS)
        num_pairs = self._count("the number of metadata keys", 13, _MAX_PAIRS)
        metadata: dict[str, object] = {}
        for _ in range(num_pairs):
            key = self._name("a metadata key")
            if key in metadata:
                raise self._error(f"the metadata key {key} occurs twice")
            metadata[key] = self._value(key, self._u32(f"the type of {key}"), 0)
        alignment = self._alignment(metadata)
        raw = [self._tensor() for _ in range(num_tensors)]
        start = -(-self._at // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        for item in raw:
            if item[0] in tensors:
                raise self._error(f"the tensor {item[0]} occurs twice")
            tensors[item[0]] = self._placed(*item, start, alignment)
        self._refuse_overlaps(tensors)
        return GgufFile(self._path, version, metadata, tensors, start)

    def _version(self) -> int:
        if self._data[:4] != b"GGUF":
            raise self._error(f"it begins with {self._data[:4]!r}, not with b'GGUF'")
        self._at = 4
        version = self._u32("the version")
        if version & 0xFFFF == 0 and version:
            raise self._error("it is written in big-endian byte order, which is not supported")
        if version not in _VERSIONS:
            raise self._error(f"its version is {version}, must be one of {_VERSIONS}")
        return version

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """(name, dims slowest first, type, offset) as the file has them."""
        name = self._name("the name of a tensor")
        num_dims = self._u32(f"the number of dimensions of {name}")
        if not 1 <= num_dims <= _MAX_DIMS:
            raise self._error(
                f"the tensor {name} has {num_dims} dimensions, must have 1 to {_MAX_DIMS}"
            )
        dims = tuple(self._u64(f"the dimensions of {name}") for _ in range(num_dims))
        kind = self._u32(f"the type of {name}")
        return name, dims[::-1], kind, self._u64(f"the offset of {name}")

    def _placed(
        self,
        name: str,
        dims: tuple[int, ...],
        kind: int,
        offset: int,
        start: int,
        alignment: int,
    ) -> GgufTensor:
        if kind not in TYPE_NAMES:
            raise self._error(f"the tensor {name} is of the type number {kind}, unknown here")
        type_name = TYPE_NAMES[kind]
        block, block_bytes = BLOCKS[type_name]
        if 0 in dims:
            raise self._error(f"the tensor {name} of shape {list(dims)} is empty")
        if dims[-1] % block:
            raise self._error(
                f"the tensor {name} has rows of {dims[-1]}, must be a multiple of {block} "
                f"for the type {type_name}"
            )
        if offset % alignment:
            raise self._error(
                f"the offset of the tensor {name} is {offset}, must be a multiple of {alignment}"
            )
        nbytes = math.prod(dims) // block * block_bytes
        begin = start + offset
        if begin + nbytes > self._size:
            raise self._error(
                f"it is cut off: the tensor {name} ends at byte {begin + nbytes}, the file at "
                f"{self._size}"
            )
        return GgufTensor(name, type_name, dims, begin, nbytes, self._path)

    def _refuse_overlaps(self, tensors: Mapping[str, GgufTensor]) -> None:
        last: GgufTensor | None = None
        for tensor in sorted(tensors.values(), key=lambda t: t.offset):
            if last is not None and tensor.offset < last.offset + last.nbytes:
                raise self._error(
                    f"the tensor {tensor.name} begins at byte {tensor.offset}, inside "
                    f"{last.name}, which ends at {last.offset + last.nbytes}"
                )
            last = tensor

    def _alignment(self, metadata: Mapping[str, object]) -> int:
        value = metadata.get("general.alignment", 32)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._error(f"general.alignment is {value!r}, must be an integer")
        if value < 1 or value & (value - 1) or value > _MAX_HEADER:
            raise self._error(
                f"general.alignment is {value}, must be a power of two up to {_MAX_HEADER}"
            )
        return value

    def _value(self, key: str, kind: int, depth: int) -> object:
        if kind == _STRING:
            return self._strings(key, 1)[0]
        if kind == _ARRAY:
            return self._array(key, depth + 1)
        if kind not in _SCALARS:
            raise self._error(f"the value of {key} is of the type number {kind}, unknown here")
        value = self._unpack(_SCALARS[kind][1], key)
        return self._bool(key, value) if kind == _BOOL else value

    def _array(self, key: str, depth: int) -> object:
        if depth > _MAX_DEPTH:
            raise self._error(f"{key} nests arrays more than {_MAX_DEPTH} deep")
        kind = self._u32(f"the type of the items of {key}")
        if kind == _STRING:
            return self._strings(key, self._count(f"the number of items of {key}", 8))
        if kind == _ARRAY:
            count = self._count(f"the number of items of {key}", 12)
            return [self._array(key, depth + 1) for _ in range(count)]
        if kind not in _SCALARS:
            raise self._error(f"the items of {key} are of the type number {kind}, unknown here")
        items = array(_SCALARS[kind][0])
        count = self._count(f"the number of items of {key}", items.itemsize)
        end = self._at + count * items.itemsize
        items.frombytes(self._data[self._at : end])
        self._at = end
        if sys.byteorder == "big":
            items.byteswap()
        return [self._bool(key, item) for item in items] if kind == _BOOL else items

    def _strings(self, key: str, count: int) -> list[str]:
        # One loop over local names: a vocabulary and its merges are half a million of these.
        out: list[str] = []
        data, at, stop, unpack = self._data, self._at, self._stop, _U64.unpack_from
        try:
            for _ in range(count):
                begin = at + 8
                if begin > stop:
                    raise self._ends(key)
                at = begin + unpack(data, at)[0]
                if at > stop:
                    raise self._error(
                        f"a string of {key} has {at - begin} bytes, {stop - begin} are left"
                    )
                out.append(str(data[begin:at], "utf-8"))
        except UnicodeDecodeError as error:
            raise self._error(f"a string of {key} is not UTF-8: {error}") from error
        self._at = at
        return out

    def _name(self, what: str) -> str:
        begin = self._at
        name = self._strings(what, 1)[0]
        length = self._at - begin - 8
        if not 1 <= length <= _MAX_NAME:
            raise self._error(f"{what} has {length} bytes, must have 1 to {_MAX_NAME}")
        return name

    def _count(self, what: str, item_bytes: int, most: int = _MAX_HEADER) -> int:
        """A count of things that take at least `item_bytes` each."""
        count = self._u64(what)
        room = (self._stop - self._at) // item_bytes
        if count > room:
            raise self._error(f"{what} is {count}, but the header has room for {room}")
        if count > most:
            raise self._error(f"{what} is {count}, must be at most {most}")
        return count

    def _bool(self, key: str, value: object) -> bool:
        if value not in (0, 1):
            raise self._error(f"{key} is {value!r}, must be 0 or 1 as a bool")
        return value == 1

    def _u32(self, what: str) -> int:
        return int(self._unpack(_U32, what))

    def _u64(self, what: str) -> int:
        return int(self._unpack(_U64, what))

    def _unpack(self, struct: Struct, what: str) -> int | float:
        if self._at + struct.size > self._stop:
            raise self._ends(what)
        (value,) = struct.unpack_from(self._data, self._at)
        self._at += struct.size
        assert isinstance(value, int | float)
        return value

    def _ends(self, what: str) -> GgufError:
        limit = "" if self._stop == self._size else ", the most that a header may have"
        return self._error(f"it ends within {what}, after {self._stop} bytes{limit}")

    def _error(self, text: str) -> GgufError:
        return GgufError(f"{self._path.name} is no sound GGUF file: {text}")

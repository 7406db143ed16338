"""Safetensors files as a TensorSource: mapped, never read as a whole.

Format: eight bytes of header size (little-endian), a JSON header of {name: dtype, shape, [begin,
end)} relative to the end of the header, then the bytes.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantd.daemon.worker.machine import MAP_NORESERVE
from quantd.plugins.api import Refused

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_MAX_HEADER = 100_000_000
"""As the reference implementation."""
_SHOWN = 4
"""Files in a message; the rest is counted."""


@dataclass(frozen=True, slots=True)
class _Entry:
    shard: _Shard
    dtype: str
    shape: tuple[int, ...]
    start: int
    """Of the file."""
    stop: int


class _Shard:
    """One mapped file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            self.size = file.seek(0, 2)
            if self.size < 8:
                raise Refused(f"{path.name} has {self.size} bytes, too few for a safetensors file")
            # Private and writable, because torch warns of read-only memory; nobody writes.
            self.map = mmap.mmap(
                file.fileno(),
                self.size,
                flags=mmap.MAP_PRIVATE | MAP_NORESERVE,
                prot=mmap.PROT_READ | mmap.PROT_WRITE,
            )

    def header(self) -> dict[str, _Entry]:
        length = int.from_bytes(self.map[:8], "little")
        if length > min(self.size - 8, _MAX_HEADER):
            raise Refused(
                f"{self.path.name} is no whole safetensors file: its header has {length} "
                f"bytes, the file {self.size}"
            )
        try:
            raw = json.loads(self.map[8 : 8 + length])
            raw.pop("__metadata__", None)
            return {name: self._entry(name, item, 8 + length) for name, item in raw.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise Refused(f"{self.path.name}: the header is not understood: {error!r}") from error

    def _entry(self, name: str, item: Mapping[str, Any], data: int) -> _Entry:
        dtype, shape = item["dtype"], tuple(item["shape"])
        begin, end = item["data_offsets"]
        if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
            raise Refused(
                f"{self.path.name}: the tensor {name} has the shape {list(shape)} and the offsets "
                f"{[begin, end]}; each must be a whole number, at least 0"
            )
        start, stop = data + begin, data + end
        if dtype not in _DTYPES:
            raise Refused(
                f"{self.path.name}: the tensor {name} is of the type {dtype}, unknown here"
            )
        size = math.prod(shape) * _DTYPES[dtype].itemsize
        if stop - start != size or not data <= start <= stop:
            raise Refused(
                f"{self.path.name}: the tensor {name} of shape {list(shape)} and type {dtype} "
                f"has {stop - start} bytes, must have {size}"
            )
        if stop > self.size:
            raise Refused(
                f"{self.path.name} is cut off: the tensor {name} ends at byte {stop}, the file at "
                f"{self.size}"
            )
        return _Entry(self, dtype, shape, start, stop)


class SafetensorsSource:
    """The tensors of a model's folder, in one file or in shards."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self._config = config
        self._entries: dict[str, _Entry] = {}
        files, index = _files(folder)
        for path in files:
            for name, entry in _Shard(path).header().items():
                if name in self._entries:
                    other = self._entries[name].shard.path.name
                    raise Refused(f"the tensor {name} is in {other} and in {path.name}")
                self._entries[name] = entry
        _refuse_overlaps(self._entries)
        for name, file in index.items():
            if name not in self._entries:
                raise Refused(f"the tensor {name} is missing: the index has it in {file}")

    @property
    def config(self) -> Mapping[str, Any]:
        return self._config

    def names(self) -> Collection[str]:
        return self._entries.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape

    def dtype(self, name: str) -> str:
        return self._entries[name].dtype

    def read(self, name: str) -> Tensor:
        entry = self._entries[name]
        if entry.start == entry.stop:
            return torch.empty(entry.shape, dtype=_DTYPES[entry.dtype])
        memory = entry.shard.map
        page = entry.start - entry.start % mmap.PAGESIZE
        memory.madvise(mmap.MADV_WILLNEED, page, entry.stop - page)
        dtype = _DTYPES[entry.dtype]
        if entry.start % dtype.itemsize:
            raw = torch.frombuffer(
                memory, dtype=torch.uint8, count=entry.stop - entry.start, offset=entry.start
            )
            return raw.clone().view(dtype).view(entry.shape)
        count = (entry.stop - entry.start) // dtype.itemsize
        flat = torch.frombuffer(memory, dtype=dtype, count=count, offset=entry.start)
        return flat.view(entry.shape)

    def release(self, name: str) -> None:
        entry = self._entries[name]
        page = entry.start - entry.start % mmap.PAGESIZE
        # Whole pages only exist: one that a neighbour shares is mapped again when it is read.
        if entry.stop > page:
            entry.shard.map.madvise(mmap.MADV_DONTNEED, page, entry.stop - page)


def _refuse_overlaps(entries: Mapping[str, _Entry]) -> None:
    """Of two tensors of a file that share bytes, one is not what it says."""
    order = sorted(entries, key=lambda name: (entries[name].shard.path, entries[name].start))
    for name, following in pairwise(order):
        one, other = entries[name], entries[following]
        if one.shard is other.shard and one.stop > other.start and other.start < other.stop:
            raise Refused(f"{one.shard.path.name}: {name} and {following} overlap")


def _files(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """The files to open, and {tensor: file} by the index, empty when there is none."""
    index_path = folder / "model.safetensors.index.json"
    if index_path.exists():
        try:
            index = dict(json.loads(index_path.read_text())["weight_map"])
        except (ValueError, KeyError, TypeError) as error:
            raise Refused(f"{index_path.name} is not understood: {error!r}") from error
        names = sorted(set(index.values()))
    elif (folder / "model.safetensors").exists():
        names, index = ["model.safetensors"], {}
    else:
        names, index = sorted(path.name for path in folder.glob("*.safetensors")), {}
        if len(names) != 1:
            raise Refused(_no_weights(folder, names))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise Refused(f"{folder} lacks the shard {missing[0]} (of {len(names)}, by the index)")
    return [folder / name for name in names], index


def _no_weights(folder: Path, names: list[str]) -> str:
    if names:
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        return (
            f"{folder} has {len(names)} safetensors files ({', '.join(names[:_SHOWN])}{more}), but "
            "no model.safetensors.index.json that says which belong to the model"
        )
    if any(folder.glob("*.bin")):
        return f"{folder} has weights as .bin only, which can run code; convert them to safetensors"
    return f"{folder} has no safetensors file"

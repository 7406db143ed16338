"""A CUDA driver of real host memory, as strict as the documentation of the real one.

Addresses without memory cannot be touched (the process would end), memory may be seen at several
addresses, and whatever the documentation forbids is CUDA_ERROR_INVALID_VALUE. Arguments go through
ctypes as they do to the library.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable
from ctypes import CFUNCTYPE, c_int
from dataclasses import dataclass
from typing import Any

import torch

from quantd.daemon.types import BLOCK_TOKENS
from quantd.daemon.worker.gpu.driver import PROTOTYPES, AccessDesc, AllocationProp, Driver
from quantd.daemon.worker.gpu.reserved import ReservedPools
from quantd.daemon.worker.memory import KvPools, block_bytes
from quantd.daemon.worker.models.config import ModelConfig

GRANULARITY = 1 << 16
OK, INVALID, OUT_OF_MEMORY, NOT_SUPPORTED = 0, 1, 2, 801

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, c_int, c_int, c_int, ctypes.c_long)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, c_int)
_PRIVATE, _SHARED, _FIXED, _ANONYMOUS, _NORESERVE = 2, 1, 0x10, 0x20, 0x4000
_NO_ACCESS = 0
_READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE


@dataclass
class Memory:
    file: int
    size: int
    handles: int = 1
    """That were not released."""
    mappings: int = 0


class FakeLibrary:
    """`cu...` of PROTOTYPES. `budget` is the device's memory in bytes, `calls` what was asked."""

    def __init__(self, budget: int = 1 << 40) -> None:
        self.budget = budget
        self.supported = 1
        self.fail: Callable[[str], int] = lambda name: OK
        """May give another status, before anything is done."""
        self.calls: list[str] = []
        self.reserved: dict[int, int] = {}
        self.mapped: dict[int, Memory] = {}
        self.accessible: set[int] = set()
        self.memories: dict[int, Memory] = {}
        self._next = 1
        for name, arguments in PROTOTYPES.items():
            prototype = CFUNCTYPE(c_int, *arguments)
            setattr(self, name, prototype(self._checked(name)))

    def driver(self) -> Driver:
        return Driver(self, 0, lambda: self.calls.append("synchronize"))

    @property
    def used(self) -> int:
        return sum(memory.size for memory in self.memories.values())

    def close(self) -> None:
        """Nothing is left: no addresses, no memory, no handle."""
        assert not self.reserved and not self.mapped and not self.memories, "something leaks"

    def _checked(self, name: str) -> Callable[..., int]:
        function = getattr(self, "_" + name)

        def call(*arguments: Any) -> int:
            self.calls.append(name)
            return self.fail(name) or int(function(*arguments))

        return call

    def _cuDeviceGet(self, device: Any, ordinal: int) -> int:
        device[0] = ordinal + 7
        return OK

    def _cuDeviceGetAttribute(self, value: Any, attribute: int, device: int) -> int:
        if (attribute, device) != (102, 7):
            return INVALID
        value[0] = self.supported
        return OK

    def _cuGetErrorString(self, status: int, text: Any) -> int:
        names = {INVALID: b"invalid argument", OUT_OF_MEMORY: b"out of memory"}
        text[0] = names.get(status)
        return OK if status in names else INVALID

    def _cuMemGetAllocationGranularity(self, size: Any, prop: Any, option: int) -> int:
        size[0] = GRANULARITY
        return OK if option in (0, 1) and _is_valid(prop[0]) else INVALID

    def _cuMemAddressReserve(
        self, address: Any, size: int, alignment: int, hint: int, flags: int
    ) -> int:
        if size <= 0 or size % GRANULARITY or alignment & (alignment - 1) or hint or flags:
            return INVALID
        # Of more addresses, one that is aligned; the rest stays, as addresses cost nothing here.
        more = size + alignment
        anywhere = _PRIVATE | _ANONYMOUS | _NORESERVE
        start = _libc.mmap(None, more, _NO_ACCESS, anywhere, -1, 0)
        address[0] = -(-start // alignment) * alignment
        self.reserved[address[0]] = size
        return OK

    def _cuMemAddressFree(self, address: int, size: int) -> int:
        if self.reserved.get(address) != size or self._has_mappings(address, size):
            return INVALID
        del self.reserved[address]
        _libc.munmap(address, size)
        return OK

    def _cuMemCreate(self, handle: Any, size: int, prop: Any, flags: int) -> int:
        if size <= 0 or size % GRANULARITY or flags or not _is_valid(prop[0]):
            return INVALID
        if self.used + size > self.budget:
            return OUT_OF_MEMORY
        file = os.memfd_create("device")
        os.ftruncate(file, size)
        # The content is undefined: not zeros, at least where anybody looks first.
        os.pwrite(file, b"\xff" * 4096, 0)
        handle[0], self._next = self._next, self._next + 1
        self.memories[handle[0]] = Memory(file, size)
        return OK

    def _cuMemRelease(self, handle: int) -> int:
        memory = self.memories.get(handle)
        if memory is None or not memory.handles:
            return INVALID
        memory.handles -= 1
        self._collect()
        return OK

    def _cuMemRetainAllocationHandle(self, handle: Any, address: int) -> int:
        for number, memory in self.memories.items():
            if memory is self.mapped.get(address):
                memory.handles += 1
                handle[0] = number
                return OK
        return INVALID

    def _cuMemMap(self, address: int, size: int, offset: int, handle: int, flags: int) -> int:
        memory = self.memories.get(handle)
        if memory is None or not memory.handles or size != memory.size or offset or flags:
            return INVALID
        inside = any(
            start <= address and address + size <= start + length
            for start, length in self.reserved.items()
        )
        if address % GRANULARITY or not inside or self._has_mappings(address, size):
            return INVALID
        _map(address, size, _NO_ACCESS, _SHARED | _FIXED, memory.file)
        memory.mappings += 1
        self.mapped[address] = memory
        return OK

    def _cuMemSetAccess(self, address: int, size: int, desc: Any, count: int) -> int:
        memory = self.mapped.get(address)
        access: AccessDesc = desc[0]
        if memory is None or memory.size != size or count != 1:
            return INVALID
        if (access.location.type, access.location.id, access.flags) != (1, 0, 3):
            return INVALID
        self.accessible.add(address)
        _libc.mprotect(address, size, _READ_WRITE)
        return OK

    def _cuMemUnmap(self, address: int, size: int) -> int:
        memory = self.mapped.get(address)
        if memory is None or memory.size != size:
            return INVALID
        del self.mapped[address]
        self.accessible.discard(address)
        memory.mappings -= 1
        _map(address, size, _NO_ACCESS, _PRIVATE | _ANONYMOUS | _NORESERVE | _FIXED, -1)
        self._collect()
        return OK

    def _has_mappings(self, address: int, size: int) -> bool:
        return any(
            start < address + size and address < start + memory.size
            for start, memory in self.mapped.items()
        )

    def _collect(self) -> None:
        for handle, memory in list(self.memories.items()):
            if not memory.handles and not memory.mappings:
                os.close(memory.file)
                del self.memories[handle]


def allocate(
    library: FakeLibrary,
) -> Callable[[ModelConfig, torch.dtype, torch.device, int], KvPools]:
    """In the place of `memory.allocate`: pools as on a CUDA device, over the library's memory."""

    def reserved(
        config: ModelConfig, dtype: torch.dtype, device: torch.device, blocks: int
    ) -> KvPools:
        layers = len(config.layers)
        shape = (config.num_kv_heads, BLOCK_TOKENS, config.head_dim)
        pools = ReservedPools(library.driver(), device, 2 * layers, blocks, shape, dtype)
        keys, values = pools.tensors[:layers], pools.tensors[layers:]
        return KvPools(keys, values, blocks, block_bytes(config, dtype), (), pools)

    return reserved


def is_accessible(address: int, size: int) -> bool:
    """Whether every page of it can be read. Asks the system, which does not end the process."""
    reader, writer = os.pipe()
    try:
        for page in range(address, address + size, mmap.PAGESIZE):
            if _libc.write(writer, ctypes.c_void_p(page), 1) != 1:
                return False
            os.read(reader, 1)
        return True
    finally:
        os.close(reader)
        os.close(writer)


def _is_valid(prop: AllocationProp) -> bool:
    """Pinned memory of device 0, with nothing else asked for."""
    return (
        (prop.type, prop.requestedHandleTypes, prop.location.type, prop.location.id)
        == (
            1,
            0,
            1,
            0,
        )
        and not any(bytes(prop.allocFlags))
        and prop.win32HandleMetaData is None
    )


def _map(address: int, size: int, protection: int, flags: int, file: int) -> None:
    assert _libc.mmap(address, size, protection, flags, file, 0) == address

"""The part of CUDA's driver that puts memory under reserved addresses, through ctypes.

CUDA Driver API, "Virtual Memory Management". Signatures and structs are those of cuda.h, which
tests compile against.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import (
    POINTER,
    byref,
    c_char_p,
    c_int,
    c_size_t,
    c_ubyte,
    c_ulonglong,
    c_ushort,
    c_void_p,
)
from typing import Any

import torch

OUT_OF_MEMORY = 2
_DEINITIALIZED = 4

_VIRTUAL_MEMORY_MANAGEMENT = 102
_PINNED = 1
_ON_DEVICE = 1
_READ_WRITE = 3
_RECOMMENDED = 1


class Location(ctypes.Structure):
    """CUmemLocation"""

    _fields_ = (("type", c_int), ("id", c_int))


class AllocationFlags(ctypes.Structure):
    """CUmemAllocationProp.allocFlags"""

    _fields_ = (
        ("compressionType", c_ubyte),
        ("gpuDirectRDMACapable", c_ubyte),
        ("usage", c_ushort),
        ("reserved", c_ubyte * 4),
    )


class AllocationProp(ctypes.Structure):
    """CUmemAllocationProp"""

    _fields_ = (
        ("type", c_int),
        ("requestedHandleTypes", c_int),
        ("location", Location),
        ("win32HandleMetaData", c_void_p),
        ("allocFlags", AllocationFlags),
    )


class AccessDesc(ctypes.Structure):
    """CUmemAccessDesc"""

    _fields_ = (("location", Location), ("flags", c_int))


PROTOTYPES: dict[str, tuple[Any, ...]] = {
    "cuMemAddressReserve": (POINTER(c_ulonglong), c_size_t, c_size_t, c_ulonglong, c_ulonglong),
    "cuMemAddressFree": (c_ulonglong, c_size_t),
    "cuMemCreate": (POINTER(c_ulonglong), c_size_t, POINTER(AllocationProp), c_ulonglong),
    "cuMemRelease": (c_ulonglong,),
    "cuMemRetainAllocationHandle": (POINTER(c_ulonglong), c_void_p),
    "cuMemMap": (c_ulonglong, c_size_t, c_size_t, c_ulonglong, c_ulonglong),
    "cuMemUnmap": (c_ulonglong, c_size_t),
    "cuMemSetAccess": (c_ulonglong, c_size_t, POINTER(AccessDesc), c_size_t),
    "cuMemGetAllocationGranularity": (POINTER(c_size_t), POINTER(AllocationProp), c_int),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDeviceGetAttribute": (POINTER(c_int), c_int, c_int),
    "cuGetErrorString": (c_int, POINTER(c_char_p)),
}
"""The arguments' types. All give a CUresult, which is an int."""


class DriverError(RuntimeError):
    """What a function of the driver said, with the function's name."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        """A CUresult; None: it was not called at all."""


class Driver:
    """One device. Nothing waits for it but `synchronize`; memory that work in a stream may still
    use must not be unmapped before."""

    def __init__(self, library: Any, ordinal: int, synchronize: Callable[[], None]) -> None:
        """`library` has the functions of PROTOTYPES. DriverError when the device lacks them."""
        self._library = library
        self._location = Location(_ON_DEVICE, ordinal)
        self._prop = AllocationProp(type=_PINNED, location=self._location)
        self.synchronize = synchronize
        """Returns when the device has done all that it was given."""
        device, supported, granularity = c_int(), c_int(), c_size_t()
        self._call("cuDeviceGet", byref(device), ordinal)
        attribute = _VIRTUAL_MEMORY_MANAGEMENT
        self._call("cuDeviceGetAttribute", byref(supported), attribute, device)
        if not supported.value:
            raise DriverError("the device has no virtual memory management")
        self._call(
            "cuMemGetAllocationGranularity", byref(granularity), byref(self._prop), _RECOMMENDED
        )
        self.granularity = granularity.value
        """Bytes of which every size and address is a multiple; a power of two."""

    def reserve(self, size: int) -> int:
        """Addresses without memory."""
        address = c_ulonglong()
        self._call("cuMemAddressReserve", byref(address), size, self.granularity, 0, 0)
        return address.value

    def free(self, address: int, size: int) -> None:
        """Gives back what `reserve` gave, where nothing is mapped any more."""
        self._call("cuMemAddressFree", address, size)

    def map(self, addresses: list[int], size: int) -> None:
        """New memory of `size` bytes, undefined, which is seen at each of the addresses. It lives
        until it is unmapped at all of them. After an error nothing has changed."""
        handle = c_ulonglong()
        self._call("cuMemCreate", byref(handle), size, byref(self._prop), 0)
        self._put(handle, addresses, size)

    def share(self, source: int, target: int, size: int) -> None:
        """What one `map` put at `source` is seen at `target` as well. After an error nothing has
        changed."""
        handle = c_ulonglong()
        self._call("cuMemRetainAllocationHandle", byref(handle), source)
        self._put(handle, [target], size)

    def _put(self, handle: c_ulonglong, addresses: list[int], size: int) -> None:
        """Gives the handle up: what is mapped stays without it, there is nothing to keep for each
        chunk."""
        mapped: list[int] = []
        try:
            for address in addresses:
                self._call("cuMemMap", address, size, 0, handle, 0)
                mapped.append(address)
                access = AccessDesc(self._location, _READ_WRITE)
                self._call("cuMemSetAccess", address, size, byref(access), 1)
        except DriverError:
            for address in mapped:
                self.unmap(address, size)
            raise
        finally:
            self._call("cuMemRelease", handle)

    def unmap(self, address: int, size: int) -> None:
        """Exactly what one `map` put at this address."""
        self._call("cuMemUnmap", address, size)

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, name)(*arguments)
        # When the process ends, the driver may go before the last tensor, and all memory with it.
        if status not in (0, _DEINITIALIZED):
            raise DriverError(f"{name}: {self._text(status)}", status)

    def _text(self, status: int) -> str:
        text = c_char_p()
        self._library.cuGetErrorString(status, byref(text))
        return (text.value or b"unknown error").decode() + f" (CUresult {status})"


def open_driver(device: torch.device) -> Driver:
    """DriverError, with the reason, where memory cannot be mapped under reserved addresses."""
    if torch.version.hip is not None:
        raise DriverError("not written for ROCm")
    try:
        library = ctypes.CDLL("libcuda.so.1")
        for name, arguments in PROTOTYPES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, c_int
    except (OSError, AttributeError) as error:
        raise DriverError(str(error)) from None
    ordinal = torch.cuda.current_device() if device.index is None else device.index
    torch.cuda.synchronize(ordinal)  # makes the device's context this thread's, if it is not yet
    return Driver(library, ordinal, lambda: torch.cuda.synchronize(ordinal))

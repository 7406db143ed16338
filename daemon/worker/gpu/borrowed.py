"""A torch tensor over memory that is not torch's.

By DLPack (dmlc.github.io/dlpack: an unversioned `DLManagedTensor` in a capsule). Not by
`__cuda_array_interface__`: there torch asks the driver whose the address is, and the driver knows
nothing of addresses that are reserved without memory.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils import dlpack

_CPU, _CUDA = 1, 2
_UINT = 1
_CAPSULE = b"dltensor"

_Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class _Device(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class _DataType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int),
        ("dtype", _DataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _ManagedTensor(ctypes.Structure):
    _fields_ = (("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", _Deleter))


_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)

_Held = dict[int, tuple[_ManagedTensor, object, Callable[[], None]]]
_held: _Held = {}
"""What torch has pointers to, by its address, until torch calls the deleter."""


# Bound here: when Python ends, a module's names may be gone before its last tensor.
def _delete(address: int, held: _Held = _held) -> None:
    _, _, on_death = held.pop(address)
    on_death()


_deleter = _Deleter(_delete)
# For the same reason it is never freed.
ctypes.pythonapi.Py_IncRef(ctypes.py_object(_deleter))


def borrow(
    address: int, num_bytes: int, device: torch.device, on_death: Callable[[], None]
) -> Tensor:
    """uint8 [num_bytes] over memory of `device`, which nothing reads here. `on_death` is called
    once, when the tensor and all of its views are gone."""
    kind, index = (_CPU, 0) if device.type == "cpu" else (_CUDA, device.index or 0)
    shape = (ctypes.c_int64 * 1)(num_bytes)
    tensor = _Tensor(address, _Device(kind, index), 1, _DataType(_UINT, 8, 1), shape, None, 0)
    managed = _ManagedTensor(tensor, None, _deleter)
    key = ctypes.addressof(managed)
    _held[key] = (managed, shape, on_death)
    return dlpack.from_dlpack(_new_capsule(key, _CAPSULE, None))

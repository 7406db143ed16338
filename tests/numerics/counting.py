"""The bytes of tensors that some work has at once, on a CPU as `torch.cuda.max_memory_allocated`
counts them on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode


class Counting(TorchDispatchMode):
    """Memory that operations made and that something still refers to. What one of them takes and
    gives back within itself is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        given = {storage._cdata for storage in _storages((args, kwargs))}
        for key in [key for key, (ref, _) in self._live.items() if ref.expired()]:
            del self._live[key]
        for storage in _storages(out):
            if storage._cdata not in given:
                self._live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return out


def peak(work: Callable[[], None]) -> int:
    with Counting() as counting:
        work()
    return counting.peak


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    tensors = [leaf for leaf in _pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
    return [tensor.untyped_storage() for tensor in tensors]

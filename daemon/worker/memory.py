"""The KV tensors of a model: one pool of keys and one of values for each layer.

A pool is [blocks, kv_heads, 16, head_dim]. It is reserved address space, and costs what was used of
it, not its size. On a CPU the system gives a page when a block is first written; on a CUDA device
`gpu/reserved.py` puts memory under blocks before they are used, or has all of it from the start
where the driver cannot.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantd.daemon.types import BLOCK_TOKENS, StepPlan
from quantd.daemon.worker.gpu.driver import OUT_OF_MEMORY, DriverError, open_driver
from quantd.daemon.worker.gpu.reserved import ReservedPools
from quantd.daemon.worker.machine import MAP_NORESERVE, available_memory, total_memory
from quantd.daemon.worker.models.config import ModelConfig
from quantd.kernels import ops
from quantd.plugins.api import Refused

_DEFAULT_SEQUENCES = 8
_DEFAULT_SHARE = 4


@dataclass(frozen=True, slots=True, repr=False)  # which would read memory that is not there
class KvPools:
    keys: tuple[Tensor, ...]
    """One per layer."""
    values: tuple[Tensor, ...]
    num_blocks: int
    """The budget; ids are below `max_blocks`."""
    block_bytes: int
    """Of one block over all layers, keys and values."""
    windowed: tuple[int, ...] = ()
    """The layers in which a row sees only the last tokens."""
    reserved: ReservedPools | None = None
    """Who owns the tensors' memory, where it is not there from the start."""
    notes: tuple[str, ...] = ()
    """For the user."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All keys, then all values."""
        return (*self.keys, *self.values)

    @property
    def max_blocks(self) -> int:
        return self.waste_block if self.reserved is None else self.reserved.num_blocks

    @property
    def waste_block(self) -> int:
        """A block that is nobody's and can always be written to, in every layer; what is read
        there means nothing. The tensors' last one, and no part of any budget."""
        return self.keys[0].shape[0] - 1

    @property
    def window_share(self) -> float:
        """The part of a block's bytes that `trim` gives back: whole pages or nothing."""
        first = self.keys[0]
        if first.device.type != "cpu" or first[0].nbytes % mmap.PAGESIZE:
            return 0.0
        return len(self.windowed) / len(self.keys)

    def trim(self, block: int) -> None:
        """Give back what the layers with a window hold of a block; read again it is zeros."""
        assert self.window_share
        for layer in self.windowed:
            for tensor in (self.keys[layer], self.values[layer]):
                _madvise(tensor[block].data_ptr(), tensor[block].nbytes)

    def copy(self, src: int, dst: int) -> None:
        """Copies one whole block, in every layer."""
        ops.copy_blocks(self.tensors, ((src, dst),))

    def ensure(self, num_blocks: int) -> None:
        """To be called before the blocks below `num_blocks` are used, and again after a `release`.
        MemoryError, and nothing has changed, when the device has not enough memory. Not while a
        graph is being recorded."""
        if self.reserved is not None:
            self.reserved.ensure(num_blocks)

    def ensure_blocks(self, blocks: Iterable[int]) -> None:
        """As `ensure`, for these alone: what was released below them stays released."""
        if self.reserved is not None:
            self.reserved.ensure_blocks(blocks)

    def release(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Gives back the memory that lies wholly in these half-open ranges of blocks, whose bytes
        are undefined then. On a CUDA device it waits for all that was given to the device, and
        the blocks may not be used before the next `ensure`."""
        if self.reserved is not None:
            self.reserved.release(ranges)
            return
        if self.keys[0].device.type != "cpu":
            return
        page = mmap.PAGESIZE
        for tensor in self.tensors:
            step = tensor[0].nbytes
            for start, stop in ranges:
                first = -(-(tensor.data_ptr() + start * step) // page) * page
                last = (tensor.data_ptr() + stop * step) // page * page
                if last > first:
                    _madvise(first, last - first)


def new_blocks(plan: StepPlan) -> Iterator[int]:
    """Of all that a plan uses, those that no earlier plan need have used, and some that one has."""
    for chunk in plan.chunks:
        yield from chunk.blocks
    for copy in plan.copies:
        if copy.kind in ("cow", "fetch"):
            yield copy.dst


def block_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    per_token = 2 * config.num_kv_heads * config.head_dim * dtype.itemsize
    return len(config.layers) * per_token * BLOCK_TOKENS


def num_blocks(kv_bytes: int | None, bytes_per_block: int, max_context: int) -> int:
    """The budget on a CPU, in blocks.

    With `kv_bytes`, which `check_kv_bytes` has let pass, that many bytes. A MemoryError when the
    machine no longer has them.
    Without, enough for eight sequences of the full context, but no more than a quarter of what is
    available now, and at least one block.
    """
    available = available_memory()
    if kv_bytes is not None:
        if kv_bytes > available:
            raise _unavailable(kv_bytes, available)
        return kv_bytes // bytes_per_block
    wanted = _DEFAULT_SEQUENCES * -(-max_context // BLOCK_TOKENS)
    return max(1, min(wanted, available // _DEFAULT_SHARE // bytes_per_block))


def check_kv_bytes(
    kv_bytes: int | None, config: ModelConfig, dtype: torch.dtype, device: torch.device
) -> None:
    """To be called before any weight is loaded.

    Refused when `kv_bytes` is less than one block or more than `device` has at all, which no later
    attempt can change; MemoryError when it is more than what is available now.
    """
    if kv_bytes is None:
        return
    needed = block_bytes(config, dtype)
    if kv_bytes < needed:
        raise Refused(f"kv_bytes is {kv_bytes}, less than the {needed} bytes of one block")
    total = _total(device)
    if kv_bytes > total:
        raise Refused(f"kv_bytes is {kv_bytes}, more than the {total} bytes that {device} has")
    available = _available(device)
    if kv_bytes > available:
        raise _unavailable(kv_bytes, available)


def _unavailable(kv_bytes: int, available: int) -> MemoryError:
    return MemoryError(
        f"kv_bytes is {kv_bytes}, more than the {available} bytes that are available now"
    )


def allocate(config: ModelConfig, dtype: torch.dtype, device: torch.device, blocks: int) -> KvPools:
    """Pools with a budget of so many blocks."""
    bytes_per_block = block_bytes(config, dtype)
    shape = (config.num_kv_heads, BLOCK_TOKENS, config.head_dim)
    windowed = tuple(i for i, layer in enumerate(config.layers) if layer.window is not None)
    num_layers = len(config.layers)
    reserved: ReservedPools | None = None
    notes: tuple[str, ...] = ()
    if device.type == "cuda":
        tensors, reserved, notes = _on_cuda(device, 2 * num_layers, blocks, shape, dtype)
    else:
        tensors = _on_cpu(2 * num_layers, bytes_per_block, blocks, shape, dtype)
    keys, values = tensors[:num_layers], tensors[num_layers:]
    return KvPools(keys, values, blocks, bytes_per_block, windowed, reserved, notes)


def _on_cuda(
    device: torch.device, num_pools: int, blocks: int, shape: tuple[int, ...], dtype: torch.dtype
) -> tuple[tuple[Tensor, ...], ReservedPools | None, tuple[str, ...]]:
    """(the pools, who owns their memory, notes)."""
    try:
        reserved = ReservedPools(open_driver(device), device, num_pools, blocks, shape, dtype)
        return reserved.tensors, reserved, ()
    except DriverError as error:
        if error.status == OUT_OF_MEMORY:
            raise MemoryError(f"no memory for the KV pools: {error}") from None
        note = f"the KV pools take all of their memory at once and keep it: {error}"
    room = (blocks + 1, *shape)
    tensors = tuple(torch.empty(room, dtype=dtype, device=device) for _ in range(num_pools))
    return tensors, None, (note,)


def _on_cpu(
    num_pools: int, bytes_per_block: int, blocks: int, shape: tuple[int, ...], dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """With room for all of the machine's memory, where the system hands out so many addresses."""

    def pools(room: int) -> tuple[Tensor, ...]:
        return tuple(_reserve((room + 1, *shape), dtype) for _ in range(num_pools))

    try:
        return pools(max(blocks, total_memory() // bytes_per_block))
    except OSError:
        return pools(blocks)


def _reserve(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros on pages that exist once they are written. OSError when there is no address space.

    Not torch.empty, whose memory the system counts as promised: a process that holds several pools
    could no longer fork.
    """
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=flags)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def num_host_blocks(host_kv_bytes: int, bytes_per_block: int) -> int:
    """Places of the host pool. Refused when the budget is less than one block, or more than the
    machine has at all."""
    if host_kv_bytes == 0:
        return 0
    if host_kv_bytes < bytes_per_block:
        raise Refused(
            f"host_kv_bytes is {host_kv_bytes}, less than the {bytes_per_block} bytes of one block"
        )
    total = total_memory()
    if host_kv_bytes > total:
        raise Refused(
            f"host_kv_bytes is {host_kv_bytes}, more than the {total} bytes that the machine has"
        )
    return host_kv_bytes // bytes_per_block


_libc = ctypes.CDLL(None, use_errno=True)
_MADV_DONTNEED = 4


def _madvise(address: int, length: int) -> None:
    if _libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(length), _MADV_DONTNEED) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"madvise: {os.strerror(number)}")


def _available(device: torch.device) -> int:
    if device.type == "cuda":
        available, _ = torch.cuda.mem_get_info(device)
        return available
    return available_memory()


def _total(device: torch.device) -> int:
    if device.type == "cuda":
        _, total = torch.cuda.mem_get_info(device)
        return total
    return total_memory()

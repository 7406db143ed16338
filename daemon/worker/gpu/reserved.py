"""Pools whose memory comes and goes in chunks while their tensors stay where they are.

A pool is reserved addresses for its whole budget. All pools of a model are of one shape, so that
their chunks lie at the same blocks, and a chunk is under all of them or under none.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from quantd.daemon.worker.gpu.borrowed import borrow
from quantd.daemon.worker.gpu.driver import OUT_OF_MEMORY, Driver, DriverError

_MOST_CHUNKS = 16384
"""Of all pools together: mapping one takes the driver tens of microseconds, so that a chunk grows
with the budget."""
_MOST_CHUNK_BYTES = 64 << 20


class ReservedTensor:
    """Addresses, and which chunks of them have memory. The addresses live as long as `tensor`.

    The first chunk has `lent` memory while it has none of its own, for Triton asks the driver about
    a tensor's first address before it launches, and refuses one that the device cannot read.
    """

    def __init__(self, driver: Driver, num_bytes: int, chunk_bytes: int) -> None:
        self._driver = driver
        self._size, self._chunk_bytes = num_bytes, chunk_bytes
        self._address = driver.reserve(num_bytes)
        self._mapped: set[int] = set()
        self._lender: int | None = None
        """The chunk whose memory the first one has, or will have again."""
        self._is_lent = False

    def tensor(self, device: torch.device) -> Tensor:
        """uint8, all of it. To be called once: with this tensor and its views go the memory and
        the addresses."""
        return borrow(self._address, self._size, device, self._free)

    def address(self, chunk: int) -> int:
        return self._address + chunk * self._chunk_bytes

    def is_mapped(self, chunk: int) -> bool:
        return chunk in self._mapped

    def lend(self, chunk: int) -> None:
        """From now on the first chunk has the memory of this one, which always has some, where it
        has none of its own. Nobody counts on what is there."""
        self._lender = chunk
        self._lend()

    def map(self, chunk: int) -> None:
        """DriverError, and nothing has changed, when there is no memory."""
        if chunk == 0:
            self._take_back()
        try:
            self._driver.map([self.address(chunk)], self._chunk_bytes)
        except DriverError:
            if chunk == 0:
                self._lend()
            raise
        self.note(chunk)

    def note(self, chunk: int) -> None:
        """Somebody else has mapped it."""
        assert chunk not in self._mapped
        self._mapped.add(chunk)

    def unmap(self, chunk: int) -> None:
        """The device no longer uses it."""
        self._mapped.remove(chunk)
        self._driver.unmap(self.address(chunk), self._chunk_bytes)
        if chunk == 0:
            self._lend()

    def _lend(self) -> None:
        if self._lender is not None:
            self._driver.share(self.address(self._lender), self._address, self._chunk_bytes)
            self._is_lent = True

    def _take_back(self) -> None:
        # Work may be under way, but none that touches it: nobody has a block there.
        if self._is_lent:
            self._driver.unmap(self._address, self._chunk_bytes)
            self._is_lent = False

    def _free(self) -> None:
        self._driver.synchronize()
        self._take_back()
        self._lender = None
        for chunk in sorted(self._mapped):
            self.unmap(chunk)
        self._driver.free(self._address, self._size)


class ReservedPools:
    """`tensors`, each [num_blocks or more, *shape], of undefined content. For one thread.

    A block may be used from the `ensure` that names it until the `release` that does. The last
    block, `waste_block`, lies beyond `num_blocks` and always has memory, one chunk for all pools
    together: what is written there nobody can count on, in any pool.
    """

    def __init__(
        self,
        driver: Driver,
        device: torch.device,
        num_pools: int,
        num_blocks: int,
        shape: tuple[int, ...],
        dtype: torch.dtype,
    ) -> None:
        """DriverError or MemoryError, and nothing is left behind."""
        self._driver = driver
        self.num_blocks = num_blocks
        self._step = math.prod(shape) * dtype.itemsize
        self._chunk_bytes = chunk_bytes(driver.granularity, num_blocks * self._step, num_pools)
        # The waste block begins where no chunk has a part of another block.
        num_chunks = self._chunk(num_blocks * self._step - 1) + 1
        self.waste_block = -(-num_chunks * self._chunk_bytes // self._step)
        rows = self.waste_block + 1
        all_chunks = self._chunk(rows * self._step - 1) + 1
        size = all_chunks * self._chunk_bytes
        pools: list[ReservedTensor] = []
        tensors: list[Tensor] = []
        for _ in range(num_pools):
            pools.append(ReservedTensor(driver, size, self._chunk_bytes))
            flat = pools[-1].tensor(device)[: rows * self._step]
            tensors.append(flat.view(dtype).view(rows, *shape))
        self._pools, self.tensors = tuple(pools), tuple(tensors)
        self._num_mapped = 0
        self._unneeded = bytearray(b"\1") * num_blocks
        """Of each block: nobody counts on its bytes."""
        self._whole = 0
        """All blocks below are needed, and so have memory."""
        for chunk in range(num_chunks, all_chunks):
            self._map_waste(chunk)
        for pool in pools:
            pool.lend(num_chunks)

    @property
    def mapped_bytes(self) -> int:
        """Memory under blocks, the waste block not counted."""
        return self._num_mapped * self._chunk_bytes * len(self._pools)

    def ensure(self, num_blocks: int) -> None:
        """The blocks below `num_blocks` have memory. MemoryError, and nothing has changed, when
        there is not enough."""
        assert num_blocks <= self.num_blocks
        if num_blocks > self._whole:
            self._ensure([(self._whole, num_blocks)])
            self._whole = num_blocks

    def ensure_blocks(self, blocks: Iterable[int]) -> None:
        """As `ensure`, for these alone."""
        self._ensure([(block, block + 1) for block in blocks if self._unneeded[block]])

    def release(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Nobody counts on the bytes of these half-open ranges of blocks any more. Memory of which
        no other block has a part goes back, when the device has done all that it was given."""
        for start, stop in ranges:
            self._unneeded[start:stop] = b"\1" * (stop - start)
            self._whole = min(self._whole, start)
        chunks = [
            chunk
            for chunk in self._chunks(ranges)
            if self._pools[0].is_mapped(chunk) and not self._is_needed(chunk)
        ]
        if chunks:
            self._driver.synchronize()
        for chunk in chunks:
            self._unmap(chunk)

    def _ensure(self, ranges: Sequence[tuple[int, int]]) -> None:
        done: list[int] = []
        wanted = [chunk for chunk in self._chunks(ranges) if not self._pools[0].is_mapped(chunk)]
        for chunk in wanted:
            try:
                self._map(chunk)
            except DriverError as error:
                for earlier in done:
                    self._unmap(earlier)
                if error.status != OUT_OF_MEMORY:
                    raise
                more = len(wanted) * self._chunk_bytes * len(self._pools)
                raise MemoryError(
                    f"the KV pools have {self.mapped_bytes} bytes and need {more} more, "
                    f"which the device does not have: {error}"
                ) from None
            done.append(chunk)
        for start, stop in ranges:
            self._unneeded[start:stop] = bytes(stop - start)

    def _map(self, chunk: int) -> None:
        for i, pool in enumerate(self._pools):
            try:
                pool.map(chunk)
            except DriverError:
                for done in self._pools[:i]:
                    done.unmap(chunk)
                raise
        self._num_mapped += 1

    def _unmap(self, chunk: int) -> None:
        for pool in self._pools:
            pool.unmap(chunk)
        self._num_mapped -= 1

    def _map_waste(self, chunk: int) -> None:
        self._driver.map([pool.address(chunk) for pool in self._pools], self._chunk_bytes)
        for pool in self._pools:
            pool.note(chunk)

    def _is_needed(self, chunk: int) -> bool:
        """Some block has a part of it whose bytes count."""
        start = chunk * self._chunk_bytes // self._step
        stop = -(-(chunk + 1) * self._chunk_bytes // self._step)
        return self._unneeded.find(0, start, stop) >= 0

    def _chunks(self, ranges: Sequence[tuple[int, int]]) -> list[int]:
        """Those of which the blocks have a part, each once, in order."""
        found: set[int] = set()
        for start, stop in ranges:
            if start < stop:
                last = self._chunk(stop * self._step - 1)
                found.update(range(self._chunk(start * self._step), last + 1))
        return sorted(found)

    def _chunk(self, byte: int) -> int:
        return byte // self._chunk_bytes


def chunk_bytes(granularity: int, pool_bytes: int, num_pools: int) -> int:
    """The smallest power of two times the granularity with which there are few enough chunks."""
    size = granularity
    while size < _MOST_CHUNK_BYTES and num_pools * -(-pool_bytes // size) > _MOST_CHUNKS:
        size *= 2
    return size

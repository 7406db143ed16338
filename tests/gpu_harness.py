"""What the tests of GPUs share: the device, sizes, batches, and a model under plans.

`QUANTD_GPU_TESTS_ON_CPU=1` runs the bodies on CPU tensors of small sizes: it shows that the tests
themselves work, and nothing of a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from quantd.kernels import ops, reference
from quantd.kernels.batch import BLOCK_SIZE, AttentionBatch

ON_CPU = os.environ.get("QUANTD_GPU_TESTS_ON_CPU") == "1"
DEVICE = torch.device("cpu" if ON_CPU else "cuda:0")
IS_THERE = ON_CPU or torch.cuda.is_available()
MARKS = [pytest.mark.gpu, pytest.mark.skipif(not IS_THERE, reason="there is no CUDA device")]
NEEDS_STREAMS = pytest.mark.skipif(ON_CPU, reason="a CPU has no streams")
"""For what is about the device itself."""

E4M3 = torch.float8_e4m3fn
DTYPES = [torch.bfloat16, torch.float16]
MAX_NMSE = {torch.bfloat16: 2.0**-15, torch.float16: 2.0**-21, torch.float32: 1e-10}
"""Mean squared error over mean square, against fp64: what rounding the result and one operand once
costs, with some room. What is wrong by design is wrong by far."""

_Size = TypeVar("_Size")


def sized(real: _Size, small: _Size) -> _Size:
    """`small` where a CPU runs it."""
    return small if ON_CPU else real


def need_memory(num_bytes: int) -> None:
    """Skips the test where the device has less than that now."""
    if ON_CPU:
        return
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info(DEVICE)[0]
    if free < num_bytes:
        pytest.skip(f"needs {num_bytes >> 20} MiB of the device, {free >> 20} are free")


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def error_of(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape
    assert bool(got.isfinite().all()), "a result is not finite"
    wide = want.double()
    return float((got.double() - wide).square().mean() / wide.square().mean())


def assert_close(got: Tensor, want: Tensor, more: float = 1.0) -> None:
    """`want` in fp64. more: times what is allowed for the dtype of `got`."""
    error = error_of(got, want)
    assert error <= more * MAX_NMSE[got.dtype], f"NMSE {error:.2e}"


def same_bits(got: Tensor, want: Tensor) -> bool:
    return got.dtype == want.dtype and torch.equal(
        got.contiguous().view(torch.uint8), want.contiguous().view(torch.uint8)
    )


def make_batch(lengths: Sequence[tuple[int, int]], tables: Sequence[Tensor]) -> AttentionBatch:
    """(rows, keys) of each sequence, and its blocks; the table is padded with block 0."""
    starts = torch.tensor([0, *(rows for rows, _ in lengths)]).cumsum(0).int()
    table = torch.nn.utils.rnn.pad_sequence([t.cpu() for t in tables], batch_first=True).int()
    at = [torch.arange(keys - rows, keys) for rows, keys in lengths]
    slots = [
        blocks.cpu()[places // BLOCK_SIZE].long() * BLOCK_SIZE + places % BLOCK_SIZE
        for blocks, places in zip(tables, at, strict=True)
    ]
    kv_len = torch.tensor([keys for _, keys in lengths]).int()
    parts = (starts, kv_len, table, torch.cat(slots), torch.cat(at))
    return AttentionBatch(*(part.to(DEVICE) for part in parts))


@dataclass
class Attention:
    """Sequences over shuffled blocks of pools in which all that no row may read is NaN."""

    lengths: list[tuple[int, int]]
    q: Tensor
    pools: tuple[Tensor, Tensor]
    tables: list[Tensor]
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    kv_scale: tuple[float, float] = (1.0, 1.0)

    @classmethod
    def make(
        cls,
        lengths: list[tuple[int, int]],
        dtype: torch.dtype,
        pool_dtype: torch.dtype | None = None,
        heads: int = 32,
        kv_heads: int = 8,
        head_dim: int = 128,
    ) -> Attention:
        counts = [-(-keys // BLOCK_SIZE) for _, keys in lengths]
        order = torch.randperm(sum(counts) + 3) + 1
        tables = [part.to(DEVICE) for part in order[: sum(counts)].split(counts)]
        shape = (2, len(order) + 1, kv_heads, BLOCK_SIZE, head_dim)
        pools = torch.full(shape, float("nan"), device=DEVICE).to(pool_dtype or dtype)
        for (_, keys), table in zip(lengths, tables, strict=True):
            content = randn(2, len(table) * BLOCK_SIZE, kv_heads, head_dim)
            content[:, keys:] = float("nan")
            laid = content.unflatten(1, (-1, BLOCK_SIZE)).transpose(2, 3)
            pools.view(_bytes_of(pools))[:, table] = laid.to(pools.dtype).view(_bytes_of(pools))
        rows = sum(rows for rows, _ in lengths)
        fused = randn(rows, heads + 2, head_dim, dtype=dtype)
        return cls(lengths, fused[:, :heads], (pools[0], pools[1]), tables)

    def run(self) -> Tensor:
        return self._by(ops.paged_attention, self.q, self.pools)

    def specification(self) -> Tensor:
        """fp64, on the device."""
        k, v = (pool.double() for pool in self.pools)
        return self._by(reference.paged_attention, self.q.double(), (k, v))

    def _by(self, operation: Any, q: Tensor, pools: tuple[Tensor, Tensor]) -> Tensor:
        out: Tensor = operation(
            q,
            *pools,
            make_batch(self.lengths, self.tables),
            q.shape[2] ** -0.5,
            self.window,
            self.softcap,
            None if self.sinks is None else self.sinks.to(_wide(q.dtype)),
            self.kv_scale,
        )
        return out

    def part(self, index: int, start: int, stop: int) -> Attention:
        """Rows [start, stop) of one sequence, as a step of their own."""
        before = sum(rows for rows, _ in self.lengths[:index])
        rows, keys = self.lengths[index]
        q = self.q[before + start : before + stop]
        lengths = [(stop - start, keys - (rows - stop))]
        return replace(self, lengths=lengths, q=q, tables=[self.tables[index]])


def _bytes_of(pools: Tensor) -> torch.dtype:
    """What moves such numbers where their own type cannot be indexed."""
    return torch.uint8 if pools.dtype == E4M3 else pools.dtype


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32

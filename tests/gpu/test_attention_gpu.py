"""Attention on a GPU: against the specification at real sizes, its bits, its offsets."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from gpu_harness import DEVICE, E4M3, MARKS, Attention, assert_close, need_memory, randn, sized

from quantd.kernels import ops
from quantd.kernels.batch import BLOCK_SIZE, AttentionBatch

pytestmark = MARKS

HEADS = {"8B": (32, 8, 128), "70B": (64, 8, 128), "MHA, 64": (16, 16, 64), "MQA, 256": (8, 1, 256)}
RAGGED = sized(
    [(1, 1), (1, 4096), (333, 333), (2, 1500), (1, 512), (1, 1290), (7, 7), (3, 17), (512, 4000)],
    [(1, 1), (1, 140), (33, 33), (2, 50), (1, 16), (7, 7), (3, 17)],
)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("pool_dtype", [None, E4M3], ids=["as activations", "e4m3"])
def test_a_ragged_batch(heads: str, pool_dtype: torch.dtype | None, dtype: torch.dtype) -> None:
    case = Attention.make(RAGGED, dtype, pool_dtype, *HEADS[heads])
    scale = (1.0, 1.0) if pool_dtype is None else (0.7, 3.0)
    case = replace(case, kv_scale=scale)
    assert_close(case.run(), case.specification(), more=2)


@pytest.mark.parametrize("count", sized([1, 64, 256], [1, 3]))
def test_decodes(count: int, dtype: torch.dtype) -> None:
    lengths = [(1, 1 + (i * 977 + 31) % sized(8192, 90)) for i in range(count)]
    case = Attention.make(lengths, dtype)
    assert_close(case.run(), case.specification(), more=2)


def test_a_long_context(dtype: torch.dtype) -> None:
    keys = sized(131072, 600)
    need_memory(keys * 40000)
    case = Attention.make([(1, keys), (5, keys - 9)], dtype)
    assert_close(case.run(), case.specification(), more=2)


@pytest.mark.parametrize("window", [1, 17, 512])
@pytest.mark.parametrize(("softcap", "sinks"), [(None, False), (30.0, True)])
def test_windows_softcap_and_sinks(
    window: int, softcap: float | None, sinks: bool, dtype: torch.dtype
) -> None:
    case = Attention.make(RAGGED, dtype)
    case = replace(case, window=window, softcap=softcap, sinks=randn(32) if sinks else None)
    assert_close(case.run(), case.specification(), more=2)


@pytest.mark.parametrize("window", [None, 700])
@pytest.mark.parametrize("pool_dtype", [None, E4M3], ids=["as activations", "e4m3"])
def test_batched_equals_alone_bit_for_bit(
    window: int | None, pool_dtype: torch.dtype | None, dtype: torch.dtype
) -> None:
    case = replace(Attention.make(RAGGED, dtype, pool_dtype), window=window)
    together = case.run().split([rows for rows, _ in RAGGED])
    for index, (rows, keys) in enumerate(RAGGED):
        alone = case.part(index, 0, rows).run()
        assert torch.equal(alone, together[index]), f"{rows} rows of {keys} keys"


@pytest.mark.parametrize("window", [None, 700])
def test_chunked_equals_whole_bit_for_bit(window: int | None, dtype: torch.dtype) -> None:
    length = sized(3000, 90)
    case = replace(Attention.make([(length, length)], dtype), window=window)
    whole = case.run()
    cuts = [0, 1, 2, 9, 16, 17, length // 3, length // 2, length - 1, length]
    for start, stop in zip(cuts, cuts[1:], strict=False):
        assert torch.equal(case.part(0, start, stop).run(), whole[start:stop]), f"{start} to {stop}"


def test_the_same_bits_each_time(dtype: torch.dtype) -> None:
    case = Attention.make(RAGGED, dtype)
    first = case.run()
    assert all(torch.equal(case.run(), first) for _ in range(20))


def test_blocks_beyond_two_to_the_31_elements(dtype: torch.dtype) -> None:
    """Where 32-bit offsets into the pools would wrap around."""
    case = Attention.make([(1, 139), (20, 60)], dtype)
    want = case.run()
    per_block = case.pools[0][0].numel()
    first = sized((1 << 31) // per_block, 40) + 64
    count = first + len(case.pools[0])
    need_memory(4 * count * per_block + (1 << 30))
    far = []
    for pool in case.pools:
        wide = torch.full((count, *pool.shape[1:]), float("nan"), dtype=dtype, device=DEVICE)
        wide[first:] = pool
        far.append(wide)
    tables = [table + first for table in case.tables]
    assert torch.equal(replace(case, pools=(far[0], far[1]), tables=tables).run(), want)


def test_writes_beyond_two_to_the_31_elements(dtype: torch.dtype) -> None:
    per_block = 8 * BLOCK_SIZE * 128
    count = sized((1 << 31) // per_block, 40) + 64
    need_memory(4 * count * per_block + (1 << 30))
    pools = [torch.zeros(count, 8, BLOCK_SIZE, 128, dtype=dtype, device=DEVICE) for _ in "kv"]
    q, k, v = randn(3, 32, 128, dtype=dtype), randn(3, 8, 128, dtype=dtype), randn(3, 8, 128)
    v = v.to(dtype)
    cos, sin = torch.ones(3, 64, device=DEVICE), torch.zeros(3, 64, device=DEVICE)
    slots = torch.tensor([count * BLOCK_SIZE - 1, 5, (count - 9) * BLOCK_SIZE], device=DEVICE)
    ops.rotary_write_kv(q, k, v, cos, sin, *pools, slots)
    for pool, rows in zip(pools, (k, v), strict=True):
        blocks, places = slots // BLOCK_SIZE, slots % BLOCK_SIZE
        assert torch.equal(pool[blocks, :, places], rows)
        assert int(torch.count_nonzero(pool)) == int(torch.count_nonzero(rows))


def test_what_no_row_may_read_reaches_nothing(dtype: torch.dtype) -> None:
    """Pools hold NaN wherever nothing was written: results are finite, and the same over zeros."""
    case = Attention.make(RAGGED, dtype)
    got = case.run()
    assert bool(got.isfinite().all())
    k, v = (torch.nan_to_num(pool, nan=0.0) for pool in case.pools)
    assert torch.equal(replace(case, pools=(k, v)).run(), got)


def test_a_batch_without_rows(dtype: torch.dtype) -> None:
    case = Attention.make([(1, 1)], dtype)
    none = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    batch = AttentionBatch(
        torch.zeros(1, dtype=torch.int32, device=DEVICE),
        none.int(),
        torch.zeros(0, 1, dtype=torch.int32, device=DEVICE),
        none,
        none,
    )
    out = ops.paged_attention(case.q[:0], *case.pools, batch, 0.1, None, None, None)
    assert out.shape == (0, 32, 128)

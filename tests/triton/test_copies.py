"""Copies of blocks against the specification: all pools, in the order given."""

import pytest
import torch

from quantd.kernels import reference
from quantd.kernels.triton import copies

E4M3 = torch.float8_e4m3fn


@pytest.mark.parametrize("pool_dtype", [torch.float32, torch.float16, torch.bfloat16, E4M3])
@pytest.mark.parametrize("shape", [(6, 1, 16, 1), (6, 2, 16, 80)])
def test_copies_follow_one_another(pool_dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    got = [torch.randn(shape).to(pool_dtype) for _ in range(4)]
    want = [pool.clone() for pool in got]
    # A chain, a swap through a third block, a target twice, a block onto itself.
    pairs = [(0, 1), (1, 2), (3, 5), (4, 3), (5, 4), (0, 2), (3, 2), (1, 1)]
    copies.copy_blocks(got, pairs)
    reference.copy_blocks(want, pairs)
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g.view(torch.uint8), w.view(torch.uint8))


@pytest.mark.parametrize("pool_dtype", [torch.float32, torch.float16, torch.bfloat16, E4M3])
@pytest.mark.parametrize("shape", [(6, 1, 16, 1), (6, 2, 16, 80)])
def test_blocks_of_all_pools_in_rows_and_back(
    pool_dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    got = [torch.randn(shape).to(pool_dtype) for _ in range(4)]
    want = [pool.clone() for pool in got]
    rows = torch.randn(5, 4 * got[0][0].numel()).to(pool_dtype)
    others = rows.clone()
    copies.gather_blocks(got, [5, 0, 5, 2], rows)
    reference.gather_blocks(want, [5, 0, 5, 2], others)
    assert torch.equal(rows.view(torch.uint8), others.view(torch.uint8))
    # A block twice: it has the later row.
    copies.scatter_blocks(rows, got, [3, 1, 4, 3, 2])
    reference.scatter_blocks(others, want, [3, 1, 4, 3, 2])
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g.view(torch.uint8), w.view(torch.uint8))


def test_nothing_to_copy() -> None:
    pool = torch.randn(2, 1, 16, 4)
    before = pool.clone()
    copies.copy_blocks([pool], [])
    copies.copy_blocks([], [(0, 1)])
    copies.gather_blocks([pool], [], torch.zeros(1, 64))
    copies.scatter_blocks(torch.zeros(1, 64), [pool], [])
    assert torch.equal(pool, before)


def test_a_block_beyond_two_to_the_31_words() -> None:
    far = (1 << 17) + 1
    pool = torch.empty(far + 1, 64, 16, 16, dtype=torch.float32)
    assert pool.numel() > 1 << 31
    pool[0] = torch.randn(64, 16, 16)
    copies.copy_blocks([pool], [(0, far)])
    assert torch.equal(pool[far], pool[0])
    row = torch.zeros(1, pool[0].numel())
    copies.gather_blocks([pool], [far], row)
    copies.scatter_blocks(row * 2, [pool], [far - 1])
    assert torch.equal(pool[far - 1], pool[0] * 2)


def test_pools_that_differ_are_refused() -> None:
    with pytest.raises(AssertionError, match="pools differ"):
        copies.copy_blocks([torch.zeros(2, 1, 16, 4), torch.zeros(2, 1, 16, 8)], [(0, 1)])


def test_rows_that_do_not_fit_are_refused() -> None:
    pools = [torch.zeros(2, 1, 16, 4)]
    with pytest.raises(AssertionError, match="2 blocks, 1 rows"):
        copies.gather_blocks(pools, [0, 1], torch.zeros(1, 64))
    with pytest.raises(AssertionError, match="a row has 512 bytes"):
        copies.scatter_blocks(torch.zeros(1, 128), pools, [0])

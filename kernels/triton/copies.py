"""Copies of whole blocks within the pools on a GPU, all of them in one launch.

A program owns the same bytes of every block of one pool and makes the copies of them in the order
given: what one copy writes and a later one reads never passes from one program to another.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from quantd.kernels.triton.variant import Variant

_WORDS = 1024
"""Of four bytes, of a program."""

_WARPS = 4


@triton.jit(do_not_specialize=["num_copies"])
def copy_kernel(
    pools,  # int64: addresses
    copies,  # int64 [num_copies, 2]: source, target
    num_copies,
    block_words,
    WORDS: tl.constexpr,
):
    """Program (i, j): the words from j * WORDS on of pool i's blocks."""
    pool = tl.load(pools + tl.program_id(0)).to(tl.pointer_type(tl.int32))
    word = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    inside = word < block_words
    for i in range(num_copies):
        source = tl.load(copies + i * 2) * block_words
        target = tl.load(copies + i * 2 + 1) * block_words
        # Each thread reads the words that it has written itself.
        tl.store(pool + target + word, tl.load(pool + source + word, mask=inside), mask=inside)


def copy_blocks(pools: Sequence[torch.Tensor], copies: Sequence[tuple[int, int]]) -> None:
    """As the reference, for pools of one shape and dtype whose blocks are whole words of four
    bytes."""
    if not pools or not copies:
        return
    first = pools[0]
    assert all(p.shape == first.shape and p.dtype == first.dtype for p in pools), "pools differ"
    assert first[0].nbytes % 4 == 0, f"a block has {first[0].nbytes} bytes"
    numbers = [pool.data_ptr() for pool in pools] + [number for pair in copies for number in pair]
    # Without non_blocking torch would wait until the stream gets here. CUDA has taken the numbers
    # when the call returns, since they are not pinned.
    table = torch.tensor(numbers, dtype=torch.int64).to(first.device, non_blocking=True)
    words = first[0].nbytes // 4
    copy_kernel[(len(pools), triton.cdiv(words, _WORDS))](
        table[: len(pools)],
        table[len(pools) :],
        len(copies),
        words,
        WORDS=_WORDS,
        num_warps=_WARPS,
    )


VARIANTS = (
    Variant(
        "copy blocks",
        copy_kernel,
        {"pools": "*i64", "copies": "*i64", "num_copies": "i32", "block_words": "i32"},
        {"WORDS": _WORDS},
        num_warps=_WARPS,
        aligned=("pools", "block_words"),
    ),
)

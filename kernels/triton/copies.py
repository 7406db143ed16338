"""Copies of whole blocks on a GPU, all of them in one launch: within the pools, and between pools
and rows that each hold one block of all of them.

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


@triton.jit(do_not_specialize=["num_blocks"])
def rows_kernel(
    pools,  # int64: addresses
    rows,  # int32 [.., row_words]: in each of them a block of every pool
    blocks,  # int64 [num_blocks]
    num_blocks,
    block_words,
    row_words,
    GATHER: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Program (i, j): the words from j * WORDS on of pool i's blocks, to rows (GATHER) or back."""
    word = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    inside = word < block_words
    pool = tl.load(pools + tl.program_id(0)).to(tl.pointer_type(tl.int32)) + word
    row = rows + tl.program_id(0).to(tl.int64) * block_words + word
    for i in range(num_blocks):
        block = pool + tl.load(blocks + i) * block_words
        if GATHER:
            tl.store(row, tl.load(block, mask=inside), mask=inside)
        else:
            tl.store(block, tl.load(row, mask=inside), mask=inside)
        row += row_words


def copy_blocks(pools: Sequence[torch.Tensor], copies: Sequence[tuple[int, int]]) -> None:
    """As the reference, for pools of one shape and dtype whose blocks are whole words of four
    bytes."""
    if not pools or not copies:
        return
    first = pools[0]
    table = _table(pools, [number for pair in copies for number in pair])
    words = first[0].nbytes // 4
    copy_kernel[(len(pools), triton.cdiv(words, _WORDS))](
        table[: len(pools)],
        table[len(pools) :],
        len(copies),
        words,
        WORDS=_WORDS,
        num_warps=_WARPS,
    )


def gather_blocks(pools: Sequence[torch.Tensor], blocks: Sequence[int], rows: torch.Tensor) -> None:
    """As the reference, on the terms of `copy_blocks`."""
    _move(pools, blocks, rows, gather=True)


def scatter_blocks(
    rows: torch.Tensor, pools: Sequence[torch.Tensor], blocks: Sequence[int]
) -> None:
    """As the reference, on the terms of `copy_blocks`."""
    _move(pools, blocks, rows, gather=False)


def _move(
    pools: Sequence[torch.Tensor], blocks: Sequence[int], rows: torch.Tensor, gather: bool
) -> None:
    if not blocks:
        return
    table = _table(pools, blocks)
    words = pools[0][0].nbytes // 4
    assert len(blocks) <= len(rows), f"{len(blocks)} blocks, {len(rows)} rows"
    assert rows[0].nbytes == len(pools) * words * 4, f"a row has {rows[0].nbytes} bytes"
    rows_kernel[(len(pools), triton.cdiv(words, _WORDS))](
        table[: len(pools)],
        rows.view(torch.int32),
        table[len(pools) :],
        len(blocks),
        words,
        len(pools) * words,
        GATHER=gather,
        WORDS=_WORDS,
        num_warps=_WARPS,
    )


def _table(pools: Sequence[torch.Tensor], numbers: Sequence[int]) -> torch.Tensor:
    """The pools' addresses, then `numbers`, on the device."""
    first = pools[0]
    assert all(p.shape == first.shape and p.dtype == first.dtype for p in pools), "pools differ"
    assert first[0].nbytes % 4 == 0, f"a block has {first[0].nbytes} bytes"
    table = torch.tensor([*(pool.data_ptr() for pool in pools), *numbers], dtype=torch.int64)
    # Without non_blocking torch would wait until the stream gets here. CUDA has taken the numbers
    # when the call returns, since they are not pinned.
    return table.to(first.device, non_blocking=True)


VARIANTS = (
    Variant(
        "copy blocks",
        copy_kernel,
        {"pools": "*i64", "copies": "*i64", "num_copies": "i32", "block_words": "i32"},
        {"WORDS": _WORDS},
        num_warps=_WARPS,
        aligned=("pools", "block_words"),
    ),
    *(
        Variant(
            "gather blocks" if gather else "scatter blocks",
            rows_kernel,
            {
                "pools": "*i64",
                "rows": "*i32",
                "blocks": "*i64",
                "num_blocks": "i32",
                "block_words": "i32",
                "row_words": "i32",
            },
            {"GATHER": gather, "WORDS": _WORDS},
            num_warps=_WARPS,
            aligned=("pools", "rows", "block_words", "row_words"),
        )
        for gather in (True, False)
    ),
)

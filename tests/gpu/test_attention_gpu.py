"""Attention on a GPU where 32-bit offsets into the pools would wrap around."""

from __future__ import annotations

import pytest
import torch

from quantd.kernels import ops, reference
from quantd.kernels.batch import BLOCK_SIZE, AttentionBatch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
KV_HEADS, HEAD_DIM = 8, 128


def test_blocks_beyond_two_to_the_31_elements() -> None:
    num_blocks = (1 << 31) // (KV_HEADS * BLOCK_SIZE * HEAD_DIM) + 64
    if torch.cuda.mem_get_info()[0] < 5 * num_blocks * KV_HEADS * BLOCK_SIZE * HEAD_DIM:
        pytest.skip("needs 11 GB of free memory")
    pools = [
        torch.zeros(
            (num_blocks, KV_HEADS, BLOCK_SIZE, HEAD_DIM), dtype=torch.bfloat16, device="cuda"
        )
        for _ in range(2)
    ]
    table = torch.arange(num_blocks - 9, num_blocks, device="cuda", dtype=torch.int32)
    for pool in pools:
        pool[table.long()] = torch.randn_like(pool[table.long()])
    kv_len = 9 * BLOCK_SIZE - 5
    q = torch.randn(1, 32, HEAD_DIM, device="cuda").bfloat16()

    def attend(k: torch.Tensor, v: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
        batch = AttentionBatch(
            query_start=torch.tensor([0, 1], device="cuda", dtype=torch.int32),
            kv_len=torch.tensor([kv_len], device="cuda", dtype=torch.int32),
            block_table=blocks[None].contiguous(),
            slots=torch.zeros(1, device="cuda", dtype=torch.int64),
            positions=torch.tensor([kv_len - 1], device="cuda"),
        )
        return ops.paged_attention(q, k, v, batch, HEAD_DIM**-0.5, None, None, None)

    got = attend(*pools, table)
    near = torch.arange(9, device="cuda", dtype=torch.int32)
    k, v = (pool[table.long()].contiguous() for pool in pools)
    assert torch.equal(got, attend(k, v, near))
    batch = AttentionBatch(
        query_start=torch.tensor([0, 1], dtype=torch.int32),
        kv_len=torch.tensor([kv_len], dtype=torch.int32),
        block_table=near.cpu()[None],
        slots=torch.zeros(1, dtype=torch.int64),
        positions=torch.tensor([kv_len - 1]),
    )
    wide = (t.cpu().double() for t in (q, k, v))
    want = reference.paged_attention(*wide, batch, HEAD_DIM**-0.5, None, None, None)
    torch.testing.assert_close(got.cpu().double(), want, rtol=2e-2, atol=2e-2)

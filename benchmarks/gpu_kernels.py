"""The rows of `gpu.py` about attention and what stands beside it, each with a peer where one is at
hand. Formulas of bytes and operations count what must move and what must be done, no more."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from gpu_clock import Case, Made, Run

from quantd.kernels import ops, reference
from quantd.kernels.batch import BLOCK_SIZE, AttentionBatch

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
HIDDEN, INTERMEDIATE = 4096, 14336
DECODE_AIM, PREFILL_AIM, NORM_AIM = 0.85, 0.60, 0.85
_ENOUGH_BYTES = 64 << 20
"""Of less a GPU waits for the launch, not for its memory: there is no aim for it."""
E4M3 = torch.float8_e4m3fn


def cases(device: torch.device, quick: bool, tiny: bool) -> Iterator[Case]:
    streams, contexts = ((1, 64), (4096,)) if quick else ((1, 8, 64, 256), (512, 4096, 32768))
    prompts = {"1 x 2048": [(2048, 2048)], "1 x 8192": [(8192, 8192)]}
    chunk, decode = (512, 4096), (1, 4096)
    prompts["mixed: 512 after 3584, 64 decodes"] = [chunk, *[decode] * 64]
    rows: tuple[int, ...] = (1, 64, 4096)
    if tiny:
        streams, contexts, rows = (1, 3), (40,), (1, 5)
        prompts = {"1 x 40": [(40, 40)], "mixed": [(20, 40), (1, 33)]}
    for pool in (torch.bfloat16, E4M3):
        for count in streams:
            for context in contexts:
                yield _decode(count, context, pool, device)
    for title, lengths in prompts.items():
        yield _prefill(title, lengths, device)
    for count in rows:
        yield from _rows(count, device)
    yield _copies(3 if tiny else 64, device)


def _batch(lengths: Sequence[tuple[int, int]], device: torch.device) -> tuple[AttentionBatch, int]:
    """(rows, keys) of each sequence, over shuffled blocks; and how many blocks the pools need."""
    counts = [-(-keys // BLOCK_SIZE) for _, keys in lengths]
    tables = torch.randperm(sum(counts)).int().split(counts)
    starts = torch.tensor([0, *(rows for rows, _ in lengths)]).cumsum(0).int()
    places = [torch.arange(keys - rows, keys) for rows, keys in lengths]
    slots = [
        table[at // BLOCK_SIZE].long() * BLOCK_SIZE + at % BLOCK_SIZE
        for table, at in zip(tables, places, strict=True)
    ]
    table = torch.nn.utils.rnn.pad_sequence(list(tables), batch_first=True)
    kv_len = torch.tensor([keys for _, keys in lengths]).int()
    parts = (starts, kv_len, table, torch.cat(slots), torch.cat(places))
    return AttentionBatch(*(part.to(device) for part in parts)), sum(counts)


def _pools(num_blocks: int, dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
    shape = (num_blocks, KV_HEADS, BLOCK_SIZE, HEAD_DIM)
    if dtype == E4M3:  # any byte but those of a NaN
        made = [torch.empty(shape, dtype=torch.uint8, device=device).random_(0x60) for _ in "kv"]
        return [tensor.view(E4M3) for tensor in made]
    return [torch.empty(shape, dtype=dtype, device=device).normal_() for _ in "kv"]


def _kv_bytes(lengths: Sequence[tuple[int, int]], dtype: torch.dtype) -> int:
    return sum(keys for _, keys in lengths) * 2 * KV_HEADS * HEAD_DIM * dtype.itemsize


def _operations(lengths: Sequence[tuple[int, int]]) -> float:
    """Two products of two operations, for each pair of a row and a key that it sees."""
    pairs = sum(rows * (keys - (rows - 1) / 2) for rows, keys in lengths)
    return 4 * pairs * HEADS * HEAD_DIM


def _attend(q: torch.Tensor, pools: list[torch.Tensor], batch: AttentionBatch) -> torch.Tensor:
    return ops.paged_attention(q, *pools, batch, HEAD_DIM**-0.5, None, None, None)


def _decode(count: int, context: int, pool: torch.dtype, device: torch.device) -> Case:
    lengths = [(1, context)] * count

    def make() -> Made:
        batch, num_blocks = _batch(lengths, device)
        pools = _pools(num_blocks, pool, device)
        q = torch.randn(count, HEADS, HEAD_DIM, device=device).bfloat16()
        peers: dict[str, Run] = {}
        if pool == torch.bfloat16 and context % BLOCK_SIZE == 0:
            # The same bytes as one piece for each sequence.
            k, v = (tensor.view(count, KV_HEADS, context, HEAD_DIM) for tensor in pools)
            peers["torch sdpa, not paged"] = lambda: F.scaled_dot_product_attention(
                q[:, :, None], k, v, enable_gqa=True
            )
        if pool == torch.bfloat16 and importlib.util.find_spec("flashinfer"):
            peers["flashinfer"] = _flashinfer(q, pools, batch, lengths)
        moved = _kv_bytes(lengths, pool) + 2 * q.nbytes
        aim = DECODE_AIM if moved >= _ENOUGH_BYTES else None
        return Made(
            lambda: _attend(q, pools, batch), moved, _operations(lengths), "bf16", peers, aim
        )

    name = f"{count} x {context}, {'e4m3' if pool == E4M3 else 'bf16'} pools"
    return Case("decode attention", name, make, _kv_bytes(lengths, pool) + (1 << 28))


def _flashinfer(
    q: torch.Tensor,
    pools: list[torch.Tensor],
    batch: AttentionBatch,
    lengths: Sequence[tuple[int, int]],
) -> Run:
    """Of sequences whose last block is full or not; its "HND" is the layout of our pools."""
    import flashinfer

    counts = torch.tensor([-(-keys // BLOCK_SIZE) for _, keys in lengths])
    starts = torch.cat((torch.zeros(1), counts.cumsum(0))).int().to(q.device)
    used = [row[:n] for row, n in zip(batch.block_table, counts.tolist(), strict=True)]
    last = torch.tensor([(keys - 1) % BLOCK_SIZE + 1 for _, keys in lengths]).int().to(q.device)
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device=q.device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND")
    wrapper.plan(
        starts,
        torch.cat(used),
        last,
        HEADS,
        KV_HEADS,
        HEAD_DIM,
        BLOCK_SIZE,
        q_data_type=q.dtype,
        kv_data_type=pools[0].dtype,
    )
    return lambda: wrapper.run(q, (pools[0], pools[1]))


def _prefill(title: str, lengths: list[tuple[int, int]], device: torch.device) -> Case:
    def make() -> Made:
        batch, num_blocks = _batch(lengths, device)
        pools = _pools(num_blocks, torch.bfloat16, device)
        num_rows = sum(rows for rows, _ in lengths)
        q = torch.randn(num_rows, HEADS, HEAD_DIM, device=device).bfloat16()
        peers: dict[str, Run] = {}
        if len(lengths) == 1:
            shape = (1, KV_HEADS, num_rows, HEAD_DIM)
            k, v = (torch.randn(shape, device=device).bfloat16() for _ in "kv")
            by_head = q.transpose(0, 1)[None].contiguous()
            peers["torch sdpa, not paged"] = lambda: F.scaled_dot_product_attention(
                by_head, k, v, is_causal=True, enable_gqa=True
            )
            if importlib.util.find_spec("flash_attn"):
                from flash_attn import flash_attn_func

                rows = [tensor.transpose(1, 2).contiguous() for tensor in (k, v)]
                peers["flash-attn, not paged"] = lambda: flash_attn_func(
                    q[None], *rows, causal=True
                )
        moved = _kv_bytes(lengths, torch.bfloat16) + 2 * q.nbytes
        return Made(
            lambda: _attend(q, pools, batch),
            moved,
            _operations(lengths),
            "bf16",
            peers,
            PREFILL_AIM,
        )

    return Case("prefill attention", title, make)


def _rows(count: int, device: torch.device) -> Iterator[Case]:
    """What is done to each row of a step. Only many rows can be bound by memory."""
    aim = NORM_AIM if count >= 4096 else None

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device).bfloat16()

    def norm() -> Made:
        x, weight = some(count, HIDDEN), torch.ones(HIDDEN, device=device)
        half = weight.bfloat16()
        peer = {"torch rms_norm": lambda: F.rms_norm(x, (HIDDEN,), half, 1e-5)}
        return Made(lambda: ops.rms_norm(x, weight, 1e-5), 2 * x.nbytes, aim=aim, peers=peer)

    def added() -> Made:
        x, residual = some(count, HIDDEN), some(count, HIDDEN)
        weight = torch.ones(HIDDEN, device=device)
        half = weight.bfloat16()
        peer = {"torch add, rms_norm": lambda: F.rms_norm(residual.add_(x), (HIDDEN,), half, 1e-5)}
        return Made(
            lambda: ops.add_rms_norm(x, residual, weight, 1e-5), 4 * x.nbytes, aim=aim, peers=peer
        )

    def activation() -> Made:
        x = some(count, 2 * INTERMEDIATE)
        gate, up = x.chunk(2, 1)
        peer = {"torch silu, mul": lambda: F.silu(gate) * up}
        return Made(lambda: ops.act_and_mul(x, "silu"), 1.5 * x.nbytes, aim=aim, peers=peer)

    def rotary() -> Made:
        fused = some(count, HEADS + 2 * KV_HEADS, HEAD_DIM)
        q, k, v = fused.split((HEADS, KV_HEADS, KV_HEADS), 1)
        cos, sin = torch.rand(2, count, HEAD_DIM // 2, device=device)
        batch, num_blocks = _batch([(count, count)], device)
        pools = _pools(num_blocks, torch.bfloat16, device)

        def plain() -> None:
            reference.rotary_write_kv(q, k, v, cos, sin, *pools, batch.slots)

        moved = 2 * fused.nbytes + 2 * cos.nbytes
        return Made(
            lambda: ops.rotary_write_kv(q, k, v, cos, sin, *pools, batch.slots),
            moved,
            aim=aim,
            peers={"torch, several kernels": plain},
        )

    for name, make in (
        ("rms norm", norm),
        ("add, rms norm", added),
        ("silu and mul", activation),
        ("rotary, KV write", rotary),
    ):
        yield Case("rows", f"{name}, {count} rows", make)


def _copies(count: int, device: torch.device) -> Case:
    """Blocks within the pools of a model of 32 layers, as a fork needs them."""

    def make() -> Made:
        pools = [p for _ in range(32) for p in _pools(2 * count, torch.bfloat16, device)]
        pairs = [(i, count + i) for i in range(count)]
        sources, targets = (torch.tensor(ids, device=device) for ids in zip(*pairs, strict=True))

        def plain() -> None:
            for pool in pools:
                pool.index_copy_(0, targets, pool.index_select(0, sources))

        moved = 2 * sum(pool[:count].nbytes for pool in pools)
        return Made(lambda: ops.copy_blocks(pools, pairs), moved, peers={"torch, by layers": plain})

    return Case("blocks", f"copy {count} blocks of 32 layers", make)

"""Each operation against its specification in plain torch, interleaved in one run.

    python benchmarks/kernels.py --threads 2

Shapes are those of a decoder of 1.24 B parameters (16 layers, hidden 2048, 32 query heads over 8 KV
heads of 64, intermediate 8192). The roofline column is bytes moved (or operations done) per second
over what this machine reads from memory (or reaches in a large bfloat16 product) in the same run;
what fits the cache can exceed 100 %.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from quantd.kernels import ops, reference

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE = 16, 2048, 32, 8, 64, 8192
QKV = (HEADS + 2 * KV_HEADS) * HEAD_DIM


@dataclass(frozen=True)
class Row:
    name: str
    ours: Callable[[], object]
    plain: Callable[[], object]
    num_bytes: float
    """Bytes that must move."""
    flops: float = 0.0
    """Set where the operation is bound by arithmetic."""
    per_step: int = 0
    """Calls in a decode step, for the sum."""


def seconds(run: Callable[[], object], budget: float = 0.05) -> float:
    start = time.perf_counter()
    run()
    count = max(1, int(budget / max(time.perf_counter() - start, 1e-6)))
    start = time.perf_counter()
    for _ in range(count):
        run()
    return (time.perf_counter() - start) / count


def rooflines() -> tuple[float, float]:
    """Bytes per second read from memory, and bfloat16 operations per second."""
    data = torch.zeros(1 << 28)
    a, b = torch.randn(2048, 2048).bfloat16(), torch.randn(2048, 2048).bfloat16()
    read = min(seconds(data.sum) for _ in range(3))
    product = min(seconds(lambda: F.linear(a, b)) for _ in range(3))
    return data.nbytes / read, 2 * 2048**3 / product


def batch_of(lengths: list[tuple[int, int]]) -> tuple[ops.AttentionBatch, int]:
    """(rows, keys) of each sequence over shuffled blocks; and how many blocks the pool needs."""
    counts = [-(-kv // ops.BLOCK_SIZE) for _, kv in lengths]
    tables = torch.randperm(sum(counts)).int().split(counts)
    starts = torch.tensor([0, *(q for q, _ in lengths)]).cumsum(0).int()
    positions = torch.cat([torch.arange(kv - q, kv) for q, kv in lengths])
    slots = torch.cat(
        [
            tables[i][torch.arange(kv - q, kv) // 16].long() * 16 + torch.arange(kv - q, kv) % 16
            for i, (q, kv) in enumerate(lengths)
        ]
    )
    table = torch.nn.utils.rnn.pad_sequence(list(tables), batch_first=True)
    kv_len = torch.tensor([kv for _, kv in lengths]).int()
    return ops.AttentionBatch(starts, kv_len, table, slots, positions), sum(counts)


def attention_row(
    name: str, lengths: list[tuple[int, int]], dtype: torch.dtype, per_step: int = 0
) -> Row:
    batch, num_blocks = batch_of(lengths)
    k_pool, v_pool = torch.randn(2, num_blocks, KV_HEADS, ops.BLOCK_SIZE, HEAD_DIM).to(dtype)
    num_rows = sum(q for q, _ in lengths)
    q = torch.randn(num_rows, HEADS, HEAD_DIM).to(dtype)
    args = (q, k_pool, v_pool, batch, HEAD_DIM**-0.5, None, None, None)
    pairs = sum(q * (kv - (q - 1) / 2) for q, kv in lengths)
    num_bytes = sum(kv for _, kv in lengths) * 2 * KV_HEADS * HEAD_DIM * dtype.itemsize
    return Row(
        name,
        lambda: ops.paged_attention(*args),
        lambda: reference.paged_attention(*args),
        num_bytes + 2 * q.nbytes,
        4 * pairs * HEADS * HEAD_DIM if num_rows > 64 else 0.0,
        per_step,
    )


def row_operations(num_rows: int, dtype: torch.dtype, per_step: int = 0) -> list[Row]:
    x, residual = torch.randn(2, num_rows, HIDDEN).to(dtype)
    gate_up = torch.randn(num_rows, 2 * INTERMEDIATE).to(dtype)
    weight = torch.ones(HIDDEN)
    fused = torch.randn(num_rows, QKV).to(dtype).unflatten(1, (-1, HEAD_DIM))
    q, k, v = fused.split((HEADS, KV_HEADS, KV_HEADS), dim=1)
    cos, sin = torch.rand(2, num_rows, HEAD_DIM // 2)
    batch, num_blocks = batch_of([(num_rows, num_rows)])
    k_pool, v_pool = torch.zeros(2, num_blocks, KV_HEADS, ops.BLOCK_SIZE, HEAD_DIM, dtype=dtype)

    def plain_rotary() -> None:
        reference.rotary(q, k, cos, sin)
        reference.write_kv(k, v, k_pool, v_pool, batch.slots)

    return [
        Row(
            f"rms_norm {num_rows}",
            lambda: ops.rms_norm(x, weight, 1e-5),
            lambda: reference.rms_norm(x, weight, 1e-5),
            2 * x.nbytes,
            per_step=per_step and 1,
        ),
        Row(
            f"add_rms_norm {num_rows}",
            lambda: ops.add_rms_norm(x, residual, weight, 1e-5),
            lambda: reference.add_rms_norm(x, residual, weight, 1e-5),
            4 * x.nbytes,
            per_step=2 * per_step,
        ),
        Row(
            f"act_and_mul silu {num_rows}",
            lambda: ops.act_and_mul(gate_up, "silu"),
            lambda: reference.act_and_mul(gate_up, "silu"),
            1.5 * gate_up.nbytes,
            per_step=per_step,
        ),
        Row(
            f"rotary_write_kv {num_rows}",
            lambda: ops.rotary_write_kv(q, k, v, cos, sin, k_pool, v_pool, batch.slots),
            plain_rotary,
            2 * fused.nbytes,
            per_step=per_step,
        ),
    ]


def linear_row(num_rows: int, dtype: torch.dtype) -> Row:
    """Weights are taken in turn, so that each comes from memory and not from the cache."""
    weights = [torch.randn(INTERMEDIATE, HIDDEN).to(dtype) for _ in range(6)]
    packed = [ops.pack_linear(w) for w in weights]
    x = torch.randn(num_rows, HIDDEN).to(dtype)
    turn = iter(range(1 << 60))
    return Row(
        f"linear {str(dtype)[6:]} {num_rows} ({packed[0].route})",
        lambda: ops.linear(x, packed[next(turn) % 6], None),
        lambda: F.linear(x, weights[next(turn) % 6]),
        weights[0].nbytes,
        2 * num_rows * weights[0].numel() if num_rows > 32 else 0.0,
    )


def measure(row: Row, rounds: int, roof_bytes: float, roof_flops: float) -> float:
    ours, plain = [], []
    for _ in range(rounds):
        ours.append(seconds(row.ours))
        plain.append(seconds(row.plain))
    best, other = statistics.median(ours), statistics.median(plain)
    if row.flops:
        rate, roof = f"{row.flops / best / 1e9:7.1f} GF/s", row.flops / best / roof_flops
    else:
        rate, roof = f"{row.num_bytes / best / 1e9:7.1f} GB/s", row.num_bytes / best / roof_bytes
    print(
        f"{row.name:38} {best * 1e6:10.1f} {other * 1e6:10.1f} {other / best:7.1f}x {rate}"
        f" {roof:6.0%}",
        flush=True,
    )
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    options = parser.parse_args()
    ops.set_num_threads(options.threads)
    dtype: torch.dtype = getattr(torch, options.dtype)
    for note in ops.notes():
        print(f"note: {note}")
    roof_bytes, roof_flops = rooflines()
    print(
        f"{options.threads} threads, {options.dtype}, memory {roof_bytes / 1e9:.1f} GB/s,"
        f" bfloat16 product {roof_flops / 1e9:.0f} GFLOP/s"
    )
    print(
        f"{'operation, rows':38} {'ours us':>10} {'plain us':>10} {'gain':>8} {'rate':>12}   roof"
    )
    step = [*row_operations(1, dtype, LAYERS)]
    step.append(attention_row("attention 1 x 256 keys", [(1, 256)], dtype, LAYERS))
    total = sum(row.per_step * measure(row, options.rounds, roof_bytes, roof_flops) for row in step)
    print(f"{'all of these in one decode step':38} {total * 1e6:10.1f}")
    rows = [
        attention_row("attention 1 x 8192 keys", [(1, 8192)], dtype),
        attention_row("attention 16 x 1024 keys", [(1, 1024)] * 16, dtype),
        attention_row("attention prefill 1024", [(1024, 1024)], dtype),
        attention_row("attention chunk 256 after 4096", [(256, 4352)], dtype),
        *row_operations(512, dtype),
        *(linear_row(n, dtype) for n in (1, 8, 64, 512)),
    ]
    for row in rows:
        measure(row, options.rounds, roof_bytes, roof_flops)


if __name__ == "__main__":
    main()

"""Rotary and the write into the pools against the specification."""

import pytest
import torch

from quantd.kernels import reference
from quantd.kernels.batch import BLOCK_SIZE
from quantd.kernels.triton import rotary

E4M3 = torch.float8_e4m3fn


def _inputs(
    dtype: torch.dtype, rows: int, heads: tuple[int, int], dim: int, half: int
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
    """A fused buffer [rows, q | k | v | padding] and what goes with it."""
    q_heads, kv_heads = heads
    fused = torch.randn(rows, q_heads + 2 * kv_heads + 1, dim).to(dtype)
    angle = torch.rand(rows, half) * 6
    slots = torch.randperm(5 * BLOCK_SIZE)[:rows]
    return fused, (angle.cos(), angle.sin()), slots


def _split(fused: torch.Tensor, q_heads: int, kv_heads: int) -> tuple[torch.Tensor, ...]:
    return fused.split((q_heads, kv_heads, kv_heads, 1), dim=1)[:3]


def _pools(kv_heads: int, dim: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full((2, 5, kv_heads, BLOCK_SIZE, dim), 7.0).to(dtype)


def _bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.uint8) if x.dtype == E4M3 else x


SHAPES = [
    (1, (1, 1), 16, 8), (5, (4, 2), 16, 8), (3, (7, 1), 24, 6), (4, (3, 3), 80, 20),
    (2, (8, 1), 128, 64), (1, (2, 2), 256, 32),
]  # fmt: skip


@pytest.mark.parametrize(("rows", "heads", "dim", "half"), SHAPES)
def test_rotary(dtype: torch.dtype, rows: int, heads: tuple[int, int], dim: int, half: int) -> None:
    fused, tables, _ = _inputs(dtype, rows, heads, dim, half)
    wide = fused.double()
    q, k, _ = _split(fused, *heads)
    rotary.rotary(q, k, *tables)
    reference.rotary(*_split(wide, *heads)[:2], *(t.double() for t in tables))
    tolerance = {torch.float32: 1e-6, torch.float16: 1e-3}[dtype]
    torch.testing.assert_close(fused.double(), wide, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("pool_dtype", [None, E4M3], ids=str)
@pytest.mark.parametrize(("rows", "heads", "dim", "half"), SHAPES)
def test_rotary_and_the_write(
    dtype: torch.dtype,
    pool_dtype: torch.dtype | None,
    rows: int,
    heads: tuple[int, int],
    dim: int,
    half: int,
) -> None:
    """The pools hold what was stored in k and v, bit for bit, and nothing else has changed."""
    fused, tables, slots = _inputs(dtype, rows, heads, dim, half)
    got, want = (_pools(heads[1], dim, pool_dtype or dtype) for _ in range(2))
    scales = (0.3, 2.5) if pool_dtype else (1.0, 1.0)
    alone = fused.clone()
    rotary.rotary_write_kv(*_split(fused, *heads), *tables, got[0], got[1], slots, scales)
    rotary.rotary(*_split(alone, *heads)[:2], *tables)
    assert torch.equal(fused, alone)
    reference.write_kv(*_split(fused, *heads)[1:], want[0], want[1], slots, scales)
    assert torch.equal(_bits(got), _bits(want))


def test_write_kv(dtype: torch.dtype) -> None:
    fused, _, slots = _inputs(dtype, 6, (3, 2), 16, 8)
    before = fused.clone()
    got, want = _pools(2, 16, dtype), _pools(2, 16, dtype)
    _, k, v = _split(fused, 3, 2)
    rotary.write_kv(k, v, got[0], got[1], slots)
    reference.write_kv(k, v, want[0], want[1], slots)
    assert torch.equal(got, want) and torch.equal(fused, before)


def test_e4m3_rounds_as_torch_does() -> None:
    """Every value, every point halfway between two, what is near them and what is beyond."""
    codes = torch.arange(256, dtype=torch.uint8).view(E4M3).float()
    known = codes[codes.isfinite()].sort().values
    halves = (known[1:] + known[:-1]) / 2
    beside = torch.cat([halves.nextafter(torch.tensor(s)) for s in (-1e9, 1e9)])
    extremes = torch.tensor([448.0, 449, 464, 480, 1e30, float("inf"), 1e-30, 0.0])
    values = torch.cat((known, halves, beside, extremes, -extremes, torch.full((3,), float("nan"))))
    values = torch.cat((values, torch.randn(-values.numel() % 16)))
    k = values.view(-1, 1, 16)
    rows = len(k)
    got, want = (torch.zeros(2, -(-rows // 16), 1, 16, 16, dtype=E4M3) for _ in range(2))
    rotary.write_kv(k, k, got[0], got[1], torch.arange(rows))
    reference.write_kv(k, k, want[0], want[1], torch.arange(rows))
    assert torch.equal(_bits(got), _bits(want))


def test_a_slot_beyond_two_to_the_31_elements() -> None:
    far = (1 << 23) + 1
    pool = torch.empty(far + 1, 1, BLOCK_SIZE, 16, dtype=E4M3)
    k = torch.randn(1, 1, 16)
    rotary.write_kv(k, k, pool, pool, torch.tensor([far * BLOCK_SIZE + 5]))
    assert torch.equal(_bits(pool[far, 0, 5]), _bits(k[0, 0].to(E4M3)))


def test_no_rows(dtype: torch.dtype) -> None:
    fused, tables, slots = _inputs(dtype, 0, (2, 1), 16, 8)
    pools = _pools(1, 16, dtype)
    rotary.rotary_write_kv(*_split(fused, 2, 1), *tables, pools[0], pools[1], slots)
    rotary.rotary(*_split(fused, 2, 1)[:2], *tables)
    rotary.write_kv(*_split(fused, 2, 1)[1:], pools[0], pools[1], slots)
    assert (pools == 7).all()

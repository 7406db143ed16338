"""Paged attention: native against specification, and the promises about bits."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from quantd.kernels import reference
from quantd.kernels.batch import BLOCK_SIZE, AttentionBatch
from quantd.kernels.cpu.native import Native

Close = Callable[[torch.Tensor, torch.Tensor], None]


@dataclass
class Case:
    q: torch.Tensor
    k_pool: torch.Tensor
    v_pool: torch.Tensor
    batch: AttentionBatch
    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None

    def run(self, lib: Native) -> torch.Tensor:
        return lib.paged_attention(
            self.q,
            self.k_pool,
            self.v_pool,
            self.batch,
            self.scale,
            self.window,
            self.softcap,
            self.sinks,
        )

    def specification(self) -> torch.Tensor:
        return reference.paged_attention(
            self.q.double(),
            self.k_pool.double(),
            self.v_pool.double(),
            self.batch,
            self.scale,
            self.window,
            self.softcap,
            None if self.sinks is None else self.sinks.double(),
        )


def make_batch(lengths: list[tuple[int, int]], tables: list[torch.Tensor]) -> AttentionBatch:
    """lengths: (rows, keys) of each sequence; the slots and positions do not matter here."""
    starts = torch.tensor([0, *(q for q, _ in lengths)]).cumsum(0).int()
    table = torch.nn.utils.rnn.pad_sequence(tables, batch_first=True).int()
    rows = torch.zeros(int(starts[-1]), dtype=torch.int64)
    return AttentionBatch(starts, torch.tensor([kv for _, kv in lengths]).int(), table, rows, rows)


def make_case(
    lengths: list[tuple[int, int]],
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    window: int | None = None,
    softcap: float | None = None,
    with_sinks: bool = False,
) -> Case:
    """Sequences over shuffled blocks; what no row may read is NaN."""
    counts = [-(-kv // BLOCK_SIZE) for _, kv in lengths]
    order = torch.randperm(sum(counts) + 3) + 1
    tables = list(order[: sum(counts)].split(counts))
    pools = torch.full((2, len(order) + 1, kv_heads, BLOCK_SIZE, head_dim), float("nan"))
    for (_, kv), table in zip(lengths, tables, strict=True):
        content = torch.randn(2, len(table) * BLOCK_SIZE, kv_heads, head_dim)
        content[:, kv:] = float("nan")
        pools[:, table] = content.unflatten(1, (-1, BLOCK_SIZE)).transpose(2, 3)
    pools = pools.to(dtype)
    num_rows = sum(q for q, _ in lengths)
    fused = torch.randn(num_rows, (heads + 1) * head_dim).to(dtype)
    q = fused[:, : heads * head_dim].unflatten(1, (heads, head_dim))
    sinks = torch.randn(heads) if with_sinks else None
    batch = make_batch(lengths, tables)
    return Case(q, pools[0], pools[1], batch, head_dim**-0.5, window, softcap, sinks)


RAGGED = [(1, 1), (1, 40), (33, 33), (2, 300), (16, 270), (1, 513), (7, 7), (3, 17), (20, 531)]


@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128, 256])
def test_ragged_batch(lib: Native, dtype: torch.dtype, head_dim: int, assert_close: Close) -> None:
    case = make_case(RAGGED, 6, 2, head_dim, dtype)
    assert_close(case.run(lib), case.specification())


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 6, 7, 8])
def test_grouped_heads(lib: Native, dtype: torch.dtype, group: int, assert_close: Close) -> None:
    case = make_case([(1, 70), (40, 50), (8, 600)], 2 * group, 2, 32, dtype)
    assert_close(case.run(lib), case.specification())


def test_more_heads_per_kv_head_than_a_tile_has_rows(best: Native, assert_close: Close) -> None:
    case = make_case([(1, 300), (5, 20)], 71, 1, 64, torch.bfloat16)
    assert_close(case.run(best), case.specification())


@pytest.mark.parametrize("window", [1, 5, 16, 100, 257, 4096])
def test_sliding_window(lib: Native, dtype: torch.dtype, window: int, assert_close: Close) -> None:
    case = make_case(RAGGED, 4, 2, 64, dtype, window=window)
    assert_close(case.run(lib), case.specification())


def test_blocks_before_the_window_are_never_read(best: Native) -> None:
    case = make_case([(2, 600)], 2, 1, 32, torch.float32, window=20)
    want = case.run(best)
    case.batch.block_table[0, :36] = -7
    assert torch.equal(case.run(best), want)


def test_softcap_and_sinks(lib: Native, dtype: torch.dtype, assert_close: Close) -> None:
    for softcap, sinks in [(2.0, False), (None, True), (30.0, True)]:
        case = make_case(RAGGED, 6, 2, 64, dtype, softcap=softcap, with_sinks=sinks)
        case.scale = 1.0
        assert_close(case.run(lib), case.specification())


def test_scores_far_apart_do_not_overflow(lib: Native, assert_close: Close) -> None:
    case = make_case([(5, 700)], 2, 2, 32, torch.float32)
    case.scale = 300.0
    assert_close(case.run(lib), case.specification())


def _alone(case: Case, index: int, start: int, stop: int) -> Case:
    """Rows [start, stop) of one sequence of the batch, as a step of their own."""
    first = int(case.batch.query_start[index])
    length = int(case.batch.query_start[index + 1]) - first
    kv_len = int(case.batch.kv_len[index]) - (length - stop)
    batch = make_batch([(stop - start, kv_len)], [case.batch.block_table[index]])
    rows = case.q[first + start : first + stop]
    return Case(
        rows, case.k_pool, case.v_pool, batch, case.scale, case.window, case.softcap, case.sinks
    )


@pytest.mark.parametrize("window", [None, 70])
def test_batched_equals_alone_bit_for_bit(
    lib: Native, dtype: torch.dtype, window: int | None
) -> None:
    case = make_case(RAGGED, 6, 2, 64, dtype, window=window, softcap=5.0, with_sinks=True)
    together = case.run(lib).split([q for q, _ in RAGGED])
    for index, (length, _) in enumerate(RAGGED):
        assert torch.equal(_alone(case, index, 0, length).run(lib), together[index])


@pytest.mark.parametrize("window", [None, 70])
def test_chunked_equals_whole_bit_for_bit(
    lib: Native, dtype: torch.dtype, window: int | None
) -> None:
    case = make_case([(600, 600)], 3, 1, 32, dtype, window=window)
    whole = case.run(lib)
    for chunk in (1, 16, 17, 97, 512):
        for start in range(0, 600, chunk if chunk > 1 else 37):
            stop = min(start + chunk, 600)
            assert torch.equal(_alone(case, 0, start, stop).run(lib), whole[start:stop])


def test_threads_do_not_change_bits(best: Native, dtype: torch.dtype) -> None:
    case = make_case([*RAGGED, (1, 3000), (8, 2000)], 6, 2, 64, dtype)
    want = case.run(best)
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        for _ in range(3):
            assert torch.equal(case.run(best), want)


@pytest.mark.parametrize("breakage", ["block", "kv_len", "query_start", "table"])
def test_a_batch_that_points_outside_is_refused(best: Native, breakage: str) -> None:
    case = make_case([(2, 40), (1, 16)], 2, 1, 32, torch.float32)
    if breakage == "block":
        case.batch.block_table[0, 1] = case.k_pool.shape[0]
    elif breakage == "kv_len":
        case.batch.kv_len[1] = 0
    elif breakage == "query_start":
        case.batch.query_start[-1] = 4
    else:
        case.batch.kv_len[0] = 49
    with pytest.raises(ValueError, match="points outside"):
        case.run(best)

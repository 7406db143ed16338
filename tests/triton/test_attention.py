"""Paged attention against the specification in fp64, and what it promises of bits."""

from dataclasses import dataclass, replace

import pytest
import torch

from quantd.kernels import reference
from quantd.kernels.batch import BLOCK_SIZE, AttentionBatch
from quantd.kernels.triton import attention

MAX_NMSE = {torch.float32: 1e-12, torch.float16: 2.0**-22}
E4M3 = torch.float8_e4m3fn


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
    kv_scale: tuple[float, float] = (1.0, 1.0)

    def run(self) -> torch.Tensor:
        return attention.paged_attention(
            self.q,
            self.k_pool,
            self.v_pool,
            self.batch,
            self.scale,
            self.window,
            self.softcap,
            self.sinks,
            self.kv_scale,
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
            self.kv_scale,
        )

    def check(self) -> None:
        got, want = self.run(), self.specification()
        error = (got.double() - want).square().mean() / want.square().mean()
        assert error.item() <= MAX_NMSE[got.dtype]


def make_batch(lengths: list[tuple[int, int]], tables: list[torch.Tensor]) -> AttentionBatch:
    """lengths: (rows, keys) of each sequence. The table is padded with block 0, which is NaN."""
    starts = torch.tensor([0, *(q for q, _ in lengths)]).cumsum(0).int()
    table = torch.nn.utils.rnn.pad_sequence(tables, batch_first=True).int()
    rows = torch.zeros(int(starts[-1]), dtype=torch.int64)
    return AttentionBatch(starts, torch.tensor([kv for _, kv in lengths]).int(), table, rows, rows)


def make_case(
    lengths: list[tuple[int, int]],
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    dtype: torch.dtype = torch.float16,
    pool_dtype: torch.dtype | None = None,
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
    pools = pools.to(pool_dtype or dtype)
    num_rows = sum(q for q, _ in lengths)
    fused = torch.randn(num_rows, (heads + 1) * head_dim).to(dtype)
    q = fused[:, : heads * head_dim].unflatten(1, (heads, head_dim))
    return Case(q, pools[0], pools[1], make_batch(lengths, tables), head_dim**-0.5)


@pytest.fixture
def short_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several spans and tiles within tens of tokens."""
    monkeypatch.setattr(attention, "SPAN", 64)
    monkeypatch.setattr(
        attention, "_shape", lambda dim, *_: (max(16, 1 << (dim - 1).bit_length()), 32, 4)
    )


RAGGED = [(1, 1), (1, 40), (33, 33), (2, 150), (1, 16), (1, 129), (7, 7), (3, 17), (20, 90)]
"""Tiles of 32 tokens at two heads for each KV head; spans of 64 keys."""


def test_a_ragged_batch(dtype: torch.dtype, short_spans: None) -> None:
    make_case(RAGGED, dtype=dtype).check()


@pytest.mark.parametrize("lengths", [(1, 1), (1, 15), (1, 16), (1, 17), (16, 16), (5, 64), (2, 65)])
def test_one_sequence(dtype: torch.dtype, lengths: tuple[int, int], short_spans: None) -> None:
    make_case([lengths], dtype=dtype).check()


def test_the_spans_that_are_used(dtype: torch.dtype) -> None:
    make_case([(1, 1100), (3, 530), (40, 40)], heads=2, kv_heads=1, dtype=dtype).check()


@pytest.mark.parametrize(("window", "with_sinks"), [(None, False), (None, True), (1, True)])
def test_where_a_span_begins(window: int | None, with_sinks: bool) -> None:
    lengths = [(1, 511), (1, 512), (1, 513), (2, 513), (1, 1024), (2, 1025)]
    case = make_case(lengths, heads=2, kv_heads=1, dtype=torch.float32)
    replace(case, window=window, sinks=torch.randn(2) if with_sinks else None).check()


@pytest.mark.parametrize("head_dim", [16, 24, 64, 80, 96, 112, 128, 192, 256])
def test_head_dimensions(dtype: torch.dtype, head_dim: int) -> None:
    make_case([(1, 40), (5, 21)], 2, 1, head_dim, dtype).check()


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 6, 7, 8, 71])
def test_grouped_heads(group: int, short_spans: None) -> None:
    make_case([(1, 70), (3, 5), (9, 130)], group, 1).check()
    if group < 71:
        make_case([(1, 70), (3, 5)], 2 * group, 2).check()


@pytest.mark.parametrize("window", [1, 5, 16, 40, 65, 4096])
def test_a_sliding_window(window: int, short_spans: None) -> None:
    replace(make_case(RAGGED), window=window).check()


def test_blocks_before_the_window_are_never_read(short_spans: None) -> None:
    case = replace(make_case([(2, 170)]), window=20)
    want = case.run()
    case.batch.block_table[0, :9] = 0  # NaN; its tile of keys begins in block 8
    assert torch.equal(case.run(), want)


@pytest.mark.parametrize(("softcap", "with_sinks"), [(2.0, False), (None, True), (30.0, True)])
def test_softcap_and_sinks(
    dtype: torch.dtype, softcap: float | None, with_sinks: bool, short_spans: None
) -> None:
    sinks = torch.randn(4) if with_sinks else None
    replace(make_case(RAGGED, dtype=dtype), scale=1.0, softcap=softcap, sinks=sinks).check()


def test_scores_far_apart_do_not_overflow(short_spans: None) -> None:
    replace(make_case([(5, 200)], dtype=torch.float32), scale=300.0).check()


def test_keys_and_values_in_eight_bits(dtype: torch.dtype, short_spans: None) -> None:
    case = make_case(RAGGED, dtype=dtype, pool_dtype=E4M3)
    replace(case, kv_scale=(0.7, 3.0), sinks=torch.randn(4)).check()


def test_a_pool_of_more_than_two_to_the_31_elements() -> None:
    """Of memory that is never touched but for one block."""
    case = make_case([(2, 16)], 2, 1, 16, pool_dtype=E4M3)
    block, far = int(case.batch.block_table[0, 0]), (1 << 23) + 1
    pool = torch.empty(far + 1, 1, BLOCK_SIZE, 16, dtype=E4M3)
    assert pool.numel() > 1 << 31
    pool[far] = case.k_pool[block]
    case.v_pool = case.k_pool
    want = case.run()
    case.batch.block_table[0, 0] = far
    assert torch.equal(replace(case, k_pool=pool, v_pool=pool).run(), want)


def test_a_batch_without_rows() -> None:
    case = make_case([(1, 1)])
    empty = AttentionBatch(
        torch.zeros(1).int(), torch.zeros(0).int(), torch.zeros(0, 1).int(), case.batch.slots[:0],
        case.batch.slots[:0],
    )  # fmt: skip
    assert replace(case, q=case.q[:0], batch=empty).run().shape == (0, 4, 16)


def test_a_sequence_without_rows_is_left_out(short_spans: None) -> None:
    case = make_case([(1, 70), (0, 33), (2, 20)])
    case.check()


def _alone(case: Case, index: int, start: int, stop: int) -> Case:
    """Rows [start, stop) of one sequence of the batch, as a step of their own."""
    first = int(case.batch.query_start[index])
    length = int(case.batch.query_start[index + 1]) - first
    kv_len = int(case.batch.kv_len[index]) - (length - stop)
    batch = make_batch([(stop - start, kv_len)], [case.batch.block_table[index]])
    return replace(case, q=case.q[first + start : first + stop], batch=batch)


@pytest.mark.parametrize("window", [None, 50])
def test_batched_equals_alone_bit_for_bit(
    dtype: torch.dtype, window: int | None, short_spans: None
) -> None:
    case = replace(make_case(RAGGED, dtype=dtype), window=window, softcap=5.0, sinks=torch.randn(4))
    together = case.run().split([q for q, _ in RAGGED])
    for index, (length, _) in enumerate(RAGGED):
        assert torch.equal(_alone(case, index, 0, length).run(), together[index])


@pytest.mark.parametrize("window", [None, 50])
def test_chunked_equals_whole_bit_for_bit(
    dtype: torch.dtype, window: int | None, short_spans: None
) -> None:
    """A chunk of up to eight rows has its spans run side by side, the whole prompt does not."""
    case = replace(make_case([(150, 150)], dtype=dtype), window=window)
    whole = case.run()
    for start, stop in [(149, 150), (70, 71), (128, 135), (63, 65), (0, 150), (60, 130)]:
        assert torch.equal(_alone(case, 0, start, stop).run(), whole[start:stop])


def test_spans_side_by_side_or_not_give_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, short_spans: None
) -> None:
    case = replace(make_case(RAGGED[:6]), sinks=torch.randn(4))
    apart = case.run()
    monkeypatch.setattr(attention, "_ENOUGH_PROGRAMS", 1)
    assert torch.equal(case.run(), apart)
    monkeypatch.setattr(attention, "_ENOUGH_PROGRAMS", 512)
    monkeypatch.setattr(attention, "_PARTIAL_BYTES", 20000)
    assert torch.equal(case.run(), apart)


@pytest.mark.parametrize(
    ("rows", "sequences", "spans", "want"),
    [(1, 1, 1, 0), (1, 1, 2, 1), (4, 1, 2, 4), (99, 1, 2, 8), (9, 8, 2, 2), (64, 64, 9, 0)],
)
def test_when_spans_run_side_by_side(rows: int, sequences: int, spans: int, want: int) -> None:
    assert attention._split_tokens(rows, sequences, 16, 8, spans, 32, 128) == want


def test_partial_results_are_bounded() -> None:
    assert attention._split_tokens(50, 8, 16, 8, 256, 32, 128) == 7
    assert attention._split_tokens(50, 8, 16, 8, 1 << 14, 32, 128) == 0

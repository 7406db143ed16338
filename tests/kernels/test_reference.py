"""The specifications against independent formulations of the same operations."""

import pytest
import torch
import torch.nn.functional as F

from quantd.kernels import ops, reference
from quantd.kernels.batch import BLOCK_SIZE, AttentionBatch


def test_rms_norm_is_torch_s() -> None:
    x, weight = torch.randn(4, 9, 33), torch.randn(33)
    want = F.rms_norm(x, (33,), weight, 1e-3)
    torch.testing.assert_close(reference.rms_norm(x, weight, 1e-3), want)


def test_rms_norm_rounds_once() -> None:
    x, weight = torch.randn(4, 64).bfloat16(), torch.randn(64)
    want = F.rms_norm(x.float(), (64,), weight, 1e-3).bfloat16()
    assert torch.equal(reference.rms_norm(x, weight, 1e-3), want)


def test_an_unknown_activation_is_refused() -> None:
    with pytest.raises(ValueError, match="relu"):
        ops.act_and_mul(torch.randn(1, 4), "relu")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="relu"):
        reference.act_and_mul(torch.randn(1, 4), "relu")  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotary_is_a_complex_product(dtype: torch.dtype) -> None:
    q, k = torch.randn(5, 3, 20).to(dtype), torch.randn(5, 1, 20).to(dtype)
    angle = 7 * torch.rand(5, 6)
    want = []
    for x in (q.float(), k.float()):
        turned = torch.complex(x[..., :6], x[..., 6:12]) * torch.exp(1j * angle)[:, None]
        want.append(torch.cat((turned.real, turned.imag, x[..., 12:]), dim=-1).to(dtype))
    reference.rotary(q, k, angle.cos(), angle.sin())
    torch.testing.assert_close((q, k), tuple(want))


def test_kv_is_stored_where_the_slots_say_and_nowhere_else() -> None:
    k, v = torch.randn(2, 3, 2, 8)
    k_pool, v_pool = torch.zeros(2, 4, 2, BLOCK_SIZE, 8)
    slots = torch.tensor([0, 63, 17])
    reference.write_kv(k, v, k_pool, v_pool, slots)
    for row, (block, offset) in enumerate([(0, 0), (3, 15), (1, 1)]):
        assert torch.equal(k_pool[block, :, offset], k[row])
        assert torch.equal(v_pool[block, :, offset], v[row])
    assert torch.count_nonzero(k_pool) == k.numel()


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("max_scores", [1, 1 << 24])
def test_attention_is_torch_s(
    window: int | None, max_scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference.attention, "_MAX_SCORES", max_scores)
    lengths = [(5, 5), (3, 20), (1, 40)]
    k_pool, v_pool = torch.randn(2, 16, 2, BLOCK_SIZE, 32)
    table = torch.randperm(16)[:9].view(3, 3).int()
    starts = torch.tensor([0, 5, 8, 9]).int()
    none = torch.zeros(9, dtype=torch.int64)
    batch = AttentionBatch(starts, torch.tensor([5, 20, 40]).int(), table, none, none)
    q = torch.randn(9, 8, 32)
    got = reference.paged_attention(q, k_pool, v_pool, batch, 0.3, window, None, None)
    for s, (rows, kv) in enumerate(lengths):
        keys, values = (
            pool[table[s].long()].transpose(0, 1).flatten(1, 2)[:, :kv] for pool in (k_pool, v_pool)
        )
        mask = torch.ones(rows, kv, dtype=torch.bool).tril(kv - rows)
        if window is not None:
            mask &= mask.new_ones(rows, kv).triu(kv - rows - window + 1)
        own = slice(int(starts[s]), int(starts[s + 1]))
        want = F.scaled_dot_product_attention(
            q[own].transpose(0, 1)[None],
            keys[None],
            values[None],
            attn_mask=mask,
            scale=0.3,
            enable_gqa=True,
        )
        torch.testing.assert_close(got[own], want[0].transpose(0, 1))


def test_softcap_bounds_the_scores_and_a_sink_takes_its_share() -> None:
    k_pool, v_pool = torch.ones(2, 1, 1, BLOCK_SIZE, 16)
    none = torch.zeros(1, dtype=torch.int64)
    batch = AttentionBatch(
        torch.tensor([0, 1]).int(), torch.tensor([2]).int(), torch.zeros(1, 1).int(), none, none
    )
    q = torch.full((1, 1, 16), 1e4)
    # Two keys of score 3 (the cap) and a sink of logit 3: the values get two thirds.
    got = reference.paged_attention(q, k_pool, v_pool, batch, 1.0, None, 3.0, torch.tensor([3.0]))
    torch.testing.assert_close(got, torch.full((1, 1, 16), 2 / 3))


@pytest.mark.parametrize("renormalize", [False, True])
def test_experts_with_softmax_before(renormalize: bool) -> None:
    logits = torch.randn(6, 10)
    weights, ids = ops.route_experts(logits, 3, softmax_before=True, renormalize=renormalize)
    want, want_ids = logits.softmax(-1).topk(3)
    assert torch.equal(ids, want_ids) and weights.dtype == torch.float32
    torch.testing.assert_close(weights, want / want.sum(-1, keepdim=True) if renormalize else want)


def test_experts_with_softmax_after() -> None:
    logits = torch.randn(6, 10).bfloat16()
    weights, ids = ops.route_experts(logits, 4, softmax_before=False, renormalize=False)
    want = logits.float().gather(1, ids).softmax(-1)
    torch.testing.assert_close(weights, want)


def test_equal_experts_are_taken_in_order_of_their_ids() -> None:
    _, ids = ops.route_experts(torch.zeros(2, 50), 7, softmax_before=True, renormalize=True)
    assert ids.tolist() == [list(range(7))] * 2


@pytest.mark.parametrize("top_k", [0, 5])
def test_top_k_out_of_range_is_refused(top_k: int) -> None:
    with pytest.raises(ValueError, match=rf"top_k is {top_k}, must be in \[1, 4\]"):
        ops.route_experts(torch.zeros(1, 4), top_k, softmax_before=True, renormalize=True)


def test_pools_in_eight_bits_hold_the_value_divided_by_the_scale() -> None:
    pools = torch.zeros(2, 2, 1, 16, 4, dtype=torch.float8_e4m3fn)
    k = torch.tensor([[[1.0, -3.0, 1000.0, 0.001]]])
    reference.write_kv(k, -k, pools[0], pools[1], torch.tensor([18]), (2.0, 0.5))
    assert pools[0, 1, 0, 2].float().tolist() == [0.5, -1.5, 448.0, 0.0]
    assert pools[1, 1, 0, 2].float().tolist() == [-2.0, 6.0, -448.0, -(2.0**-9)]


def test_attention_multiplies_what_the_pools_hold_by_their_scale() -> None:
    q, pools = torch.randn(2, 2, 8), torch.randn(2, 2, 1, 16, 8)
    batch = AttentionBatch(
        torch.tensor([0, 2]).int(),
        torch.tensor([20]).int(),
        torch.tensor([[1, 0]]).int(),
        torch.arange(2),
        torch.arange(2),
    )
    narrow = pools.to(torch.float8_e4m3fn)
    got = reference.paged_attention(
        q, narrow[0], narrow[1], batch, 0.3, None, None, None, (2.0, 0.5)
    )
    k, v = narrow.float() * torch.tensor([2.0, 0.5])[:, None, None, None, None]
    want = reference.paged_attention(q, k, v, batch, 0.3, None, None, None)
    torch.testing.assert_close(got, want)


def test_copies_of_blocks_follow_one_another() -> None:
    pools = [torch.arange(4.0).view(4, 1, 1, 1).expand(4, 1, 16, 2).clone() for _ in range(2)]
    reference.copy_blocks(pools, [(3, 1), (1, 0), (2, 3)])
    for pool in pools:
        assert pool[:, 0, 0, 0].tolist() == [3, 3, 2, 2]


def test_blocks_of_all_pools_in_rows_and_back() -> None:
    pools = [torch.arange(4.0).view(4, 1, 1, 1).expand(4, 1, 16, 2) + 10 * i for i in range(3)]
    rows = torch.full((3, 3 * 32), -1.0)
    reference.gather_blocks(pools, [3, 1], rows)
    want = torch.tensor([[3.0, 13, 23], [1, 11, 21], [-1, -1, -1]])
    assert torch.equal(rows, want.repeat_interleave(32, 1))
    reference.scatter_blocks(rows, pools, [0, 0])
    for i, pool in enumerate(pools):
        assert pool[:, 0, 15, 1].tolist() == [1 + 10 * i, 1 + 10 * i, 2 + 10 * i, 3 + 10 * i]

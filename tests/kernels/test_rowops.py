"""Norms, gated activations, rotary embedding and the KV write: native against specification."""

from collections.abc import Callable

import pytest
import torch

from quantd.kernels import reference
from quantd.kernels.cpu.native import Native
from quantd.kernels.reference import Activation

Close = Callable[[torch.Tensor, torch.Tensor], None]
ROWS = [1, 2, 3, 7, 8, 16, 33]
WIDTHS = [1, 15, 16, 17, 63, 64, 80, 960, 2048]


@pytest.mark.parametrize("width", WIDTHS)
def test_rms_norm(lib: Native, dtype: torch.dtype, width: int, assert_close: Close) -> None:
    weight = torch.randn(width)
    for rows in ROWS:
        x = torch.randn(rows, width).to(dtype)
        want = reference.rms_norm(x.double(), weight.double(), 1e-5)
        assert_close(lib.rms_norm(x, weight, 1e-5), want)


def test_rms_norm_reads_a_view_of_a_fused_buffer(lib: Native, dtype: torch.dtype) -> None:
    fused, weight = torch.randn(5, 12 * 64).to(dtype), torch.randn(64)
    keys = fused[:, 8 * 64 : 10 * 64].view(5, 2, 64)
    got = lib.rms_norm(keys, weight, 1e-6)
    assert got.is_contiguous()
    assert torch.equal(got, lib.rms_norm(keys.contiguous(), weight, 1e-6))


@pytest.mark.parametrize("width", [17, 64, 960])
def test_add_rms_norm(lib: Native, dtype: torch.dtype, width: int, assert_close: Close) -> None:
    weight = torch.randn(width)
    for rows in ROWS:
        x, residual = torch.randn(rows, width).to(dtype), torch.randn(rows, width).to(dtype)
        total = residual + x
        got = lib.add_rms_norm(x, residual, weight, 1e-5)
        assert torch.equal(residual, total)
        assert_close(got, reference.rms_norm(total.double(), weight.double(), 1e-5))


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gelu"])
def test_act_and_mul(
    lib: Native, dtype: torch.dtype, activation: Activation, assert_close: Close
) -> None:
    for rows, width in [(1, 8192), (1, 5), (2, 17), (3, 4100), (7, 64), (33, 100)]:
        gate_up = (4 * torch.randn(rows, 2 * width)).to(dtype)
        want = reference.act_and_mul(gate_up.double(), activation)
        assert_close(lib.act_and_mul(gate_up, activation), want)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gelu"])
def test_activation_at_the_ends_of_the_range(lib: Native, activation: Activation) -> None:
    gate = torch.tensor([[-3e38, -200.0, -100.0, -0.0, 0.0, 100.0, 200.0, float("nan")]])
    got = lib.act_and_mul(torch.cat((gate, torch.ones_like(gate)), dim=1), activation)
    assert got[0, :7].tolist() == [0, 0, 0, 0, 0, 100, 200]
    assert got[0, 7].isnan()


def _rotary_inputs(
    rows: int, heads: int, kv_heads: int, head_dim: int, half: int, dtype: torch.dtype
) -> tuple[torch.Tensor, ...]:
    fused = torch.randn(rows, (heads + 2 * kv_heads) * head_dim).to(dtype)
    q, k, v = fused.split((heads * head_dim, kv_heads * head_dim, kv_heads * head_dim), dim=1)
    angles = 1000 * torch.rand(rows, half)
    views = (part.unflatten(1, (-1, head_dim)) for part in (q, k, v))
    return (*views, angles.cos(), angles.sin())


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "half"),
    [(4, 4, 32, 16), (8, 2, 64, 32), (3, 1, 80, 40), (6, 2, 96, 20), (2, 1, 128, 5), (5, 1, 20, 3)],
)
def test_rotary_write_kv(
    lib: Native,
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    head_dim: int,
    half: int,
    assert_close: Close,
) -> None:
    for rows in (1, 3, 16, 33):
        q, k, v, cos, sin = _rotary_inputs(rows, heads, kv_heads, head_dim, half, dtype)
        want_q, want_k = q.double(), k.double()
        reference.rotary(want_q, want_k, cos.double(), sin.double())
        pools = torch.zeros(2, 7, kv_heads, 16, head_dim, dtype=dtype)
        want_pools = pools.clone()
        slots = torch.randperm(7 * 16)[:rows]
        lib.rotary_write_kv(q, k, v, cos, sin, pools[0], pools[1], slots)
        assert_close(q, want_q)
        assert_close(k, want_k)
        reference.write_kv(k, v, want_pools[0], want_pools[1], slots)
        assert torch.equal(pools, want_pools)


def test_rotary_and_write_apart_give_the_same(best: Native, dtype: torch.dtype) -> None:
    q, k, v, cos, sin = _rotary_inputs(5, 4, 2, 64, 32, dtype)
    q2, k2 = q.clone(), k.clone()
    pools, pools2 = torch.zeros(2, 2, 3, 2, 16, 64, dtype=dtype)
    slots = torch.tensor([40, 3, 4, 5, 17])
    best.rotary_write_kv(q, k, v, cos, sin, pools[0], pools[1], slots)
    best.rotary_write_kv(q2, k2, k2, cos, sin, None, None, None)
    best.rotary_write_kv(k2, k2, v, None, None, pools2[0], pools2[1], slots)
    assert torch.equal(q, q2) and torch.equal(k, k2) and torch.equal(pools, pools2)


@pytest.mark.parametrize("slot", [-1, 48])
def test_a_slot_outside_the_pool_is_refused_before_anything_changes(
    best: Native, slot: int
) -> None:
    q, k, v, cos, sin = _rotary_inputs(2, 2, 1, 32, 16, torch.float32)
    before, pools = q.clone(), torch.zeros(2, 3, 1, 16, 32)
    with pytest.raises(ValueError, match="outside the pool of 3 blocks"):
        best.rotary_write_kv(q, k, v, cos, sin, pools[0], pools[1], torch.tensor([0, slot]))
    assert torch.equal(q, before) and not pools.any()


def test_rows_do_not_depend_on_their_company(lib: Native, dtype: torch.dtype) -> None:
    weight = torch.randn(960)
    x = torch.randn(64, 960).to(dtype)
    normed, gated = lib.rms_norm(x, weight, 1e-5), lib.act_and_mul(x, "silu")
    for start, stop in [(0, 1), (5, 7), (17, 50)]:
        assert torch.equal(lib.rms_norm(x[start:stop], weight, 1e-5), normed[start:stop])
        assert torch.equal(lib.act_and_mul(x[start:stop], "silu"), gated[start:stop])


@pytest.mark.parametrize("value", [1e-40, -1e-45, 65520.0, float("inf"), float("nan")])
def test_rounding_to_16_bits_is_torch_s(lib: Native, value: float) -> None:
    """Through the activation at a gate where it is the identity; 17 columns: vectors and tail."""
    for dtype in (torch.bfloat16, torch.float16):
        up = torch.linspace(0.5, 2, 17).mul(value).to(dtype)
        up = torch.cat((up, torch.rand(1000).mul(1e-4).to(dtype)))
        gate = torch.full_like(up, 64.0)
        got = lib.act_and_mul(torch.cat((gate, up))[None], "silu")[0]
        assert torch.allclose(got, (64 * up.float()).to(dtype), rtol=0, atol=0, equal_nan=True)

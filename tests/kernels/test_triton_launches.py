"""What Triton is asked to compile and to launch while a model serves: nothing new for another
number of rows, once each power of two has come (`daemon/worker/gpu/budget.py` computes these while
a model loads), and no grid that is too large."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from gpu_launches import launches  # noqa: E402

from quantd.kernels.batch import AttentionBatch  # noqa: E402
from quantd.kernels.cpu.linear import LinearWeight  # noqa: E402
from quantd.kernels.experts import ExpertStack  # noqa: E402
from quantd.kernels.grouped import GroupedCodes  # noqa: E402
from quantd.kernels.grouped_linear import gpu_weight  # noqa: E402
from quantd.kernels.sampling import SamplingRows  # noqa: E402
from quantd.kernels.triton import (  # noqa: E402
    activation,
    attention,
    copies,
    experts,
    linear,
    norms,
    rotary,
    routing,
    sampling,
)

Run = Callable[[int], object]
"""A launch for so many rows."""

HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 256, 8, 2, 64
MOST = 2048


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


def batch_of(rows: int, width: int = 80) -> AttentionBatch:
    """A sequence for each row, or for eight, of some."""
    sequences = rows if rows < 100 else rows // 8
    int32, int64 = torch.int32, torch.int64
    return AttentionBatch(
        empty(sequences + 1, dtype=int32),
        empty(sequences, dtype=int32),
        empty(sequences, width, dtype=int32),
        empty(rows, dtype=int64),
        empty(rows, dtype=int64),
    )


def packed(rows: int, columns: int, bits: int, group: int, per_row: bool = False) -> Any:
    codes = torch.zeros(rows, columns, dtype=torch.uint8)
    scale = torch.ones(rows, -(-columns // group))
    chunk = GroupedCodes(codes, bits, group, scale, None, 1 << (bits - 1))
    cpu = torch.device("cpu")
    return linear.pack([chunk], rows, columns, order=None, per_row=per_row, device=cpu)


def products() -> Iterator[tuple[str, Run]]:
    weights = {
        "4 bits": packed(28672, 128, 4, 128),
        "4 bits, narrow": packed(1024, 4096, 4, 32),
        "6 bits, odd": packed(200, 1500, 6, 16),
        "w8a8": packed(512, 512, 8, 512, True),
        "8 bits": packed(512, 2048, 8, 128, True),
    }
    for name, part in weights.items():
        x = empty(MOST, part.columns)
        yield name, lambda rows, x=x, part=part: linear.multiply(x[:rows], [part], None)  # type: ignore[misc]


def mixtures() -> Iterator[tuple[str, Run]]:
    x, weights = empty(MOST, HIDDEN), empty(MOST, 2, dtype=torch.float32)
    ids = torch.arange(2 * MOST).remainder(8).view(MOST, 2)
    for name, bits in (("plain", 0), ("4 bits", 4)):
        stacks = []
        for shape in ((2 * 64, HIDDEN), (HIDDEN, 64)):
            stack = ExpertStack(8)
            for i in range(8):
                if bits:
                    part = packed(*shape, bits, 32)
                    stack.put(i, gpu_weight((part,), shape, False, False))
                else:
                    plain = empty(*shape)
                    weight = LinearWeight(plain, shape, plain.dtype, "torch", plain.nbytes)
                    stack.put(i, weight)
            stacks.append(stack.together())
        gate_up, down = stacks
        assert gate_up is not None and down is not None

        def run(rows: int, gate_up: Any = gate_up, down: Any = down) -> object:
            return experts.feed_forward(
                x[:rows],
                weights[:rows],
                ids[:rows],
                gate_up,
                down,
                lambda y: activation.act_and_mul(y, "silu"),
            )

        yield f"experts, {name}", run
    logits = empty(MOST, 8)
    route = routing.route_experts
    yield (
        "routing",
        lambda rows: route(logits[:rows], 2, softmax_before=True, renormalize=True),
    )


def rows_of_a_layer() -> Iterator[tuple[str, Run]]:
    x, residual, weight = empty(MOST, HIDDEN), empty(MOST, HIDDEN), torch.ones(HIDDEN)
    fused = empty(MOST, HEADS + 2 * KV_HEADS, HEAD_DIM)
    q, k, v = fused.split((HEADS, KV_HEADS, KV_HEADS), 1)
    cos = sin = empty(MOST, HEAD_DIM // 2, dtype=torch.float32)
    pools = [empty(40, KV_HEADS, 16, HEAD_DIM) for _ in range(2)]
    slots = empty(MOST, dtype=torch.int64)

    def write(n: int) -> object:
        return rotary.rotary_write_kv(q[:n], k[:n], v[:n], cos[:n], sin[:n], *pools, slots[:n])

    def attend(n: int) -> object:
        batch = batch_of(n)
        return attention.paged_attention(q[:n], *pools, batch, 0.1, None, None, None)

    yield "norm", lambda n: norms.rms_norm(x[:n], weight, 1e-5)
    yield "added norm", lambda n: norms.add_rms_norm(x[:n], residual[:n], weight, 1e-5)
    yield "norm of heads", lambda n: norms.rms_norm(q[:n], torch.ones(HEAD_DIM), 1e-5)
    yield "activation", lambda n: activation.act_and_mul(x[:n], "silu")
    yield "rotary", write
    yield "attention", attend


def sampled() -> Iterator[tuple[str, Run]]:
    logits = empty(MOST, 1024)

    def run(n: int) -> object:
        return sampling.sample_rows(logits[:n, :1000], rows_of(n, 1000))

    yield "sampling", run


def rows_of(n: int, vocabulary: int) -> SamplingRows:
    """Every third has a mask, every other one edits."""
    masks, edits = n // 3, 5 * (n // 2)
    kinds: dict[str, Any] = dict.fromkeys(
        ("temperature", "repetition", "frequency", "presence"), torch.float32
    )
    kinds |= {"seed": torch.int64, "position": torch.int64, "top_k": torch.int32}
    kinds |= {"top_p": torch.float64, "min_p": torch.float64, "mask_row": torch.int32}
    return SamplingRows(
        **{name: torch.ones(n, dtype=dtype) for name, dtype in kinds.items()},
        mask=empty(masks, -(-vocabulary // 32), dtype=torch.int32),
        edit_start=empty(n + 1, dtype=torch.int32),
        edit_token=empty(edits, dtype=torch.int32),
        edit_bias=empty(edits, dtype=torch.float32),
        edit_count=empty(edits, dtype=torch.float32),
        edit_flags=empty(edits, dtype=torch.int32),
        seen=empty(n - 1, -(-vocabulary // 32), dtype=torch.int32),
        seen_row=empty(n, dtype=torch.int32),
        seen_new=empty(n, dtype=torch.int32),
        seen_start=empty(n + 1, dtype=torch.int32),
        seen_token=empty(3 * (n // 2), dtype=torch.int32),
    )


RUNS = dict([*products(), *mixtures(), *rows_of_a_layer(), *sampled()])


@pytest.mark.parametrize("name", RUNS)
def test_nothing_is_compiled_for_another_number_of_rows(name: str) -> None:
    run = RUNS[name]
    with launches() as found:
        for power in range(MOST.bit_length()):
            run(1 << power)
        compiled = list(found.compiled)
        for rows in (*range(1, 140), 200, 255, 257, 500, 512, 1000, 1025, 1536, 2040):
            run(rows)
        assert found.compiled == compiled, "in the middle of serving"
        assert len(compiled) == len(set(compiled)) and found.launched


@pytest.mark.parametrize(
    ("name", "most"), [("4 bits", 3), ("4 bits, narrow", 5), ("6 bits, odd", 5), ("w8a8", 4)]
)
def test_few_variants_of_a_weight_are_compiled(name: str, most: int) -> None:
    """By tile, and by who adds the spans up."""
    with launches() as found:
        for rows in range(1, 300):
            RUNS[name](rows)
    assert len(found.compiled) <= most


def test_copies_are_compiled_once() -> None:
    pools = [empty(64, KV_HEADS, 16, HEAD_DIM) for _ in range(4)]
    rows = empty(16, 4 * KV_HEADS * 16 * HEAD_DIM)
    with launches() as found:
        for count in (1, 2, 3, 15, 16):
            blocks = list(range(count))
            copies.copy_blocks(pools, [(block, 63 - block) for block in blocks])
            copies.gather_blocks(pools, blocks, rows)
            copies.scatter_blocks(rows, pools, blocks)
    assert found.count("copy_kernel") == 1 and found.count("rows_kernel") == 2


def test_a_long_context_is_no_other_kernel() -> None:
    """Tables of blocks are as wide as the longest sequence of a step, graphs round that up."""
    pools = [empty(4, KV_HEADS, 16, HEAD_DIM) for _ in range(2)]

    def attend(rows: int, width: int) -> None:
        q = empty(rows, HEADS, HEAD_DIM)
        batch = batch_of(rows, width)
        attention.paged_attention(q, *pools, batch, 0.1, None, None, None)

    with launches() as found:
        attend(1, 8192)
        for width in (1, 2, 8, 16, 31, 32, 33, 64, 100, 4096, 8192):
            for rows in (1, 2, 7, 16, 64):
                attend(rows, width)
    assert found.count("attention_kernel") == 1 and found.count("merge_kernel") == 1


def test_grids_of_many_rows() -> None:
    """131,072: the longest context as one step."""
    most = 1 << 17
    with launches() as found:
        norms.rms_norm(empty(most, 16), torch.ones(16), 1e-5)
        activation.act_and_mul(empty(most, 32), "silu")
        for bits, group in ((4, 32), (8, 64)):
            linear.multiply(empty(most, 64), [packed(16, 64, bits, group, bits == 8)], None)
        linear.multiply(empty(most, 64, dtype=torch.float32), [packed(16, 64, 4, 32)], None)
        routing.route_experts(empty(most, 4), 2, softmax_before=True, renormalize=True)
        RUNS["experts, plain"](MOST)
    assert len(found.names()) >= 6


def test_the_grid_is_looked_at() -> None:
    """That the tests above can fail."""
    with launches() as found, pytest.raises(AssertionError, match="a grid of"):
        activation.activation_kernel[(1, 65536)](
            empty(1, 16), empty(1, 16), 16, KIND=0, GATED=False, COLUMNS=16
        )
    assert found.launched == []
    with launches() as found:
        for rows in (1, 2, 16):
            norms.rms_norm_kernel[(1,)](
                empty(1, 16), None, torch.ones(16), empty(1, 16), rows, 0, 1, 16, 1e-5,
                WIDTH=16, HAS_RESIDUAL=False,
            )  # fmt: skip
    assert found.count("rms_norm_kernel") == 3, "1, no multiple of 16, and one"

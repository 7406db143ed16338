"""All experts of a layer at once on a GPU, against each of them by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu_experts import Layer
from gpu_harness import DEVICE, MARKS, ON_CPU, assert_close, randn, sized

from quantd.kernels import ops
from quantd.kernels.grouped import GroupedCodes

pytestmark = MARKS

MIXTURES = sized(
    {"mixtral": (8, 2, 4096, 3584), "qwen3": (128, 8, 2048, 768)}, {"tiny": (8, 2, 64, 32)}
)
KINDS: dict[str, Any] = {
    "plain": None,
    "4 bits, offsets": (4, 32, True),
    "4 bits": (4, 32, False),
    "6 bits": (6, 16, False),
}
ROWS = sized((1, 3, 64, 700), (1, 3, 20))


def weight(
    rows: int, columns: int, kind: Any, dtype: torch.dtype
) -> tuple[ops.Weight, torch.Tensor]:
    """As it is multiplied, and in fp64."""
    if kind is None:
        plain = (randn(rows, columns) * 0.05).to(dtype)
        return ops.pack_linear(plain), plain.double()
    bits, group, has_offset = kind
    codes = torch.randint(0, 1 << bits, (rows, columns), dtype=torch.uint8, device=DEVICE)
    scale = (torch.rand(rows, columns // group, device=DEVICE) + 0.5).half().float() / (9 << bits)
    offset = -scale * (1 << (bits - 1)) if has_offset else None
    g = GroupedCodes(codes, bits, group, scale, offset, 0 if has_offset else 1 << (bits - 1))
    packed = ops.pack_grouped([g], (rows, columns), device=DEVICE)
    return packed, ops.dequantize_grouped(g).double()


class Mixture:
    def __init__(self, name: str, kind: str, dtype: torch.dtype) -> None:
        self.count, self.top_k, self.hidden, self.inner = MIXTURES[name]
        pairs = [
            (
                weight(2 * self.inner, self.hidden, KINDS[kind], dtype),
                weight(self.hidden, self.inner, KINDS[kind], dtype),
            )
            for _ in range(self.count)
        ]
        gate_up, down = [pair[0][0] for pair in pairs], [pair[1][0] for pair in pairs]
        self.layer = Layer(gate_up, down, self.top_k, DEVICE)
        self._wide = [(pair[0][1], pair[1][1]) for pair in pairs]

    def specification(self, x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """fp64, of the experts that are chosen."""
        weights, ids = ops.route_experts(logits, self.top_k, softmax_before=True, renormalize=True)
        out = torch.zeros(len(x), self.hidden, dtype=torch.float64, device=DEVICE)
        for expert, (gate_up, down) in enumerate(self._wide):
            rows, places = (ids == expert).nonzero(as_tuple=True)
            gate, up = (x[rows].double() @ gate_up.T).chunk(2, 1)
            part = (torch.nn.functional.silu(gate) * up) @ down.T
            out.index_add_(0, rows, part * weights[rows, places].double()[:, None])
        return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MIXTURES)
def test_at_once_is_one_by_one(name: str, kind: str, dtype: torch.dtype) -> None:
    mixture = Mixture(name, kind, dtype)
    if not ON_CPU:
        assert mixture.layer._stacked is not None, "the experts are not stacked"
    x = randn(max(ROWS), mixture.hidden, dtype=dtype)
    logits = randn(max(ROWS), mixture.count, dtype=dtype)
    # A CPU rounds activations to eight bits on its way to grouped weights.
    more = 4000.0 if ON_CPU else 8.0
    whole = mixture.layer.at_once(x, logits)
    assert_close(whole, mixture.specification(x, logits), more)
    for rows in ROWS:
        got = mixture.layer.at_once(x[:rows], logits[:rows])
        assert torch.equal(got, whole[:rows]), f"{rows} rows are not as among {len(x)}"


def test_all_rows_to_one_expert_and_none_to_the_others(dtype: torch.dtype) -> None:
    name = next(iter(MIXTURES))
    mixture = Mixture(name, "4 bits", dtype)
    x = randn(ROWS[-1], mixture.hidden, dtype=dtype)
    logits = torch.full((len(x), mixture.count), -9.0, device=DEVICE).to(dtype)
    logits[:, 1], logits[:, 3] = 9, 5
    got = mixture.layer.at_once(x, logits)
    assert_close(got, mixture.specification(x, logits), 4000.0 if ON_CPU else 8.0)


def test_no_rows(dtype: torch.dtype) -> None:
    mixture = Mixture(next(iter(MIXTURES)), "plain", dtype)
    none = randn(0, mixture.hidden, dtype=dtype)
    assert mixture.layer.at_once(none, randn(0, mixture.count, dtype=dtype)).shape == none.shape

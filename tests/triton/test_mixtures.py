"""The worker's mixture of experts with all of them at once, beside one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from numerics.tiny import Driver, Family, make_model, prompt_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from quantd.daemon.worker.models.moe import Experts, FeedForward
from quantd.daemon.worker.stacked import StackedLinear
from quantd.kernels import grouped_linear, ops, reference
from quantd.kernels.grouped import GroupedCodes
from quantd.kernels.triton import activation, experts, linear, routing

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
CPU = torch.device("cpu")
MAX_NMSE = {torch.float32: 1e-11, torch.float16: 2.0**-17}
NUM_EXPERTS, HIDDEN, INNER = 5, 72, 40

Form = tuple[int, int, str]
FORMS: dict[str, Form | None] = {
    "dense": None,
    "2 bits": (2, 16, "center"),
    "3 bits, offsets": (3, 32, "offset"),
    "4 bits, a table": (4, 32, "table"),
    "4 bits, eight bits of activations": (4, 32, "per_row"),
    "5 bits": (5, 16, "center"),
    "6 bits": (6, 48, "offset"),
    "8 bits": (8, 80, "center"),
    "4 bits, act-order": (4, 16, "order"),
    "W8A8": (8, 1 << 10, "per_row"),
}


@pytest.fixture(autouse=True)
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Grouped weights are packed for one, and operations are Triton's."""
    monkeypatch.setattr(grouped_linear, "_gpu", lambda device: linear)
    monkeypatch.setattr(ops, "act_and_mul", activation.act_and_mul)
    monkeypatch.setattr(ops, "route_experts", routing.route_experts)


def weight(form: Form | None, rows: int, columns: int, dtype: torch.dtype) -> ops.Weight:
    if form is None:
        plain = (torch.randn(rows, columns) / columns**0.5).to(dtype)
        return ops.LinearWeight(plain, (rows, columns), dtype, "torch", plain.nbytes)
    bits, group, kind = form
    groups = -(-columns // group)
    codes = torch.randint(0, 1 << bits, (rows, columns), dtype=torch.uint8)
    # Some scales are no fp16, so that some experts have others than their neighbours.
    scale = (torch.rand(rows, groups) + 0.5) / (1 << bits) / columns**0.5 * 2
    scale = scale.half().float() if torch.rand(()) < 0.5 else scale
    offset = -scale * (1 << (bits - 1)) if kind == "offset" else None
    table = torch.randint(-100, 100, (1 << bits,), generator=torch.Generator().manual_seed(3))
    g = GroupedCodes(
        codes,
        bits,
        group,
        scale / 8 if kind == "table" else scale,
        offset,
        1 << (bits - 1) if kind not in ("offset", "table") else 0,
        table.to(torch.int8) if kind == "table" else None,
    )
    order = torch.randperm(columns) if kind == "order" else None
    if order is not None:
        order[7] = -1
    per_row = kind == "per_row"
    return ops.pack_grouped([g], (rows, columns), order=order, per_row=per_row, device=CPU)


def mixture(
    form: Form | None, dtype: torch.dtype, top_k: int, router: Tensor
) -> tuple[Experts, Experts]:
    """All at once, and one after the other, over the same weights."""
    stacks = [ops.ExpertStack(NUM_EXPERTS) for _ in range(2)]
    for stack, shape in zip(stacks, ((2 * INNER, HIDDEN), (HIDDEN, INNER)), strict=True):
        for i in range(NUM_EXPERTS):
            stack.put(i, weight(form, *shape, dtype))
    each = [
        FeedForward(StackedLinear(stacks[0], i), StackedLinear(stacks[1], i), "silu")
        for i in range(NUM_EXPERTS)
    ]
    stacked = ops.stacked_experts(*stacks, "silu")
    assert stacked is not None
    first, second = (Experts(Router(router), each, top_k, True, both) for both in (stacked, None))
    return first, second


class Router:
    """Logits as they are wished for, whatever x is."""

    nbytes = 0

    def __init__(self, logits: Tensor) -> None:
        self._logits = logits

    def __call__(self, x: Tensor) -> Tensor:
        return self._logits[: len(x)]

    def dequantize(self) -> Tensor:
        raise NotImplementedError


class _Dispatched(TorchDispatchMode):
    _WAITS = frozenset(
        "_local_scalar_dense nonzero masked_select _unique2 unique_dim unique_consecutive bincount "
        "item equal is_nonzero".split()
    )

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        masks = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if masks or name in self._WAITS:
            raise AssertionError(f"{func} waits for the GPU")
        return func(*args, **(kwargs or {}))


@contextmanager
def no_waiting() -> Iterator[None]:
    """Refuses whatever would wait for a GPU: what takes a result's shape or the host's next step
    from the values of a tensor."""

    def refused(_: Tensor) -> None:
        raise AssertionError("tolist waits for the GPU")

    # On a CPU it reads memory without a call of an operation.
    with pytest.MonkeyPatch.context() as patch, _Dispatched():
        patch.setattr(Tensor, "tolist", refused)
        yield


def test_what_waits_is_refused() -> None:
    mask = torch.tensor([True, False])
    for wait in (
        lambda: mask.nonzero(),
        lambda: torch.ones(2)[mask],
        lambda: mask.sum().item(),
        lambda: mask.int().bincount(),
        lambda: mask.tolist(),
        lambda: bool(mask.any()),
        lambda: mask.unique(),
    ):
        with no_waiting(), pytest.raises(AssertionError, match="waits for the GPU"):
            wait()


@pytest.mark.parametrize(
    ("form", "rows", "dtype"),
    [(form, *case) for form in FORMS for case in ((1, torch.float16), (9, torch.float32))]
    + [(form, 45, torch.float16) for form in ("dense", "4 bits, act-order", "W8A8")],
)
def test_all_at_once_is_one_after_the_other(dtype: torch.dtype, form: str, rows: int) -> None:
    logits = torch.randn(rows, NUM_EXPERTS).to(dtype)
    logits[:, 3] = -100.0  # Nobody's.
    check(FORMS[form], dtype, 2, logits)


@pytest.mark.parametrize("top_k", [1, 3, 4, 5])
@pytest.mark.parametrize(
    ("form", "dtype"), [("dense", torch.float16), ("4 bits, a table", torch.float32)]
)
def test_any_number_of_experts(dtype: torch.dtype, form: str, top_k: int) -> None:
    check(FORMS[form], dtype, top_k, torch.randn(7, NUM_EXPERTS).to(dtype))


@pytest.mark.parametrize(("form", "dtype"), [("dense", torch.float16), ("6 bits", torch.float32)])
def test_all_rows_to_one_expert(dtype: torch.dtype, form: str) -> None:
    logits = torch.zeros(90, NUM_EXPERTS, dtype=dtype)
    logits[:, 4] = 9.0
    check(FORMS[form], dtype, 1, logits)


def check(form: Form | None, dtype: torch.dtype, top_k: int, logits: Tensor) -> None:
    together, apart = mixture(form, dtype, top_k, logits)
    x = torch.randn(len(logits), HIDDEN).to(dtype)
    want = apart(x).double()
    with no_waiting():
        got = together(x)
    assert got.dtype == dtype and got.shape == want.shape
    error = (got.double() - want).square().mean() / want.square().mean()
    assert error <= MAX_NMSE[dtype]


def test_no_rows() -> None:
    together, _ = mixture(None, torch.float32, 2, torch.zeros(0, NUM_EXPERTS))
    assert together(torch.zeros(0, HIDDEN)).shape == (0, HIDDEN)


def test_a_row_has_the_same_bits_in_any_batch() -> None:
    logits = torch.randn(45, NUM_EXPERTS).half()
    for form in ("dense", "5 bits", "W8A8"):
        together, _ = mixture(FORMS[form], torch.float16, 2, logits)
        x = torch.randn(45, HIDDEN).half()
        whole = together(x)
        # The tile's rows are few or many by the number of pairs, and the sum is the same.
        assert torch.equal(together(x[:1]), whole[:1])
        assert torch.equal(together(x[:7]), whole[:7])


def test_the_specification_in_fp64() -> None:
    logits = torch.randn(9, NUM_EXPERTS)
    together, apart = mixture(FORMS["5 bits"], torch.float32, 3, logits)
    x = torch.randn(9, HIDDEN)
    weights, ids = reference.route_experts(logits, 3, softmax_before=True, renormalize=True)

    def expert(i: int, rows: Tensor) -> Tensor:
        gate_up, down = (
            layer.dequantize().double()
            for layer in (apart.experts[i].gate_up, apart.experts[i].down)
        )
        return reference.act_and_mul(rows @ gate_up.T, "silu") @ down.T

    wide = x.double()
    want = torch.stack(
        [
            sum(
                (weights[t, j].double() * expert(int(ids[t, j]), wide[t : t + 1])[0])
                for j in range(3)
            )  # type: ignore[misc]
            for t in range(9)
        ]
    )
    torch.testing.assert_close(together(x).double(), want, rtol=1e-4, atol=1e-5)


def test_a_model_answers_as_with_experts_one_after_the_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    make_model(Family("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}), tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(grouped_linear, "_gpu", lambda device: linear)
    called, original = [], experts.feed_forward

    def feed_forward(*arguments: Any) -> Tensor:
        called.append(arguments)
        return original(*arguments)

    (want,) = Driver(tmp_path, quantization="int4").run([prompt_of(6)], chunk=6)
    monkeypatch.setattr(ops, "new_expert_stack", lambda count, *_: ops.ExpertStack(count))
    monkeypatch.setattr(experts, "feed_forward", feed_forward)
    (got,) = Driver(tmp_path, quantization="int4").run([prompt_of(6)], chunk=6)
    assert len(called) == 3
    torch.testing.assert_close(got.logprobs, want.logprobs, rtol=0.0, atol=1e-4)

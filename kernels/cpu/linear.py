"""Linear layers on the CPU: packed weights, and which route multiplies them.

| route  | dtypes                    | what it is                                                |
|--------|---------------------------|-----------------------------------------------------------|
| pairs  | bfloat16                  | csrc/pairs.h, where the processor multiplies pairs of them |
| onednn | bfloat16                  | oneDNN with prepacked weights, private operations of torch |
| native | float32, float16          | csrc/matmul.h, accumulates in fp32 in one fixed order     |
| torch  | whatever is left          | F.linear on the plain weight                              |

Without the native library float32 goes through oneDNN too; without oneDNN bfloat16 is native. A
processor with AMX has tiles that only oneDNN uses here, so there bfloat16 is its. The
native route holds the weights that float32 activations multiply in the dtype they come in: widened
while they are multiplied, they give the same bits, and half as many bytes are read.
"""

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F

from quantd.kernels.cpu.library import Library, open_library
from quantd.kernels.cpu.native import (
    DTYPES,
    Native,
    pack_pairs,
    pack_panels,
    unpack_pairs,
    unpack_panels,
)
from quantd.kernels.cpu.threads import OnCallerThread

_SMALL_WEIGHT, _SMALL_ROWS = 1 << 19, 8
"""Elements of a weight and rows up to which oneDNN has the caller's thread alone: some tens of
microseconds. A larger weight comes from memory, which two threads read faster."""


@dataclass(frozen=True, slots=True)
class LinearWeight:
    """A weight in the form its route wants. Opaque: made by pack_linear, read by linear."""

    data: torch.Tensor
    shape: tuple[int, int]
    """(out_features, in_features)"""
    dtype: torch.dtype
    """Of activations, bias and result. The weight may be held in a narrower one."""
    route: str
    """pairs, onednn, native or torch."""
    nbytes: int
    """Memory held, padding included."""


@cache
def native() -> Native | None:
    """The native operations at the best level of this machine, or None."""
    library = open_library()
    return Native(library, library.best_level) if isinstance(library, Library) else None


@cache
def onednn_problem(dtype: torch.dtype) -> str | None:
    """Why oneDNN's prepacked route is not usable for this dtype, or None when it is.

    The operations are private to torch, so their presence and their numbers are tried once.
    """
    weight = torch.linspace(-1, 1, 32 * 48).to(dtype).view(32, 48)
    x = torch.linspace(-2, 2, 3 * 48).to(dtype).view(3, 48)
    want = x.float() @ weight.float().T
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        got = _onednn_linear(x, packed, None)
        exact = torch.equal(packed.to_dense(), weight)
    except (RuntimeError, AttributeError, TypeError, NotImplementedError) as error:
        return f"torch.ops.mkldnn does not work: {error}"
    if not exact or not torch.allclose(got.float(), want, rtol=2e-2, atol=2e-2):
        return "torch.ops.mkldnn gives wrong numbers"
    return None


def pack_linear(weight: torch.Tensor, dtype: torch.dtype | None = None) -> LinearWeight:
    """weight [N, K] in the form of the route of `dtype`, that of the activations; the weight's own
    if None. Not mutated; the caller may free it afterwards, so while a model loads one layer at
    most is held twice."""
    n, k = weight.shape
    dtype = dtype or weight.dtype
    route = linear_route(weight.device, dtype)
    data = weight = weight.to(held_dtype(weight.dtype, dtype, weight.device))
    if route == "onednn":
        data = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
    elif route == "native":
        data = pack_panels(weight.contiguous())
    elif route == "pairs":
        data = pack_pairs(weight)
    nbytes = n * k * weight.element_size() if route == "onednn" else data.nbytes
    return LinearWeight(data, (n, k), dtype, route, nbytes)


def held_dtype(weight: torch.dtype, activations: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which pack_linear holds a weight that comes in the dtype `weight`."""
    narrower = activations == torch.float32 and weight in DTYPES
    return weight if narrower and linear_route(device, activations) == "native" else activations


def unpack_linear(w: LinearWeight) -> torch.Tensor:
    """The weight [N, K] as it was packed, exactly, in the dtype in which it is held. May be the
    weight's own memory: read only."""
    if w.route == "onednn":
        return w.data.to_dense()
    if w.route == "pairs":
        return unpack_pairs(w.data, *w.shape)
    return unpack_panels(w.data, w.shape[0]) if w.route == "native" else w.data


def linear(x: torch.Tensor, w: LinearWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """x [T, K] times w transposed plus bias [N] -> [T, N], all of w's dtype, fp32 inside."""
    if x.shape[0] == 0:
        return x.new_empty((0, w.shape[0]))
    if w.route == "onednn":
        # oneDNN sums a single row in another order than the same row among others: a lone row is
        # computed as two, which costs nothing where the weight's bytes are what takes time.
        if x.shape[0] == 1:
            return _onednn_linear(x.expand(2, -1).contiguous(), w.data, bias)[:1]
        return _onednn_linear(x, w.data, bias)
    if w.route == "torch":
        return F.linear(x, w.data, bias)
    lib = native()
    assert lib is not None
    multiply = lib.linear_pairs if w.route == "pairs" else lib.linear
    return multiply(x, w.data, w.shape[0], bias)


def _onednn_linear(
    x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    if packed.numel() > _SMALL_WEIGHT or x.shape[0] > _SMALL_ROWS:
        return _onednn_pointwise(x, packed, bias)
    with OnCallerThread():
        return _onednn_pointwise(x, packed, bias)


def _onednn_pointwise(
    x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return out


def linear_route(device: torch.device, dtype: torch.dtype) -> str:
    """Which route pack_linear takes for activations of this dtype."""
    if device.type != "cpu" or dtype not in DTYPES:
        return "torch"
    lib = native()
    if dtype == torch.bfloat16:
        if lib is not None and lib.has_pairs and not torch.cpu._is_amx_tile_supported():
            return "pairs"
        if onednn_problem(dtype) is None:
            return "onednn"
    if lib is not None:
        return "native"
    if dtype == torch.float32 and onednn_problem(dtype) is None:
        return "onednn"
    return "torch"

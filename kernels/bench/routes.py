"""Layouts of a weight, and for each every route that can multiply by it, used or not."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from quantd.kernels import ops
from quantd.kernels.cpu.linear import native, onednn_problem
from quantd.kernels.cpu.native import pack_pairs, pack_panels
from quantd.kernels.reference.grouped import quantize_rows

Multiply = Callable[[torch.Tensor], torch.Tensor]
"""x [T, K] -> [T, N]"""


@dataclass(frozen=True, slots=True)
class Layout:
    name: str
    dtype: torch.dtype
    """Of the activations."""
    bits: int = 0
    """0: dense."""
    group: int = 0
    offset: bool = False
    exact: bool = False
    per_row: bool = False


LAYOUTS = (
    Layout("float32", torch.float32),
    Layout("bfloat16", torch.bfloat16),
    Layout("2 bits", torch.float32, 2, 16, offset=True),
    Layout("4 bits", torch.float32, 4, 32, offset=True),
    Layout("5 bits", torch.float32, 5, 32, offset=True),
    Layout("6 bits", torch.float32, 6, 16),
    Layout("8 bits", torch.float32, 8, 32),
    Layout("w8a8", torch.float32, 8, 0, per_row=True),
    Layout("4 bits exact", torch.float32, 4, 32, offset=True, exact=True),
    Layout("8 bits exact", torch.float32, 8, 32, exact=True),
)


@dataclass(frozen=True, slots=True)
class Route:
    name: str
    used: bool
    """Whether it is the one that a model's layer takes here."""
    integers: bool
    """Whether it multiplies integers of eight bits."""
    make: Callable[[], Multiply]
    """Packs a copy of the weight of its own."""


class Weight:
    """A random weight [N, K] of one layout."""

    def __init__(self, layout: Layout, shape: tuple[int, int]) -> None:
        self.layout = layout
        self.shape = shape
        self._plain = torch.empty(0)
        self._codes: ops.GroupedCodes | None = None
        if layout.bits:
            self._codes = _codes(layout, shape)
            self.num_bytes = self._grouped(layout.exact).nbytes
        else:
            self._plain = torch.randn(shape).to(layout.dtype)
            self.num_bytes = self._plain.nbytes

    def routes(self) -> Sequence[Route]:
        return self._dense_routes() if self._codes is None else self._grouped_routes(self._codes)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """What a route should come near to, in fp64."""
        plain = self._plain if self._codes is None else ops.dequantize_grouped(self._codes)
        return x.double() @ plain.double().T

    def _grouped(self, exact: bool) -> ops.GroupedWeight:
        assert self._codes is not None
        per_row = self.layout.per_row
        return ops.pack_grouped([self._codes], self.shape, exact=exact, per_row=per_row)

    def _dense_routes(self) -> Sequence[Route]:
        used = ops.pack_linear(self._plain[:1, :1].clone()).route
        makers = {"torch": lambda: partial(_torch, self._plain.clone())}
        if onednn_problem(self.layout.dtype) is None:
            makers["onednn"] = lambda: partial(_onednn, _reordered(self._plain))
        lib = native()
        if lib is not None and lib.has_pairs and self.layout.dtype == torch.bfloat16:
            makers["pairs"] = lambda: partial(_pairs, pack_pairs(self._plain), self.shape[0])
        if lib is not None:
            makers["native"] = lambda: partial(_native, pack_panels(self._plain), self.shape[0])
        return [Route(name, name == used, False, make) for name, make in makers.items()]

    def _grouped_routes(self, codes: ops.GroupedCodes) -> Sequence[Route]:
        layout, grouped = self.layout, ops.grouped_route()
        multiplies_integers = grouped == "native" and not layout.exact
        ours = "native int8" if multiplies_integers else f"{grouped} fp32"
        routes = [
            Route(
                ours,
                True,
                multiplies_integers,
                lambda: partial(_grouped, self._grouped(layout.exact)),
            )
        ]
        if multiplies_integers and not layout.per_row:
            routes.append(
                Route("native fp32", False, False, lambda: partial(_grouped, self._grouped(True)))
            )
        if grouped == "native":
            routes.append(
                Route("unpack, fp32", False, False, lambda: partial(_unpacked, self._grouped(True)))
            )
        if layout.per_row:
            make = partial(_onednn_int8, codes)
            routes.append(Route("onednn int8", False, True, make))
        return routes


def _codes(layout: Layout, shape: tuple[int, int]) -> ops.GroupedCodes:
    rows, columns = shape
    group = layout.group or -(-columns // 16) * 16
    scales = (rows, -(-columns // group))
    center = 1 << (layout.bits - 1)
    scale = torch.rand(scales) + 0.5
    return ops.GroupedCodes(
        torch.randint(0, 1 << layout.bits, shape, dtype=torch.uint8),
        layout.bits,
        group,
        scale,
        -center * scale if layout.offset else None,
        0 if layout.offset else center,
    )


def _torch(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, weight)


def _reordered(weight: torch.Tensor) -> torch.Tensor:
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    return packed


def _onednn(packed: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
    return out


def _native(panels: torch.Tensor, rows: int, x: torch.Tensor) -> torch.Tensor:
    lib = native()
    assert lib is not None
    return lib.linear(x, panels, rows, None)


def _pairs(pairs: torch.Tensor, rows: int, x: torch.Tensor) -> torch.Tensor:
    lib = native()
    assert lib is not None
    return lib.linear_pairs(x, pairs, rows, None)


def _grouped(weight: ops.GroupedWeight, x: torch.Tensor) -> torch.Tensor:
    return ops.grouped_linear(x, weight, None)


def _unpacked(weight: ops.GroupedWeight, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, ops.unpack_grouped(weight))


def _onednn_int8(codes: ops.GroupedCodes) -> Multiply:
    """Operations private to torch; raises what they raise where they are missing."""
    weight = (codes.codes.to(torch.int16) - codes.center).to(torch.int8)
    packed = torch.ops.onednn.qlinear_prepack(weight, None)
    scale = codes.scale.flatten().contiguous()
    zeros = torch.zeros(len(scale), dtype=torch.int32)

    def multiply(x: torch.Tensor) -> torch.Tensor:
        read, by = quantize_rows(x, None)
        shifted = (read.to(torch.int16) + 128).to(torch.uint8)
        out: torch.Tensor = torch.ops.onednn.qlinear_pointwise(
            shifted, 1.0, 128, packed, scale, zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return out * by

    return multiply

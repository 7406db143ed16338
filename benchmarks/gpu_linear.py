"""The rows of `gpu.py` about products with weights, experts and sampling."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from gpu_clock import Case, Made, Run

from quantd.kernels import ops
from quantd.kernels.grouped import GroupedCodes
from quantd.kernels.sampling import SamplingRows

ONE_ROW_AIM = 0.75
_E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)

FORMATS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "int8": {"bits": 8, "group": 0},
    "W8A8": {"bits": 8, "group": 0, "per_row": True},
    "2 bits": {"bits": 2, "group": 16, "offset": True},
    "3 bits": {"bits": 3, "group": 16},
    "4 bits, groups of 128": {"bits": 4, "group": 128},
    "4 bits, groups of 32, offsets": {"bits": 4, "group": 32, "offset": True},
    "5 bits": {"bits": 5, "group": 32, "offset": True},
    "6 bits": {"bits": 6, "group": 16},
    "8 bits": {"bits": 8, "group": 32},
    "MXFP4": {"bits": 4, "group": 32, "table": _E2M1},
    "IQ4_XS": {"bits": 4, "group": 32, "table": _IQ4},
}
"""group 0: a row."""
_QUICK = ("bf16", "W8A8", "4 bits, groups of 128", "6 bits", "MXFP4")


def cases(device: torch.device, quick: bool, tiny: bool) -> Iterator[Case]:
    shapes = [(28672, 4096)] if quick else [(28672, 4096), (4096, 4096)]
    counts: tuple[int, ...] = (1, 64) if quick else (1, 8, 64, 2048)
    if tiny:
        shapes, counts = [(64, 256)], (1, 20)
    for shape in shapes:
        for name in _QUICK if quick else FORMATS:
            for count in counts:
                yield _linear(name, shape, count, device)
    sizes = (8, 2, 64, 32) if tiny else (128, 8, 2048, 768)
    for count in (1, 3) if tiny else (1, 64) if quick else (1, 64, 2048):
        for packed in (False, True):
            yield _experts(sizes, count, packed, device)
    for count in (1, 2) if tiny else (1, 64) if quick else (1, 64, 256):
        for how in ("greedy", "top-p", "top-k"):
            yield _sampling(how, count, 300 if tiny else 128256, device)


def _codes(shape: tuple[int, int], how: dict[str, Any], device: torch.device) -> GroupedCodes:
    rows, columns = shape
    bits, group = how["bits"], how["group"] or columns
    codes = torch.randint(0, 1 << bits, shape, dtype=torch.uint8, device=device)
    scale = torch.rand(rows, -(-columns // group), device=device).add_(0.5) / (50 << bits)
    scale = scale.half().float()
    offset = -scale * (1 << (bits - 1)) if how.get("offset") else None
    table = torch.tensor(how["table"], dtype=torch.int8) if "table" in how else None
    center = 0 if offset is not None or table is not None else 1 << (bits - 1)
    return GroupedCodes(codes, bits, group, scale, offset, center, table)


def _linear(name: str, shape: tuple[int, int], count: int, device: torch.device) -> Case:
    rows, columns = shape

    def make() -> Made:
        how = FORMATS[name]
        x = torch.randn(count, columns, device=device).bfloat16()
        plain = torch.randn(shape, device=device).mul_(0.02).bfloat16()
        peers: dict[str, Run] = {"torch linear, bf16": lambda: F.linear(x, plain)}
        unit, operations = "bf16", 2.0 * count * rows * columns
        if not how:
            dense = ops.pack_linear(plain)
            run: Run = partial(ops.linear, x, dense, None)
            weight_bytes = dense.nbytes
        else:
            per_row = how.get("per_row", False)
            packed = ops.pack_grouped(
                [_codes(shape, how, device)], shape, per_row=per_row, device=device
            )
            run = partial(ops.grouped_linear, x, packed, None)
            weight_bytes = packed.nbytes
            unit = "int8" if per_row else "bf16"
            peers |= _peers(name, x, shape)
        moved = weight_bytes + x.nbytes + 2 * count * rows
        aim = ONE_ROW_AIM if count == 1 and how else None
        return Made(run, moved, operations, unit, peers, aim)

    return Case("linear", f"{name}, {rows} x {columns}, {count} rows", make)


def _peers(name: str, x: torch.Tensor, shape: tuple[int, int]) -> dict[str, Run]:
    """torch's own kernels for such weights, where it has some."""
    rows, columns = shape
    device = x.device
    if name == "W8A8" and len(x) > 16:  # torch multiplies no fewer
        codes = torch.randint(-127, 128, shape, device=device, dtype=torch.int8)
        read = torch.randint(-127, 128, x.shape, device=device, dtype=torch.int8)
        return {"torch _int_mm, no scales": lambda: torch._int_mm(read, codes.t())}
    if name != "4 bits, groups of 128":
        return {}
    scales = torch.full((columns // 128, rows, 2), 0.01, device=device).bfloat16()
    aten: Any = torch.ops.aten
    if device.type == "cpu":
        words = torch.randint(0, 16, shape, dtype=torch.int32)
        packed = aten._convert_weight_to_int4pack_for_cpu(words, 1)
        multiply = aten._weight_int4pack_mm_for_cpu
    else:
        octets = torch.randint(0, 256, (rows, columns // 2), device=device, dtype=torch.uint8)
        packed = aten._convert_weight_to_int4pack(octets, 8)
        multiply = aten._weight_int4pack_mm
    return {"torch int4 mm": lambda: multiply(x, packed, 128, scales)}


def _experts(
    sizes: tuple[int, int, int, int], count: int, packed: bool, device: torch.device
) -> Case:
    """All experts of a layer, weights included that no row has chosen only where a row has."""
    num_experts, top_k, hidden, inner = sizes
    how = FORMATS["4 bits, groups of 32, offsets"]

    def make() -> Made:
        from gpu_experts import Layer

        def weight(rows: int, columns: int) -> Any:
            if packed:
                codes = _codes((rows, columns), how, device)
                return ops.pack_grouped([codes], (rows, columns), device=device)
            plain = torch.randn(rows, columns, device=device).mul_(0.02).bfloat16()
            return ops.pack_linear(plain)

        gate_up = [weight(2 * inner, hidden) for _ in range(num_experts)]
        down = [weight(hidden, inner) for _ in range(num_experts)]
        x = torch.randn(count, hidden, device=device).bfloat16()
        logits = torch.randn(count, num_experts, device=device).bfloat16()
        layer = Layer(gate_up, down, top_k, device)
        chosen = len(set(logits.topk(top_k).indices.flatten().tolist()))
        read = chosen * (gate_up[0].nbytes + down[0].nbytes)
        operations = 2.0 * count * top_k * 3 * hidden * inner
        peers: dict[str, Run] = {"expert after expert": lambda: layer.one_by_one(x, logits)}
        return Made(
            lambda: layer.at_once(x, logits), read + 2 * x.nbytes, operations, "bf16", peers
        )

    kind = "4 bits" if packed else "bf16"
    return Case("experts", f"{num_experts}, {top_k} chosen, {kind}, {count} rows", make)


def sampling_rows(count: int, device: torch.device) -> SamplingRows:
    """Rows that nothing is done to, greedy."""

    def of(value: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.full((count,), value, dtype=dtype, device=device)

    none = torch.zeros(0, device=device)
    return SamplingRows(
        seed=torch.arange(count, device=device),
        position=torch.arange(count, device=device) + 100,
        temperature=of(0),
        top_k=of(0, torch.int32),
        top_p=of(1, torch.float64),
        min_p=of(0, torch.float64),
        repetition=of(1),
        frequency=of(0),
        presence=of(0),
        mask=torch.zeros(0, 1, dtype=torch.int32, device=device),
        mask_row=of(-1, torch.int32),
        edit_start=torch.zeros(count + 1, dtype=torch.int32, device=device),
        edit_token=none.int(),
        edit_bias=none,
        edit_count=none,
        edit_flags=none.int(),
        seen=torch.zeros(0, 1, dtype=torch.int32, device=device),
        seen_row=of(-1, torch.int32),
        seen_new=torch.zeros(count, dtype=torch.int32, device=device),
        seen_start=torch.zeros(count + 1, dtype=torch.int32, device=device),
        seen_token=none.int(),
    )


def _sampling(how: str, count: int, vocabulary: int, device: torch.device) -> Case:
    def make() -> Made:
        logits = torch.randn(count, vocabulary, device=device).mul_(3).bfloat16()
        rows = sampling_rows(count, device)
        peers: dict[str, Run] = {"torch argmax": lambda: logits.argmax(-1)}
        if how != "greedy":
            warm = torch.full_like(rows.temperature, 0.8)
            rows = replace(rows, temperature=warm)
            if how == "top-p":
                rows = replace(rows, top_p=torch.full_like(rows.top_p, 0.9))
            else:
                rows = replace(rows, top_k=torch.full_like(rows.top_k, 50))
            peers = {"torch sort, cumsum, multinomial": lambda: _by_torch(logits)}
        return Made(lambda: ops.sample_rows(logits, rows), logits.nbytes, peers=peers)

    return Case("sampling", f"{how}, {count} x {vocabulary}", make)


def _by_torch(logits: torch.Tensor) -> torch.Tensor:
    ordered, ids = (logits.float() / 0.8).softmax(-1).sort(-1, descending=True)
    kept = torch.where(ordered.cumsum(-1) - ordered < 0.9, ordered, 0)
    return ids.gather(1, torch.multinomial(kept, 1))

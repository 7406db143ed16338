"""Made-up tensors of quantized formats, for models whose weights are made up.

Which ones a model has is in its config.json, as in a real checkpoint:

    "quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": true}
    "quantization_config": {"quant_method": "gguf", "types": {"*.down_proj.weight": "Q6_K", ...}}

The second stands for the types of a GGUF file's tensors: the first glob that matches a tensor's
name. Tables of embeddings and what picks the experts stay plain; so does all of a model of any
other method. Codes are random, scales such that weights have the spread that plain ones have, zero
points the middle.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from quantd.daemon.gguf.types import BLOCKS
from quantd.plugins.api import Refused

RandomWords = Callable[[str, int], Tensor]
"""(a tensor's name, count) -> int32 [count], the same for the same name."""

_PLAIN = ("embed_tokens.weight", "lm_head.weight", "mlp.gate.weight")
"""What tools for GPTQ leave alone."""
_STD = 0.02
_GPTQ_BITS = (2, 3, 4, 8)

_HALVES: Mapping[str, Mapping[int, float]] = {
    "Q4_0": {0: _STD / 4.6},
    "Q4_1": {0: _STD / 4.6, 2: -7.5 * _STD / 4.6},
    "Q5_0": {0: _STD / 9.2},
    "Q5_1": {0: _STD / 9.2, 2: -15.5 * _STD / 9.2},
    "Q8_0": {0: _STD / 74},
    "Q2_K": {80: _STD / 18, 82: 1.5 * _STD / 18},
    "Q3_K": {108: _STD / 42},
    "Q4_K": {0: _STD / 210, 2: 7.5 * _STD / 210},
    "Q5_K": {0: _STD / 430, 2: 15.5 * _STD / 430},
    "Q6_K": {208: _STD / 1370},
    "IQ4_NL": {0: _STD / 72},
    "IQ4_XS": {0: _STD / 1330},
}
"""float16 numbers of a block by their place in it; the rest of a block may be any bytes."""
_EXPONENT = {"MXFP4": 119}
"""The block's first byte, a power of two."""


@dataclass(frozen=True, slots=True)
class Made:
    """One tensor as a checkpoint would store it."""

    shape: tuple[int, ...]
    dtype: str
    """As the file format spells it."""
    make: Callable[[RandomWords], Tensor]


def pack(config: Mapping[str, Any], name: str, shape: tuple[int, ...]) -> dict[str, Made] | None:
    """What a checkpoint with this config.json has in the place of the plain tensor `name`; None:
    the tensor itself. Raises Refused for settings that no tensors can be made of."""
    said = config.get("quantization_config")
    if not isinstance(said, Mapping) or len(shape) != 2 or not name.endswith(".weight"):
        return None
    if said.get("quant_method") == "gptq" and not name.endswith(_PLAIN):
        return _gptq(name.removesuffix(".weight"), shape, said)
    if said.get("quant_method") == "gguf" and not name.endswith("embed_tokens.weight"):
        return _gguf(name, shape, said.get("types", {}))
    return None


def _gptq(part: str, shape: tuple[int, ...], said: Mapping[str, Any]) -> dict[str, Made]:
    rows, columns = shape
    bits, group = said.get("bits"), said.get("group_size", -1)
    if bits not in _GPTQ_BITS or not isinstance(group, int) or group == 0:
        raise Refused(
            f"made-up GPTQ weights need bits of {', '.join(map(str, _GPTQ_BITS))} and a "
            f"group_size, not {bits!r} and {group!r}"
        )
    group = columns if group < 0 else group
    groups = -(-columns // group)
    words = f"{part}.qweight"

    def codes(random: RandomWords) -> Tensor:
        return random(words, columns * bits // 32 * rows).view(-1, rows)

    def group_of(random: RandomWords) -> Tensor:
        in_order = torch.arange(columns, dtype=torch.int32) // group
        if not said.get("desc_act"):
            return in_order
        return in_order[random(part, columns).argsort(stable=True)]

    version = 2 if said.get("checkpoint_format") == "gptq_v2" else 1
    scale = _STD / math.sqrt((4**bits - 1) / 12)
    return {
        words: Made((columns * bits // 32, rows), "I32", codes),
        f"{part}.qzeros": Made(
            (groups, rows * bits // 32),
            "I32",
            lambda _: _repeated((1 << (bits - 1)) - (version == 1), bits, groups, rows),
        ),
        f"{part}.scales": Made(
            (groups, rows), "F16", lambda _: torch.full((groups, rows), scale, dtype=torch.float16)
        ),
        f"{part}.g_idx": Made((columns,), "I32", group_of),
    }


def _repeated(code: int, bits: int, rows: int, count: int) -> Tensor:
    """int32 [rows, count * bits / 32]: the stream of `count` equal codes in each row."""
    stream = sum(code << bits * i for i in range(32))
    words = torch.tensor([stream >> 32 * i & 0xFFFFFFFF for i in range(bits)]).to(torch.int32)
    length = count * bits // 32
    return words.repeat(-(-length // bits))[:length].repeat(rows, 1)


def _gguf(name: str, shape: tuple[int, ...], types: Mapping[str, str]) -> dict[str, Made] | None:
    kind = next((kind for glob, kind in types.items() if fnmatchcase(name, glob)), None)
    if kind is None:
        return None
    if kind not in _HALVES and kind not in _EXPONENT:
        known = ", ".join((*_HALVES, *_EXPONENT))
        raise Refused(f"quantization_config.types: no made-up weights of {kind!r}, only of {known}")
    rows, columns = shape
    values, nbytes = BLOCKS[kind]
    if columns % values:
        raise Refused(f"the tensor {name} has {columns} columns, {kind} has blocks of {values}")

    def blocks(random: RandomWords) -> Tensor:
        total = rows * columns // values * nbytes
        data = random(name, -(-total // 4)).view(torch.uint8)[:total].view(-1, nbytes)
        for at, number in _HALVES.get(kind, {}).items():
            half = torch.tensor([number], dtype=torch.float16)
            data[:, at : at + 2] = half.view(torch.uint8)
        if kind in _EXPONENT:
            data[:, 0] = _EXPONENT[kind]
        return data.view(rows, -1)

    return {name: Made(shape, kind, blocks)}

"""The tensors of a compressed-tensors module as grouped codes.

Per module: `weight` int8 [N, K] holds the codes, or `weight_packed` int32 [N, ceil(K bits / 32)]
holds them plus 2 ** (bits - 1), the first in the lowest bits. `weight_scale` is [N, G], G = 1 for
a scale per channel, or one number. `weight_zero_point` int8 is as the scale, and beside packed
codes packed itself, down the rows: int32 [ceil(N bits / 32), G]. With act-order `weight_g_idx`
int32 [K] has the group of each column.

    W[n, k] = (code[n, k] - zero_point[n, g]) * scale[n, g]

which the library computes in the scale's own type, and this in fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantd.kernels import ops
from quantd.plugins.api import Refused


def unpack_columns(packed: Tensor, bits: int, columns: int) -> Tensor:
    """int32 [N, words] -> uint8 [N, columns], plus 2 ** (bits - 1) as stored. Bits: 2, 4 or 8."""
    stored = packed.contiguous().view(torch.uint8)
    if bits < 8:
        mask = (1 << bits) - 1
        fields = [stored >> shift & mask for shift in range(0, 8, bits)]
        stored = torch.stack(fields, dim=2).view(len(packed), -1)
    return stored[:, :columns].contiguous()


def raise_codes(codes: Tensor) -> Tensor:
    """int8 -> uint8, plus 128."""
    return codes.contiguous().view(torch.uint8) ^ 0x80


def grouped(
    codes: Tensor, bits: int, group: int, scale: Tensor, zeros: Tensor | None
) -> ops.GroupedCodes:
    """codes uint8 [N, K] and zeros uint8 [N, G] both plus 2 ** (bits - 1); scale fp32 [N, G]."""
    if zeros is None:
        return ops.GroupedCodes(codes, bits, group, scale, center=1 << (bits - 1))
    return ops.GroupedCodes(codes, bits, group, scale, -zeros.float() * scale)


def order_of(group_index: Tensor, group: int, name: str) -> Tensor:
    """int64 [K]: the columns so that those of a group are neighbours."""
    order = group_index.argsort(stable=True)
    expected = torch.arange(len(order)) // group
    if not torch.equal(group_index[order].long(), expected):
        raise Refused(f"the tensor {name} does not give {group} columns to each group")
    return order

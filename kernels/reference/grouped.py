"""Grouped weights in plain torch: the specification."""

import torch

from quantd.kernels.grouped import GroupedCodes


def dequantize_grouped(weight: GroupedCodes) -> torch.Tensor:
    """The weight fp32 [N, K], as `GroupedCodes` defines it."""
    columns = weight.codes.shape[1]
    if weight.table is None:
        values = weight.codes.float() - weight.center
    else:
        values = weight.table[weight.codes.long()].float()
    out = values.mul_(_spread(weight.scale, weight.group, columns))
    return out if weight.offset is None else out.add_(_spread(weight.offset, weight.group, columns))


def quantize_rows(x: torch.Tensor, group: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, K] -> int8 [T, K] and fp32 scales [T, G]: per `group` columns, or per row for None.

    scale = max |x| / 127, codes rounded half to even and never -128. A group of zeros, or one that
    holds a NaN or an infinity, keeps its meaning: zeros, or a scale that is not finite.
    """
    rows, columns = x.shape
    group = columns if group is None else group
    padded = torch.nn.functional.pad(x.float(), (0, -columns % group)).view(
        rows, -(-columns // group), group
    )
    scale = padded.abs().amax(dim=2) / 127
    inverse = torch.where(scale > 0, 1 / scale, 0)
    codes = (padded * inverse[:, :, None]).round().nan_to_num(0).clamp(-127, 127).to(torch.int8)
    return codes.view(rows, -1)[:, :columns], scale


def _spread(per_group: torch.Tensor, group: int, columns: int) -> torch.Tensor:
    return per_group.repeat_interleave(group, dim=1)[:, :columns]

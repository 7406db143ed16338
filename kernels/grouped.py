"""Weights as small integers with a scale for each group of columns: what formats hand to kernels.

Every quantized format that quantd reads is this one thing: GPTQ, AWQ, INT8, INT4 and all types of
GGUF. What differs is the number of bits, the size of a group, whether there is an offset, and for
codebook formats a table of at most sixteen integers.
"""

from dataclasses import dataclass

import torch

BITS = (2, 3, 4, 5, 6, 8)
GROUP_MULTIPLE = 16
"""Columns of a group are a multiple of this; a kernel never changes scale inside sixteen."""


@dataclass(frozen=True, slots=True)
class GroupedCodes:
    """Some rows of a weight, unpacked.

        W[n, k] = (value(codes[n, k]) - center) * scale[n, k // group] + offset[n, k // group]

    where value is `table[code]` when there is a table, else the code itself. All in fp32: one
    rounded product and one rounded sum. Where that is not exactly what a format defines, its
    plug-in says so.
    """

    codes: torch.Tensor
    """uint8 [N, K], each below 2 ** bits."""
    bits: int
    """One of BITS."""
    group: int
    """A multiple of GROUP_MULTIPLE. The last group may be shorter."""
    scale: torch.Tensor
    """fp32 [N, ceil(K / group)]."""
    offset: torch.Tensor | None = None
    """fp32, as scale. None is zero."""
    center: int = 0
    """0 when there is an offset or a table."""
    table: torch.Tensor | None = None
    """int8 [2 ** bits] for bits <= 4."""

    def __post_init__(self) -> None:
        rows, columns = self.codes.shape
        groups = -(-columns // self.group)
        if self.bits not in BITS:
            raise ValueError(f"bits is {self.bits}, must be one of {BITS}")
        if self.group < GROUP_MULTIPLE or self.group % GROUP_MULTIPLE:
            raise ValueError(f"group is {self.group}, must be a multiple of {GROUP_MULTIPLE}")
        for name, tensor in (("scale", self.scale), ("offset", self.offset)):
            if tensor is not None and tensor.shape != (rows, groups):
                raise ValueError(f"{name} is {list(tensor.shape)}, must be {[rows, groups]}")
        if self.center and (self.offset is not None or self.table is not None):
            raise ValueError("a center goes with neither an offset nor a table")
        if self.table is not None and (self.bits > 4 or self.table.shape != (1 << self.bits,)):
            raise ValueError(f"a table of {list(self.table.shape)} for {self.bits} bits")

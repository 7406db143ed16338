"""The table of embeddings: rows by token id, from mapped memory, whatever its format."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from quantd.plugins.api import Quantizer, TensorSource

_MANY_ROWS = 256
"""A lookup of so many rows is of a step that takes long enough to give the table's pages back: the
system maps sixteen pages around each one that is touched, and in the end the whole table."""


@dataclass(frozen=True, slots=True)
class Embedding:
    """Owns the way to the table; on a CPU the table itself is the mapped file, so that only rows
    that occur are resident."""

    quantizer: Quantizer
    name: str
    source: TensorSource
    device: torch.device
    table: Tensor | None
    """[vocab_size, hidden] as stored when it is not quantized."""

    def __call__(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        """tokens int64 [T] -> [T, hidden] of dtype, a new tensor."""
        if self.table is None:
            rows = self.quantizer.dequantize_rows(self.name, self.source, tokens.cpu())
            out = rows.to(self.device, dtype)
        else:
            out = F.embedding(tokens, self.table).to(dtype)
        if len(tokens) >= _MANY_ROWS:
            self.source.release(self.name)
        return out

    @property
    def nbytes(self) -> int:
        """Memory that is held: a mapped file does not count."""
        return 0 if self.table is None or self.device.type == "cpu" else self.table.nbytes

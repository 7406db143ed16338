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


_ROWS_AT_ONCE = 4096
"""That are unpacked for a GPU: 64 MB in float32 with a hidden size of 4096."""


@dataclass(frozen=True, slots=True)
class Embedding:
    """Owns the way to the table; on a CPU the table itself is the mapped file, so that only rows
    that occur are resident. On a GPU it is there, and unpacked: a step does not wait to know which
    rows to look up."""

    quantizer: Quantizer
    name: str
    source: TensorSource
    device: torch.device
    table: Tensor | None
    """[vocab_size, hidden] as stored when it is not quantized; else None, or `unpacked`."""

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


def unpacked(
    quantizer: Quantizer,
    name: str,
    source: TensorSource,
    num_rows: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """The whole of a quantized table [num_rows, hidden] of dtype, on the device."""
    table: Tensor | None = None
    for start in range(0, num_rows, _ROWS_AT_ONCE):
        rows = torch.arange(start, min(start + _ROWS_AT_ONCE, num_rows))
        part = quantizer.dequantize_rows(name, source, rows)
        if table is None:
            table = torch.empty(num_rows, part.shape[1], dtype=dtype, device=device)
        table[start : start + len(rows)] = part.to(device, dtype)
    source.release(name)
    assert table is not None
    return table

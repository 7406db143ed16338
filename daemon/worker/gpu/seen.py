"""Which tokens a penalty of repetition counts: a table of bits that stays on the device, of which a
step sends what is new."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, finalize

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quantd.daemon.worker.sampler import SampleRow

_LEAST_ROWS = 16


@dataclass(slots=True)
class _Place:
    row: int
    """Of the table."""
    num_known: int = 0
    """Of the row's tokens, those that an earlier step has sent."""


class Seen:
    """Each row that has such a penalty has a row of the table until it is dropped. Its tokens may
    only be appended to."""

    def __init__(self, vocab_size: int) -> None:
        self._words = -(-vocab_size // 32)
        self._places: WeakKeyDictionary[SampleRow, _Place] = WeakKeyDictionary()
        self._free: list[int] = []
        """Rows of the table that were somebody's."""
        self.num_rows = 0
        """That the table has to have."""
        self._table: Tensor | None = None

    def stage(self, rows: Sequence[SampleRow]) -> dict[str, NDArray[Any]]:
        """For the tokens that come next in these rows: the fields of `SamplingRows`, but for the
        table. What it gives is to be sent, in the order of calls."""
        places, is_new = np.full(len(rows), -1, np.int32), np.zeros(len(rows), np.int32)
        stops, tokens = np.zeros(len(rows) + 1, np.int32), array("i")
        for i, row in enumerate(rows):
            if row.sampling.repetition_penalty != 1:
                place = self._places.get(row)
                if place is None:
                    place, is_new[i] = self._place(row), 1
                tokens.extend(row.tokens[place.num_known :])
                places[i], place.num_known = place.row, len(row.tokens)
            stops[i + 1] = len(tokens)
        return {
            "seen_row": places,
            "seen_new": is_new,
            "seen_start": stops,
            "seen_token": np.frombuffer(bytearray(tokens), np.int32),
        }

    def table(self, num_rows: int, device: torch.device) -> Tensor:
        """Work of the computing stream: the table with so many rows, or more."""
        if self._table is None:
            self._table = torch.zeros(0, self._words, dtype=torch.int32, device=device)
        if num_rows > len(self._table):
            size = max(_LEAST_ROWS, 1 << (num_rows - 1).bit_length())
            grown = torch.zeros(size, self._words, dtype=torch.int32, device=device)
            grown[: len(self._table)].copy_(self._table)
            self._table = grown
        return self._table

    def _place(self, row: SampleRow) -> _Place:
        if not self._free:
            self._free.append(self.num_rows)
            self.num_rows += 1
        place = self._places[row] = _Place(self._free.pop())
        finalize(row, self._free.append, place.row).atexit = False
        return place

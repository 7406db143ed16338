"""A quantized table of embeddings: rows from the file, and all of it as a GPU has it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gguf_writer import every_matrix, write_gguf
from numerics.tiny import VOCAB, Family, make_model

from quantd.daemon.types import LoadModel
from quantd.daemon.worker import embedding
from quantd.daemon.worker.embedding import unpacked
from quantd.daemon.worker.load import load_model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_unpacked_table_has_the_bits_of_its_rows(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding, "_ROWS_AT_ONCE", 50)
    make_model(Family("llama", {"tie_word_embeddings": True}), tmp_path)
    write_gguf(tmp_path, tmp_path / "m.gguf", every_matrix("Q8_0"))
    load = LoadModel("t", str(tmp_path / "m.gguf"), dtype="float32", threads=1)
    by_row = load_model(load, lambda progress: None).weights.embedding
    assert by_row.table is None
    cpu = torch.device("cpu")
    table = unpacked(by_row.quantizer, by_row.name, by_row.source, VOCAB, cpu, dtype)
    assert table.shape[0] == VOCAB and table.dtype == dtype
    tokens = torch.randint(0, VOCAB, (300,))
    assert torch.equal(table[tokens], by_row(tokens, dtype))

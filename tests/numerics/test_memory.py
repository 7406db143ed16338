"""The KV pools: how many blocks, and that an unused one costs nothing."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from numerics.tiny import Family, make_model

from quantd.daemon.types import LoadModel
from quantd.daemon.worker import machine, memory
from quantd.daemon.worker.load import load_model
from quantd.daemon.worker.machine import available_memory, physical_cores
from quantd.daemon.worker.memory import allocate, block_bytes, check_kv_bytes, num_blocks
from quantd.daemon.worker.models.config import ModelConfig
from quantd.daemon.worker.models.families import read_config
from quantd.plugins.api import Refused

GIB = 1 << 30


@pytest.fixture
def config() -> ModelConfig:
    return read_config(
        {
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": 512,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "vocab_size": 128,
            "max_position_embeddings": 4096,
        }
    )


def test_number_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    def blocks(kv_bytes: int | None, max_context: int, available: int) -> int:
        monkeypatch.setattr(memory, "available_memory", lambda: available)
        return num_blocks(kv_bytes, 1000, max_context)

    # What was asked for.
    assert blocks(10_000, 160, GIB) == 10
    # Eight sequences of the full context, in whole blocks.
    assert blocks(None, 161, GIB) == 8 * 11
    # No more than a quarter of what there is.
    assert blocks(None, 1 << 20, 1_000_000) == 250
    assert blocks(None, 160, 0) == 1
    with pytest.raises(MemoryError, match="kv_bytes is 2000, more than the 1999 bytes"):
        blocks(2000, 160, 1999)


def test_what_can_never_be_is_refused_and_what_cannot_be_now_is_an_error(
    config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "total_memory", lambda: 4 * GIB)
    monkeypatch.setattr(memory, "available_memory", lambda: 2 * GIB)

    def check(kv_bytes: int | None) -> None:
        check_kv_bytes(kv_bytes, config, torch.float32, torch.device("cpu"))

    one_block = block_bytes(config, torch.float32)
    for fits in (None, one_block, 2 * GIB):
        check(fits)
    with pytest.raises(Refused, match=f"kv_bytes is {one_block - 1}, less than the {one_block} by"):
        check(one_block - 1)
    with pytest.raises(Refused, match=f"kv_bytes is {4 * GIB + 1}, more than .* that cpu has"):
        check(4 * GIB + 1)
    with pytest.raises(MemoryError, match=f"kv_bytes is {4 * GIB}, more than .* available now"):
        check(4 * GIB)


def test_the_total_is_the_lower_of_the_machines_and_its_cgroups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_cgroups", lambda: [tmp_path])
    unlimited = machine.total_memory()
    assert available_memory() <= unlimited
    for text, total in (("max", unlimited), (str(1 << 62), unlimited), ("123456789", 123456789)):
        (tmp_path / "memory.max").write_text(text)
        assert machine.total_memory() == total


def resident_bytes() -> int:
    """Without files, whose pages come and go as the system likes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024


def test_pools_cost_what_is_used(config: ModelConfig) -> None:
    gc.collect()  # what earlier tests have left would go meanwhile
    before = resident_bytes()
    size = block_bytes(config, torch.bfloat16)
    pools = allocate(config, torch.bfloat16, torch.device("cpu"), GIB // 4 // size)
    assert pools.num_blocks * pools.block_bytes == GIB // 4
    assert len(pools.keys) == len(pools.values) == 2
    assert pools.keys[0].shape == (pools.waste_block + 1, 4, 16, 64)
    assert pools.max_blocks == pools.waste_block, "which is nobody's"
    assert pools.max_blocks >= pools.num_blocks
    assert resident_bytes() - before < GIB // 64
    for pool in (*pools.keys, *pools.values):
        pool[:100] = 1
    used = 100 * pools.block_bytes
    assert used <= resident_bytes() - before < used + GIB // 64


def test_copies_reach_every_layer(config: ModelConfig) -> None:
    pools = allocate(config, torch.float32, torch.device("cpu"), 64)
    for i, pool in enumerate((*pools.keys, *pools.values)):
        pool[1], pool[2] = float(i), -1.0
    pools.copy(1, 2)
    for i, pool in enumerate((*pools.keys, *pools.values)):
        assert torch.all(pool[2] == i)


def test_machine() -> None:
    assert 0 < available_memory() < 1 << 50
    assert 1 <= physical_cores() <= torch.get_num_threads() * 1024


def test_a_wrong_budget_is_found_before_any_weight_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    make_model(Family("llama"), folder)
    stages: list[str] = []
    for kv_bytes in (1, 1 << 60):
        with pytest.raises(Refused, match=f"kv_bytes is {kv_bytes}, "):
            load_model(
                LoadModel("m", str(folder), dtype="float32", device="cpu", kv_bytes=kv_bytes),
                lambda progress: stages.append(progress.stage),
            )
    assert stages == ["checking", "checking"]

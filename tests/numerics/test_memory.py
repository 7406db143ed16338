"""The KV pools: how many blocks, and that an unused one costs nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from quantd.daemon.worker.machine import available_memory, physical_cores
from quantd.daemon.worker.memory import allocate, check_kv_bytes, num_blocks
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


def test_number_of_blocks() -> None:
    # What was asked for.
    assert num_blocks(10_000, 1000, max_context=160, available=GIB) == 10
    # Eight sequences of the full context, in whole blocks.
    assert num_blocks(None, 1000, max_context=161, available=GIB) == 8 * 11
    # No more than a quarter of what there is.
    assert num_blocks(None, 1000, max_context=1 << 20, available=1_000_000) == 250
    assert num_blocks(None, 1000, max_context=160, available=0) == 1


def test_more_than_there_is_is_an_error() -> None:
    with pytest.raises(MemoryError, match="kv_bytes is 2000, more than the 1999 bytes"):
        num_blocks(2000, 1000, max_context=160, available=1999)
    # No later attempt can change this one.
    with pytest.raises(Refused, match="kv_bytes is 999, less than the 1000 bytes"):
        num_blocks(999, 1000, max_context=160, available=GIB)


def test_more_than_the_machine_has_is_refused_before_loading() -> None:
    cpu = torch.device("cpu")
    with pytest.raises(Refused, match=f"kv_bytes is {1 << 60}: .* bytes that cpu has available"):
        check_kv_bytes(1 << 60, cpu)
    check_kv_bytes(1, cpu)
    check_kv_bytes(None, cpu)


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def test_pools_cost_what_is_used(config: ModelConfig) -> None:
    before = resident_bytes()
    pools = allocate(config, torch.bfloat16, torch.device("cpu"), GIB // 4, 4096)
    assert pools.num_blocks * pools.block_bytes == GIB // 4
    assert len(pools.keys) == len(pools.values) == 2
    assert pools.keys[0].shape == (pools.num_blocks, 4, 16, 64)
    assert resident_bytes() - before < GIB // 64
    for pool in (*pools.keys, *pools.values):
        pool[:100] = 1
    used = 100 * pools.block_bytes
    assert used <= resident_bytes() - before < used + GIB // 64


def test_copies_reach_every_layer(config: ModelConfig) -> None:
    pools = allocate(config, torch.float32, torch.device("cpu"), 1 << 24, 4096)
    for i, pool in enumerate((*pools.keys, *pools.values)):
        pool[1], pool[2] = float(i), -1.0
    pools.copy(torch.tensor([1]), torch.tensor([2]))
    for i, pool in enumerate((*pools.keys, *pools.values)):
        assert torch.all(pool[2] == i)


def test_machine() -> None:
    assert 0 < available_memory() < 1 << 50
    assert 1 <= physical_cores() <= torch.get_num_threads() * 1024

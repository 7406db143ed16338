"""Rotary embedding against transformers, at the positions where mistakes show."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, Phi3Config, PreTrainedConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from quantd.daemon.worker.models.fields import Fields
from quantd.daemon.worker.models.rope import RopeConfig, RopeTable, read_rope

ORIGINAL = 4096
LONG = 131072
POSITIONS = torch.tensor([0, 1, ORIGINAL - 1, ORIGINAL, LONG - 1])
CPU = torch.device("cpu")

YARN = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": ORIGINAL}
PARAMETERS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 32.0},
    "yarn": YARN,
    "yarn-mscale": YARN | {"mscale": 1.0, "mscale_all_dim": 0.7},
    "yarn-attention-factor": YARN | {"attention_factor": 1.3},
    "yarn-betas": YARN | {"beta_fast": 20.0, "beta_slow": 2.0},
    "yarn-not-truncated": YARN | {"truncate": False},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
    },
}


def ours(parameters: dict[str, Any], max_positions: int, original: int | None = None) -> RopeConfig:
    return read_rope(Fields({"rope_theta": 1e4} | parameters), 64, max_positions, original)


def theirs(config: PreTrainedConfig, embedding: Any, positions: torch.Tensor) -> Any:
    """(cos, sin) [T, R/2]: transformers repeats the half that we keep."""
    cos, sin = embedding(config)(torch.zeros(1), positions[None])
    half = cos.shape[-1] // 2
    return cos[0, :, :half], sin[0, :, :half]


def assert_same(
    rope: RopeConfig, max_context: int, positions: torch.Tensor, expected: Any, atol: float = 1e-6
) -> None:
    got = RopeTable(rope, max_context, CPU).at(positions, int(positions.max()) + 1)
    # At position 131071 the last bit of a frequency is 1e-2 radians: that they agree this closely
    # is because the order of operations is the same.
    for mine, other in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=0.0, atol=atol)


@pytest.mark.parametrize("name", PARAMETERS)
def test_against_transformers(name: str) -> None:
    parameters = PARAMETERS[name]
    config = LlamaConfig(
        hidden_size=256,
        num_attention_heads=4,
        max_position_embeddings=LONG,
        rope_parameters={"rope_theta": 1e4} | parameters,
    )
    expected = theirs(config, LlamaRotaryEmbedding, POSITIONS)
    assert_same(ours(parameters, LONG), LONG, POSITIONS, expected)


@pytest.mark.parametrize("max_context", [1000, ORIGINAL, ORIGINAL + 1, LONG])
def test_dynamic_takes_the_served_context(max_context: int) -> None:
    parameters = {"rope_type": "dynamic", "factor": 32.0}
    config = LlamaConfig(
        hidden_size=256,
        num_attention_heads=4,
        max_position_embeddings=ORIGINAL,
        rope_parameters={"rope_theta": 1e4} | parameters,
    )
    # transformers goes by the call's length: the greatest position makes it our max_context.
    positions = torch.tensor([0, 1, 500, max_context - 1])
    expected = theirs(config, LlamaRotaryEmbedding, positions)
    # transformers computes the base in fp32.
    assert_same(ours(parameters, ORIGINAL), max_context, positions, expected, atol=2e-3)


@pytest.mark.parametrize("partial", [1.0, 0.5])
@pytest.mark.parametrize(
    ("max_context", "last"), [(ORIGINAL, ORIGINAL - 1), (ORIGINAL + 1, ORIGINAL), (LONG, LONG - 1)]
)
def test_longrope_is_long_beyond_the_original_context(
    max_context: int, last: int, partial: float
) -> None:
    half = int(32 * partial)
    parameters = {
        "rope_type": "longrope",
        "partial_rotary_factor": partial,
        "short_factor": [1.0 + i / 50 for i in range(half)],
        "long_factor": [1.0 + i for i in range(half)],
    }
    config = Phi3Config(
        hidden_size=256,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=LONG,
        original_max_position_embeddings=ORIGINAL,
        pad_token_id=0,
        rope_parameters={"rope_theta": 1e4} | parameters,
    )
    positions = torch.tensor([0, 1, last])
    expected = theirs(config, Phi3RotaryEmbedding, positions)
    assert_same(ours(parameters, LONG, ORIGINAL), max_context, positions, expected)


def test_a_position_never_depends_on_when_it_was_computed() -> None:
    rope = ours({}, LONG)
    at_once, grown = RopeTable(rope, LONG, CPU), RopeTable(rope, LONG, CPU)
    positions = torch.arange(9000)
    whole = at_once.at(positions, 9000)
    for stop in (1, 17, 1024, 1025, 5000, 9000):
        cos, sin = grown.at(positions[:stop], stop)
        assert torch.equal(cos, whole[0][:stop])
        assert torch.equal(sin, whole[1][:stop])

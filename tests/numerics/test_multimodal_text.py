"""The text part of Gemma 3 with vision: its tensors stand under a prefix, beside others'."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from numerics.tiny import Driver, prompt_of, reference
from safetensors.torch import load_file, save_file


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = Gemma3Config(
        text_config={
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "vocab_size": 128,
            "max_position_embeddings": 256,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
            "query_pre_attn_scalar": 16,
        },
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "image_size": 28,
            "patch_size": 14,
        },
        mm_tokens_per_image=1,
        image_token_index=5,
        boi_token_index=6,
        eoi_token_index=7,
    )
    torch.manual_seed(5)
    model = Gemma3ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape)
            parameter.copy_(noise * (0.2 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5))
    folder = tmp_path_factory.mktemp("gemma3")
    model.save_pretrained(folder)
    return model, folder


def test_text_part(made: tuple[Any, Path]) -> None:
    model, folder = made
    (answer,) = Driver(folder).run([prompt_of(20, 8)], chunk=7, num_decodes=3)
    expected = reference(model, answer.tokens)[:-1]
    torch.testing.assert_close(answer.logprobs, expected, rtol=0.0, atol=1e-4)


def test_text_part_under_its_newer_prefix(made: tuple[Any, Path], tmp_path: Path) -> None:
    _, folder = made
    stored = load_file(folder / "model.safetensors")
    old, new = "language_model.model.", "model.language_model."
    here = old if any(name.startswith(old) for name in stored) else new
    there = new if here == old else old
    renamed = {name.replace(here, there): tensor for name, tensor in stored.items()}
    save_file(renamed, tmp_path / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    prompt = prompt_of(20, 8)
    ours, theirs = (Driver(path).run([prompt], chunk=20)[0] for path in (tmp_path, folder))
    assert torch.equal(ours.logprobs, theirs.logprobs)

"""Tiny random encoders, rerankers and embedding decoders, made and judged by transformers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor

VOCAB = 96

_BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 66,
}
_QWEN: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64}


def make(architecture: str, folder: Path, prefix: str = "", **options: Any) -> Any:
    """A model of transformers whose weights make its numbers tell, saved to `folder`."""
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()
    kind: Any = getattr(transformers, architecture)
    base = _BASE | (_QWEN if architecture.startswith("Qwen3") else {})
    config = kind.config_class(**base | options)
    config._attn_implementation = "eager"
    model = kind(config).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.add_(noise * 0.2)
            else:
                parameter.copy_(noise * 1.2 / parameter.shape[-1] ** 0.5)
    model.save_pretrained(folder)
    return model


def sentence_transformers(folder: Path, mode: str | None, normalize: bool) -> None:
    """The files that say how hidden states become a vector."""
    kinds = ["Transformer", *([] if mode is None else ["Pooling"])]
    kinds += ["Normalize"] if normalize else []
    modules = [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": f"a.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    modes = ("cls_token", "mean_tokens", "max_tokens", "lasttoken")
    config = {f"pooling_mode_{name}": name == mode for name in modes}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))


def hidden_states(model: Any, tokens: Sequence[int]) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([list(tokens)])).last_hidden_state[0]


def word_piece(folder: Path) -> Tokenizer:
    """A tokenizer of BERT's kind for a vocabulary of `VOCAB`, saved to `folder`."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *(f"##{char}" for char in letters)]
    words += ["the", "cat", "sat", "on", "mat", "##ing", "##ed", "how", "what", "is", ".", "?", ","]
    tokenizer = Tokenizer(
        models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    )
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    tokenizer.enable_truncation(12)  # as some checkpoints ask for; it must not be obeyed
    tokenizer.enable_padding()
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer

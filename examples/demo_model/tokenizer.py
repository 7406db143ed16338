"""The tokenizer: byte-level BPE, 1024 entries, every digit its own token.

Words are learnt without the space before them, and only then do the most frequent words get a
variant with the space. So a name is cut into the same pieces after a space, a quote or a bracket,
which makes copying it a matter of repeating tokens.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from data import CHAT_TEMPLATE, END, PAD, START, conversation, render
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB_SIZE = 1024
MAX_LENGTH = 8192
MARKS = (
    "<tools>",
    "</tools>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
)
_SPACED_WORDS = 150
_PUNCTUATION = r"[^\s\p{L}\p{N}]+(?: [^\s\p{L}\p{N}]+)*"
_SPACE = "Ġ"


def _splitter(word: str) -> pre_tokenizers.PreTokenizer:
    pattern = Regex(rf"\p{{N}}|{word}| ?{_PUNCTUATION}|\s")
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _texts(count: int) -> list[str]:
    """Sample text without the marks, which are tokens already."""
    texts = ["".join(t for t, _ in render(conversation(f"tokens {i}"))) for i in range(count)]
    for mark in (START, END, *MARKS):
        texts = [text.replace(mark, "\n") for text in texts]
    return texts


def load(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def train(count: int = 12_000) -> Tokenizer:
    """Train on `count` generated conversations; deterministic."""
    texts = _texts(count)
    marks = [AddedToken(t, special=True, normalized=False) for t in (PAD, START, END)]
    marks += [AddedToken(t, special=False, normalized=False) for t in MARKS]
    base = Tokenizer(models.BPE())
    base.pre_tokenizer = _splitter(r"\p{L}+")
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - _SPACED_WORDS - len(marks),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    base.train_from_iterator(texts, trainer)
    model: dict[str, Any] = json.loads(base.to_str())["model"]
    vocab, merges = dict(model["vocab"]), [tuple(m) for m in model["merges"]]

    words: Counter[str] = Counter()
    for text in texts:
        words.update(word for word in text.split(" ")[1:] if word in vocab)
    candidates = [(-n, w) for w, n in words.items() if w.isalpha() and _SPACE + w not in vocab]
    for _, word in sorted(candidates)[:_SPACED_WORDS]:
        vocab[_SPACE + word] = len(vocab)
        merges.append((_SPACE, word))

    made = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    made.pre_tokenizer = _splitter(r" ?\p{L}+")
    made.decoder = decoders.ByteLevel()
    made.add_tokens(marks)
    return made


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": END,
        "pad_token": PAD,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": MAX_LENGTH,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")

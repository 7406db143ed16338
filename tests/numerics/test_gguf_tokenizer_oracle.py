"""A tokenizer rebuilt from a GGUF file gives the ids and the text of the one it was written from.

Small vocabularies are trained, written as llama.cpp's converter writes them, and read back. The
originals are put together from the published classes and patterns of transformers and from the
steps that tokenizer.json of the family has, not from our table.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFWriter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, trainers
from tokenizers import pre_tokenizers as pre
from transformers import GemmaTokenizer
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX as QWEN2
from transformers.models.qwen3_5.tokenization_qwen3_5 import PRETOKENIZE_REGEX as QWEN35
from transformers.tokenization_utils_base import generate_merges

from quantd.daemon.gguf.reader import read_gguf
from quantd.daemon.gguf.tokenizer import build_tokenizer
from quantd.daemon.gguf.tokenizer_metadata import read_tokenizer_metadata

SPECIAL = ["<|begin|>", "<|end|>"]
USER = ["<tool>", "   ", "ünï"]
TEXTS = [
    "",
    " ",
    "  \n \t\r\n\n   x",
    "Hello world, it's THEIR'S we'Ll I'M 'tis",
    "HelloWorld camelCase XMLHttpRequest ÄÖÜber straße ǅungla",
    "def f(x: int) -> str:\n    return f'{x:>08}'  # ok\n\n\n\tpass",
    "0 12 345 6789 0123456789 3.14159 ½ ² ٣٤ Ⅷ",
    "нещо на Български, ελληνικά, עברית, العربية",
    "我想在apple工作1314151天～ ひらがなカタカナ 한국어, ok。",
    "🚀 (normal) 😶‍🌫️ ✅ 👩‍👩‍👧‍👦",
    "e\u0301 vs é, \u1e9b\u0323, ﬁ, K vs \u212a, ſ'S",
    "$100 + 50% = `x` ^ ~y | <z> !!! ...---///\n/\n",
    "<|begin|>hi<|end|> <|begin|<|end |> <tool>x</tool><tool> ünïcode",
    "▁already ▁▁ marked <0x41> <unk> </s> <s>x",
    "\u0000\u0001\ufffd\U0010ffff\u200b\ufeff",
    "a" * 70 + " " * 40 + "b",
    "the quick number Ⅻ of थ्री कि क्षि and तीन",
]
CORPUS = [text * 3 for text in TEXTS] + [
    "the quick brown fox jumps over the lazy dog and then the other things that the dog saw",
    "in the beginning there were 100 tokens, 1234 merges and 56 words; he'll say they're his",
    "for i in range(1024):\n        print(i, 'hello')\n",
] * 5
PIECES = st.sampled_from(
    [*SPECIAL, *USER, "'s", "\n", "  ", "12", "<s>", "</s>", "é", "中", "the", "<|", "▁"]
)
ANY_TEXT = st.lists(st.one_of(st.text(max_size=12), PIECES), max_size=8).map("".join)
BYTES = pre.ByteLevel(add_prefix_space=False, use_regex=False)
WORDS = pre.ByteLevel(add_prefix_space=False, use_regex=True)


@dataclass(frozen=True)
class Published:
    """What tokenizer.json of the family says."""

    steps: Sequence[Any]
    nfc: bool = False
    ignore_merges: bool = False


def split(pattern: str) -> Any:
    return pre.Split(Regex(pattern), behavior="isolated")


def one_split(name: str, **flags: bool) -> Published:
    return Published([split(GGUF_PRE_TOKENIZER_SPLITS[name]), BYTES], **flags)


FAMILIES = {
    "gpt-2": Published([WORDS]),
    "olmo": Published([WORDS], nfc=True),
    "smollm": Published([pre.Digits(individual_digits=True), WORDS]),
    "starcoder": Published([pre.Digits(individual_digits=True), WORDS]),
    "refact": Published([pre.Digits(individual_digits=True), WORDS]),
    "command-r": Published([pre.Digits(individual_digits=True), WORDS], nfc=True),
    "falcon": Published(
        [
            pre.Punctuation("contiguous"),
            WORDS,
            pre.Digits(individual_digits=False),
            split("[0-9][0-9][0-9]"),
        ]
    ),
    "llama-bpe": one_split("llama-bpe", ignore_merges=True),
    "dbrx": one_split("dbrx"),
    "tekken": one_split("tekken", ignore_merges=True),
    "gpt-4o": one_split("gpt-4o"),
    "qwen2": Published([split(QWEN2), BYTES], nfc=True),
    "qwen35": Published([split(QWEN35), BYTES], nfc=True),
    "deepseek-coder": Published(
        [
            split("[\r\n]"),
            split(r"\s?\p{L}+"),
            split(r"\s?\p{P}+"),
            split("[一-龥ࠀ-一가-퟿]+"),
            pre.Digits(individual_digits=True),
            BYTES,
        ]
    ),
    "deepseek-v3": Published(
        [
            split(r"\p{N}{1,3}"),
            split("[一-龥\u3040-ゟ゠-ヿ]+"),
            split(
                "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+"
                "|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*"
                "|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
            ),
            BYTES,
        ]
    ),
}


def byte_level(published: Published) -> Tokenizer:
    """With merges across all borders of words, so that every border shows in the ids, and with
    words that merges do not lead to."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = BYTES
    windows = [text[i : i + 4] for text in CORPUS for i in range(len(text) - 1)]
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        initial_alphabet=pre.ByteLevel.alphabet(),
        show_progress=False,
        min_frequency=2,
    )
    learner.train_from_iterator(windows, trainer)
    words = [*learner.get_vocab(), "HelloWorld", "Ġquick", "ĠÂ½", "Ġnumber"]
    vocab = {word: i for i, word in enumerate(dict.fromkeys(words))}
    tokenizer = Tokenizer(
        models.BPE(vocab, merges_of(learner), ignore_merges=published.ignore_merges)
    )
    if published.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre.Sequence(list(published.steps))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def add_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """Adds SPECIAL and USER; their token_type."""
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in SPECIAL])
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=False) for t in USER])
    return dict.fromkeys(SPECIAL, 3) | dict.fromkeys(USER, 4)


def rebuilt(path: Path, architecture: str, **ggml: Any) -> Tokenizer:
    """Through a file, with padding rows at the end of the vocabulary as converters have them."""
    tokens, kinds = ggml["tokens"], ggml["token_type"]
    padding = [f"[PAD{len(tokens) + i}]" for i in range(3)]
    writer = GGUFWriter(path, architecture)
    writer.add_tokenizer_model(ggml["model"])
    writer.add_tokenizer_pre(ggml["pre"])
    writer.add_token_list([*tokens, *padding])
    writer.add_token_types([*kinds, 5, 5, 5])
    if "merges" in ggml:
        writer.add_token_merges(ggml["merges"])
    else:
        writer.add_token_scores([*ggml["scores"], -1e4, -1e4, -1e4])
        writer.add_unk_token_id(tokens.index("<unk>"))
        writer.add_add_space_prefix(ggml["add_space_prefix"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return build_tokenizer(read_tokenizer_metadata(read_gguf(path).metadata))


def assert_same(ours: Tokenizer, theirs: Tokenizer, text: str) -> None:
    ids = theirs.encode(text).ids
    assert ours.encode(text).ids == ids
    for skips in (True, False):
        assert ours.decode(ids, skips) == theirs.decode(ids, skips)


def assert_same_on_all(ours: Tokenizer, theirs: Tokenizer, examples: int) -> None:
    for text in [*TEXTS, "\n".join(TEXTS)]:
        assert_same(ours, theirs, text)

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
    @given(ANY_TEXT)
    def on_any_text(text: str) -> None:
        assert_same(ours, theirs, text)

    on_any_text()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_byte_level_tokenizer_comes_back(name: str, tmp_path: Path) -> None:
    theirs = byte_level(FAMILIES[name])
    kinds = add_tokens(theirs)
    vocab = sorted(theirs.get_vocab().items(), key=lambda item: item[1])
    ours = rebuilt(
        tmp_path / "m.gguf",
        "llama",
        model="gpt2",
        pre=name,
        tokens=[token for token, _ in vocab],
        token_type=[kinds.get(token, 1) for token, _ in vocab],
        merges=[" ".join(merge) for merge in merges_of(theirs)],
    )
    assert_same_on_all(ours, theirs, 100)


def merges_of(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    state = json.loads(tokenizer.model.__getstate__())
    return [(left, right) for left, right in state["merges"]]


# --- SentencePiece --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pieces:
    tokens: list[str]
    kinds: list[int]
    scores: list[float]
    merges: list[tuple[str, str]]
    """As they were learned."""


def pieces() -> Pieces:
    """Control tokens, bytes, then what was learned in its order, then the characters, as
    SentencePiece numbers them; scores are negative ranks."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre.Metaspace(prepend_scheme="always", split=True)
    trained.train_from_iterator(
        # What is an added token is never learned.
        [text for text in CORPUS if "<" not in text and "ünï" not in text],
        trainers.BpeTrainer(vocab_size=500, show_progress=False, min_frequency=2),
    )
    merges = merges_of(trained)
    learned = list(dict.fromkeys(left + right for left, right in merges))
    chars = [token for token in trained.get_vocab() if len(token) == 1]
    words = [*learned, *chars]
    control = ["<unk>", "<s>", "</s>"]
    user = ["<tool>", "ünï"]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    return Pieces(
        [*control, *user, *bytes_, *words],
        [2, 3, 3, 4, 4] + [6] * 256 + [1] * len(words),
        [0.0] * (5 + 256) + [-float(i) for i in range(len(words))],
        merges,
    )


def add_pieces(tokenizer: Tokenizer, made: Pieces) -> None:
    for token, kind in zip(made.tokens, made.kinds, strict=True):
        if kind in (2, 3, 4):
            tokenizer.add_tokens([AddedToken(token, normalized=False, special=kind != 4)])


def llama(made: Pieces) -> Tokenizer:
    """As transformers' LlamaConverter makes tokenizer.json for Llama 2 ("legacy")."""
    vocab = {token: i for i, token in enumerate(made.tokens)}
    merges = generate_merges(vocab, dict(zip(made.tokens, made.scores, strict=True)))
    tokenizer = Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


def gemma(made: Pieces) -> Tokenizer:
    vocab = {token: i for i, token in enumerate(made.tokens)}
    ranks = {
        token: 1 if kind == 4 else -i
        for i, (token, kind) in enumerate(zip(made.tokens, made.kinds, strict=True))
    }
    merges = generate_merges(vocab, ranks)
    backend: Tokenizer = GemmaTokenizer(
        vocab=vocab, merges=merges, bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    ).backend_tokenizer
    return backend


@pytest.mark.parametrize(
    ("architecture", "original", "prefix"),
    [("llama", llama, True), ("gemma2", gemma, False)],
)
def test_a_sentence_piece_tokenizer_comes_back(
    architecture: str, original: Callable[[Pieces], Tokenizer], prefix: bool, tmp_path: Path
) -> None:
    made = pieces()
    theirs = original(made)
    add_pieces(theirs, made)
    ours = rebuilt(
        tmp_path / "m.gguf",
        architecture,
        model="llama",
        pre="default",
        tokens=made.tokens,
        token_type=made.kinds,
        scores=made.scores,
        add_space_prefix=prefix,
    )
    assert_same_on_all(ours, theirs, 300)


def test_scores_give_the_merges_that_were_learned(tmp_path: Path) -> None:
    """Each pair that was learned, in its order; further ways to the same pieces come after."""
    made = pieces()
    ours = rebuilt(
        tmp_path / "m.gguf",
        "llama",
        model="llama",
        pre="default",
        tokens=made.tokens,
        token_type=made.kinds,
        scores=made.scores,
        add_space_prefix=True,
    )
    derived = merges_of(ours)
    assert [*dict.fromkeys(a + b for a, b in derived)] == [
        *dict.fromkeys(a + b for a, b in made.merges)
    ]
    assert {*made.merges} <= {*derived}

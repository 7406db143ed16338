"""Incremental detokenization: the deltas of every split concatenate to the text of the whole."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from quantd.daemon.text.detokenizer import detokenizer
from quantd.daemon.text.vocabulary import Vocabulary, rule_of
from quantd.daemon.text.window import WindowDetokenizer

LINES = ["Hello world, hello there.", "the quick brown fox", "世界 你好", "สวัสดี", "🤗🤗 👩‍👩‍👧 ok"]
TEXTS = [
    "Hello world",
    "A 世界 B",
    "สวัสดีครับ",
    "a👩‍👩‍👧b 🏳️‍🌈!",
    "한국어와 English",
    " leading and trailing ",
    "tabs\tand\nnewlines\r\n",
    "\ufffd real replacement \ufffd",
    "e\u0301 combining",
]


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        LINES,
        trainers.BpeTrainer(
            vocab_size=330,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=["<s>", "</s>"],
            show_progress=False,
        ),
    )
    tokenizer.add_tokens([AddedToken("<tool call>"), AddedToken("<é>")])
    return tokenizer


def sentencepiece(*, strip: bool = True) -> Tokenizer:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "▁▁", *"abdehlnortuw世,.", "▁h", "he", "ll", "▁w"]
    merges = [("▁", "▁"), ("▁", "h"), ("h", "e"), ("l", "l"), ("▁", "w")]
    tokenizer = Tokenizer(
        models.BPE(
            {piece: i for i, piece in enumerate(pieces)},
            merges,
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    steps: list[normalizers.Normalizer] = [normalizers.Prepend("▁")] if strip else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    decoder = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if strip:
        decoder.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(decoder)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def metaspace(scheme: str = "always") -> Tokenizer:
    vocab = ["<s>", "▁", "▁hello", "▁world", "wor", "ld", "!", "▁▁x"]
    tokenizer = Tokenizer(models.WordLevel({p: i for i, p in enumerate(vocab)}, unk_token="!"))
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    tokenizer.add_special_tokens(["<s>"])
    return tokenizer


def word_level() -> Tokenizer:
    vocab = {"<s>": 0, "hello": 1, "world": 2, "!": 3}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="!"))
    tokenizer.add_special_tokens(["<s>"])
    return tokenizer


BYTE_LEVEL = byte_level()
SENTENCEPIECE = sentencepiece()
GEMMA = sentencepiece(strip=False)


def deltas(
    tokenizer: Tokenizer, ids: Sequence[int], prompt: Sequence[int] = (), skip: bool = True
) -> list[str]:
    stream = detokenizer(Vocabulary(tokenizer), prompt, skip_special_tokens=skip)
    return [*map(stream.feed, ids), stream.flush()]


# --- whole == concatenated ------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, SENTENCEPIECE, GEMMA], ids=["bpe", "sp", "gem"])
def test_every_prompt_and_output_split(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text).ids
    whole = tokenizer.decode(ids)
    assert "".join(deltas(tokenizer, ids)) == whole
    assert all("\ufffd" not in d for d in deltas(tokenizer, ids)) or "\ufffd" in text
    for cut in range(1, len(ids) + 1):
        stream = detokenizer(Vocabulary(tokenizer))
        complete = "".join(map(stream.feed, ids[:cut]))
        # A character on the boundary comes whole, as the output completes it.
        assert complete + "".join(deltas(tokenizer, ids[cut:], ids[:cut])) == whole


@given(st.lists(st.integers(0, BYTE_LEVEL.get_vocab_size() + 5), max_size=60), st.booleans())
def test_byte_level_equals_the_library_on_any_tokens(ids: list[int], skip: bool) -> None:
    expected = BYTE_LEVEL.decode(ids, skip_special_tokens=skip)
    assert "".join(deltas(BYTE_LEVEL, ids, skip=skip)) == expected


@given(st.text(max_size=30), st.booleans())
def test_sentencepiece_equals_the_library_on_any_text(text: str, strip: bool) -> None:
    tokenizer = SENTENCEPIECE if strip else GEMMA
    ids = tokenizer.encode(text).ids
    assert "".join(deltas(tokenizer, ids)) == tokenizer.decode(ids)


@given(st.lists(st.integers(0, 7), max_size=12), st.sampled_from(["always", "first", "never"]))
def test_metaspace_equals_the_library(ids: list[int], scheme: str) -> None:
    tokenizer = metaspace(scheme)
    assert "".join(deltas(tokenizer, ids)) == tokenizer.decode(ids)


@given(st.lists(st.integers(0, 3), max_size=12), st.booleans())
def test_no_decoder_equals_the_library(ids: list[int], skip: bool) -> None:
    tokenizer = word_level()
    expected = tokenizer.decode(ids, skip_special_tokens=skip)
    assert "".join(deltas(tokenizer, ids, skip=skip)) == expected


def test_sentencepiece_keeps_the_good_characters_of_a_malformed_run() -> None:
    ids = [3 + byte for byte in [*"世".encode(), 0xFF, *"é".encode()]]
    assert deltas(SENTENCEPIECE, ids) == ["", "", "世", "\ufffd", "", "é", ""]


# --- boundaries -----------------------------------------------------------------------------------


def test_the_space_after_the_prompt_is_kept_and_the_first_of_a_text_is_not() -> None:
    hello, world = SENTENCEPIECE.encode("he").ids, SENTENCEPIECE.encode("w").ids
    assert "".join(deltas(SENTENCEPIECE, world, hello)) == " w"
    assert "".join(deltas(SENTENCEPIECE, world)) == "w"
    bos = [SENTENCEPIECE.token_to_id("<s>")]
    assert "".join(deltas(SENTENCEPIECE, world, bos)) == "w"
    assert "".join(deltas(SENTENCEPIECE, world, bos, skip=False)) == " w"
    assert "".join(deltas(metaspace(), [2, 3])) == "hello world"
    assert "".join(deltas(metaspace(), [3], [2])) == " world"


@pytest.mark.parametrize("num_prompt_bytes", [1, 2, 3])
@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, SENTENCEPIECE], ids=["bpe", "sp"])
def test_a_prompt_that_ends_inside_a_character(tokenizer: Tokenizer, num_prompt_bytes: int) -> None:
    def byte_ids(data: bytes) -> list[int]:
        if tokenizer is SENTENCEPIECE:
            return [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in data]
        table = {Vocabulary(tokenizer).piece(i): i for i in range(tokenizer.get_vocab_size())}
        return [table[bytes([byte])] for byte in data]

    emoji = "🤗".encode()
    prompt = byte_ids(b"secret " * 3 + emoji[:num_prompt_bytes])
    completed = deltas(tokenizer, byte_ids(emoji[num_prompt_bytes:] + b"hi"), prompt)
    assert "".join(completed) == "🤗hi"
    # What does not continue it stands alone: the prompt's U+FFFD is not output.
    assert "".join(deltas(tokenizer, byte_ids(b"hi"), prompt)) == "hi"
    assert "".join(deltas(tokenizer, byte_ids(emoji), prompt)) == "🤗"
    assert "".join(deltas(tokenizer, [], prompt)) == ""
    special = [tokenizer.token_to_id("</s>")]
    assert "".join(deltas(tokenizer, byte_ids(b"\x97hi"), prompt + special)) == "\ufffdhi"


def test_offsets_never_retreat() -> None:
    table = {Vocabulary(BYTE_LEVEL).piece(i): i for i in range(BYTE_LEVEL.get_vocab_size())}
    ids = [table[bytes([byte])] for byte in "A 世".encode() + b"\xe4" + b"ab"]
    assert deltas(BYTE_LEVEL, ids) == ["A", " ", "", "", "世", "", "\ufffda", "b", ""]


def test_special_tokens() -> None:
    ids = [0, *BYTE_LEVEL.encode("hi<tool call><é>").ids, 1]
    assert "".join(deltas(BYTE_LEVEL, ids)) == BYTE_LEVEL.decode(ids)
    assert "".join(deltas(BYTE_LEVEL, ids, skip=False)).startswith("<s>hi<tool call>")
    assert "".join(deltas(BYTE_LEVEL, [999_999, *ids])) == BYTE_LEVEL.decode(ids)


# --- cost -----------------------------------------------------------------------------------------


class _CountingVocabulary(Vocabulary):
    num_pieces = 0

    def piece(self, token: int, *, first: bool = False) -> bytes:
        self.num_pieces += 1
        return super().piece(token, first=first)


@pytest.mark.parametrize("kind", ["real U+FFFD", "invalid bytes", "unfinished characters"])
def test_malformed_output_costs_no_more_than_other_output(kind: str) -> None:
    table = {Vocabulary(BYTE_LEVEL).piece(i): i for i in range(BYTE_LEVEL.get_vocab_size())}
    data = {
        "real U+FFFD": "\ufffd".encode() * 3334,
        "invalid bytes": bytes(random.Random(3).choices(range(0x80, 0x100), k=10_000)),
        "unfinished characters": b"\xf0\x9f\xa4" * 3334,
    }[kind]
    vocabulary = _CountingVocabulary(BYTE_LEVEL)
    stream = detokenizer(vocabulary, [table[b"A"]] * 10_000)
    pending = 0
    parts = []
    for byte in data:
        parts.append(stream.feed(table[bytes([byte])]))
        pending = 0 if parts[-1] else pending + 1
        assert pending < 4
    parts.append(stream.flush())
    assert "".join(parts) == data.decode("utf-8", "replace")
    assert vocabulary.num_pieces < 2 * len(data) + 20


# --- decoders that are no map of tokens -----------------------------------------------------------


def word_piece() -> Tokenizer:
    vocab = {"<s>": 0, "hello": 1, "world": 2, "##s": 3, "!": 4, "##er": 5}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="!"))
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    tokenizer.add_special_tokens(["<s>"])
    return tokenizer


@given(st.lists(st.sampled_from([0, 1, 2, 3, 4, 5, 77]), max_size=40))
def test_the_window_equals_the_library(ids: list[int]) -> None:
    tokenizer = word_piece()
    assert isinstance(detokenizer(Vocabulary(tokenizer)), WindowDetokenizer)
    assert "".join(deltas(tokenizer, ids)) == tokenizer.decode(ids)


def test_the_window_continues_the_prompt() -> None:
    assert deltas(word_piece(), [3, 2, 0, 5], [0, 1]) == ["s", " world", "", "er", ""]


def test_which_decoders_are_maps() -> None:
    def rule(decoder: decoders.Decoder) -> object:
        tokenizer = word_level()
        tokenizer.decoder = decoder
        return Vocabulary(tokenizer).rule

    assert rule(decoders.Sequence([decoders.ByteLevel()])) == rule(decoders.ByteLevel())
    assert rule(decoders.Sequence([decoders.Replace(Regex("a+"), "b")])) is None
    assert rule(decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 0, 1)])) is None
    assert rule(decoders.Sequence([decoders.Strip(" ", 1, 0), decoders.Fuse()])) is None
    assert rule(decoders.CTC()) is None
    assert rule_of(None) is not None

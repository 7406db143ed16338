"""The tokenizer in a GGUF file's metadata: what is built of it, and what is refused."""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFWriter
from tokenizers import pre_tokenizers

from quantd.daemon.config import Settings
from quantd.daemon.config.models import choose_models
from quantd.daemon.errors import ModelRefused
from quantd.daemon.gguf.place import find_gguf
from quantd.daemon.gguf.reader import GgufError
from quantd.daemon.gguf.tokenizer import adds_bos, build_tokenizer
from quantd.daemon.gguf.tokenizer_metadata import read_tokenizer_metadata
from quantd.daemon.text import TextModel

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
SPECIAL = ["<s>", "</s>", "<|im_end|>", "<tool>", "[PAD261]"]
KINDS = [3, 3, 3, 4, 4]
MERGES = ["h i", "Ġ hi"]
P = "tokenizer.ggml."


def byte_level(**changes: Any) -> dict[str, Any]:
    """256 bytes, "hi" and "Ġhi", then SPECIAL; a change to None removes the key."""
    tokens = [*ALPHABET, *SPECIAL, "hi", "Ġhi"]
    metadata = {
        "general.architecture": "llama",
        "llama.context_length": 64,
        P + "model": "gpt2",
        P + "pre": "gpt-2",
        P + "tokens": tokens,
        P + "token_type": array("i", [1] * 256 + KINDS + [1, 1]),
        P + "merges": MERGES,
        P + "bos_token_id": 256,
        P + "eos_token_id": 257,
    } | {key.replace("__", "."): value for key, value in changes.items()}
    return {key: value for key, value in metadata.items() if value is not None}


def ggml(**changes: Any) -> dict[str, Any]:
    return byte_level(**{f"tokenizer__ggml__{key}": value for key, value in changes.items()})


def sentence_piece(**changes: Any) -> dict[str, Any]:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    pieces += ["▁", "a", "b", "ab", "▁a", "▁ab"]
    scores = [0.0] * 259 + [-7.0, -8.0, -9.0, -1.0, -2.0, -3.0]
    kinds = [2, 3, 3] + [6] * 256 + [1] * 6
    metadata = {
        "general.architecture": "llama",
        P + "model": "llama",
        P + "pre": "default",
        P + "tokens": pieces,
        P + "scores": array("f", scores),
        P + "token_type": array("i", kinds),
        P + "bos_token_id": 1,
        P + "eos_token_id": 2,
        P + "unknown_token_id": 0,
    } | {P + key: value for key, value in changes.items()}
    return {key: value for key, value in metadata.items() if value is not None}


def pieces_of(metadata: dict[str, Any], text: str) -> list[str]:
    tokens: list[str] = build_tokenizer(read_tokenizer_metadata(metadata)).encode(text).tokens
    return tokens


def write(path: Path, metadata: dict[str, Any]) -> Path:
    writer = GGUFWriter(path, metadata["general.architecture"])
    for key, value in metadata.items():
        if key == "general.architecture":
            continue
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_array(key, list(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# --- what is built --------------------------------------------------------------------------------


def test_a_byte_level_vocabulary_merges_and_takes_added_tokens_whole() -> None:
    text = "hi hi<s><tool>h\n"
    assert pieces_of(byte_level(), text) == ["hi", "Ġhi", "<s>", "<tool>", "h", "Ċ"]


def test_rows_that_pad_the_vocabulary_are_no_tokens() -> None:
    padding = ["[PAD263]", "[PAD7]"]
    kinds = array("i", [1] * 256 + KINDS + [1, 1, 4, 5])
    metadata = ggml(tokens=[*ALPHABET, *SPECIAL, "hi", "Ġhi", *padding], token_type=kinds)
    read = read_tokenizer_metadata(metadata)
    assert read.vocab_size == 263
    tokenizer = build_tokenizer(read)
    assert tokenizer.get_vocab_size() == 263
    assert tokenizer.encode("[PAD263][PAD7]").tokens == list("[PAD263][PAD7]")
    # Named otherwise than the row it stands in, it is what the model's author added.
    assert tokenizer.encode("[PAD261]").ids == [260]


def test_padding_between_tokens_is_never_written() -> None:
    tokens = [*ALPHABET, *SPECIAL[:4], "[PAD260]", "hi", "Ġhi"]
    tokenizer = build_tokenizer(read_tokenizer_metadata(ggml(tokens=tokens)))
    assert tokenizer.encode("[PAD260]").tokens == list("[PAD260]")
    assert tokenizer.get_vocab_size() == len(tokens)


def test_a_vocabulary_of_padding_is_refused() -> None:
    metadata = ggml(tokens=["[PAD0]"], token_type=array("i", [5]), merges=[])
    for key in ("bos_token_id", "eos_token_id"):
        del metadata[P + key]
    with pytest.raises(GgufError, match="has nothing but padding"):
        read_tokenizer_metadata(metadata)


def test_deepseek_llm_splits_letters_with_two_cases_from_others_and_from_ascii() -> None:
    tokenizer = build_tokenizer(read_tokenizer_metadata(ggml(pre="deepseek-llm")))
    split = tokenizer.pre_tokenizer.pre_tokenize_str
    text = "Große Я, ok!中文12\r\n  x ツ"
    pieces = [text[begin:end] for _, (begin, end) in split(text)]
    assert pieces == [
        *("Gro", "ß", "e", " Я", ",", " ok", "!", "中文"),
        *("1", "2", "\r", "\n", " ", " x", " ", "ツ"),
    ]


def test_control_tokens_are_special_and_user_defined_ones_are_text() -> None:
    added = build_tokenizer(read_tokenizer_metadata(byte_level())).get_added_tokens_decoder()
    assert {token.content: token.special for token in added.values()} == {
        "<s>": True,
        "</s>": True,
        "<|im_end|>": True,
        "<tool>": False,
        "[PAD261]": False,
    }


def test_pieces_are_joined_by_their_scores() -> None:
    metadata = sentence_piece()
    metadata[P + "tokens"][264] = "ba"  # instead of "▁ab", to which both ways would lead
    assert pieces_of(metadata, "ab") == ["▁", "ab"]
    scores = metadata[P + "scores"]
    scores[262], scores[263] = scores[263], scores[262]
    assert pieces_of(metadata, "ab") == ["▁a", "b"]


def test_a_character_without_a_piece_becomes_its_bytes() -> None:
    assert pieces_of(sentence_piece(), "é") == ["▁", "<0xC3>", "<0xA9>"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [({}, ["▁a"]), ({"add_space_prefix": True}, ["▁a"]), ({"add_space_prefix": False}, ["a"])],
)
def test_the_space_before_a_text(changes: dict[str, Any], expected: list[str]) -> None:
    metadata = sentence_piece(**changes)
    assert pieces_of(metadata, "a") == expected
    tokenizer = build_tokenizer(read_tokenizer_metadata(metadata))
    assert tokenizer.decode(tokenizer.encode("a b").ids) == "a b"


def test_gemma_merges_in_the_order_of_its_tokens() -> None:
    metadata = sentence_piece() | {"general.architecture": "gemma2"}
    metadata[P + "scores"][262] = -3.5  # worse than "▁ab", but it comes first
    assert pieces_of(metadata, "ab") == ["ab"]


def test_phi_3_strips_after_its_markers() -> None:
    metadata = sentence_piece()
    metadata[P + "tokens"][261] = "<|user|>"
    metadata[P + "tokens"][262:265] = ["x", "y", "z"]
    metadata[P + "token_type"][261] = 3
    assert pieces_of(metadata, "<|user|>\na")[1:] == ["▁", "<0x0A>", "a"]
    assert pieces_of(metadata | {"general.architecture": "phi3"}, "<|user|>\na")[1:] == ["▁", "a"]


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        (byte_level(), False),
        (ggml(pre="llama-bpe"), True),
        (ggml(pre="tekken"), True),
        (ggml(pre="llama-bpe", add_bos_token=False), False),
        (ggml(add_bos_token=True), True),
        (sentence_piece(), True),
        (sentence_piece(add_bos_token=False), False),
    ],
)
def test_bos_is_added_as_the_file_or_the_family_says(
    metadata: dict[str, Any], expected: bool
) -> None:
    assert adds_bos(read_tokenizer_metadata(metadata)) is expected


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (ggml(tokens=None), r"tokens is missing or empty"),
        (ggml(tokens=[]), r"tokens is missing or empty"),
        (ggml(tokens=array("i", [1])), r"tokens must be an array of strings"),
        (ggml(tokens=["a", "b", "a"]), r"tokens has 'a' twice, as 0 and as 2"),
        (ggml(token_type=array("i", [1])), r"token_type has 1 items, but there are 263 tokens"),
        (ggml(token_type=array("i", [9] * 263)), r"token_type must be 1 to 6"),
        (ggml(eos_token_id=263), r"eos_token_id is 263, must be below 263"),
        (ggml(bos_token_id="x"), r"bos_token_id is 'x', must be of the type int"),
        (ggml(add_bos_token=1), r"add_bos_token is 1, must be of the type bool"),
        (ggml(model="bert"), r"model is 'bert', must be one of"),
        (ggml(model=None), r"model is '', must be one of"),
        (ggml(pre="new-bpe"), r"pre is 'new-bpe', which is not supported; .* qwen2"),
        (ggml(pre=None), r"pre is missing; it must be one of"),
        (ggml(merges=None), r"merges is missing"),
        (ggml(merges=["h i", "hi"]), r"merges: number 1 is 'hi', must be two tokens"),
        (ggml(merges=["h i", "hi zz"]), r"merges: number 1 joins 'hi' and 'zz', but 'zz' is no"),
        (ggml(merges=["h i", "i h"]), r"merges: number 1 joins 'i' and 'h', but 'ih' is no token"),
        (
            ggml(tokens=["hi", *"abc"], token_type=None, bos_token_id=None, eos_token_id=None),
            r"tokens lacks 93 characters of the byte-level alphabet",
        ),
        (sentence_piece(scores=None), r"scores is missing, and so is tokenizer.ggml.merges"),
        (sentence_piece(scores=array("f", [1.0])), r"scores has 1 items"),
        (sentence_piece(scores=array("f", [-1000.0] * 265)), r"has -1000.0 for every token"),
        (sentence_piece(scores=array("f", [0.0] * 264 + [float("nan")])), r"scores .* a NaN"),
        (
            sentence_piece(token_type=array("i", [1] * 265), unknown_token_id=None),
            r"marks 0 tokens as bytes, must be 256",
        ),
    ],
)
def test_wrong_metadata_is_refused_by_name(metadata: dict[str, Any], message: str) -> None:
    with pytest.raises(GgufError, match=message):
        build_tokenizer(read_tokenizer_metadata(metadata))


def test_a_piece_too_long_to_be_split_is_refused() -> None:
    metadata = sentence_piece()
    metadata[P + "tokens"][264] = "a" * 1025
    with pytest.raises(GgufError, match="number 264 has 1025 characters, at most 1024"):
        build_tokenizer(read_tokenizer_metadata(metadata))


# --- a model's text side --------------------------------------------------------------------------


def test_a_text_model_of_a_file(tmp_path: Path) -> None:
    template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"
    metadata = ggml(add_bos_token=True) | {
        "tokenizer.chat_template": template,
        "tokenizer.chat_template.tool_use": "tools",
    }
    model = TextModel.load(write(tmp_path / "m.gguf", metadata))
    assert model.max_context == 64
    assert model.bos_token_id == 256
    assert model.eos_token_ids == (257, 258)
    assert model.encode("hi") == [256, 261]
    assert model.encode("hi", add_special_tokens=False) == [261]
    chat = [{"role": "user", "content": "hi"}]
    assert model.encode_chat(chat) == [256, 261, 258]
    assert model.render_chat(chat, tools=[{}]) == "tools"
    assert model.decode([256, 261, 262, 259, 258]) == "hi hi<tool>"
    assert TextModel.load(tmp_path / "m.gguf", 32).max_context == 32


def test_eos_is_added_where_the_file_says_so(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", ggml(add_eos_token=True, add_bos_token=True))
    assert TextModel.load(path).encode("hi") == [256, 261, 257]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"llama__context_length": 0}, r"m.gguf: llama.context_length is 0, must be a number"),
        ({"tokenizer__chat_template": True}, r"m.gguf: tokenizer.chat_template must be a string"),
        ({"tokenizer__ggml__pre": "x"}, r"m.gguf: tokenizer.ggml.pre is 'x'"),
    ],
)
def test_a_text_model_is_refused_with_the_files_name(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = write(tmp_path / "m.gguf", byte_level(**changes))
    with pytest.raises(ModelRefused, match=message):
        TextModel.load(path)


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(b"x" * 99)
    with pytest.raises(ModelRefused, match="model.bin is no sound GGUF file"):
        TextModel.load(path)


def test_the_gguf_file_of_a_folder(tmp_path: Path) -> None:
    assert find_gguf(tmp_path) is None
    for name in ("a-00001-of-00002.gguf", "a-00002-of-00002.gguf", "mmproj-a.gguf", "readme"):
        (tmp_path / name).touch()
    first = tmp_path / "a-00001-of-00002.gguf"
    assert find_gguf(tmp_path) == first
    assert find_gguf(first) == first
    (tmp_path / "b.gguf").touch()
    with pytest.raises(GgufError, match=r"holds 2 GGUF models; name one of .*, b\.gguf"):
        find_gguf(tmp_path)
    with pytest.raises(ModelRefused, match="holds 2 GGUF models"):
        TextModel.load(tmp_path)
    (tmp_path / "config.json").touch()
    assert find_gguf(tmp_path) is None


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("llama-3-Q4_K_M.gguf", "llama-3-Q4_K_M"),
        ("llama-00001-of-00003.gguf", "llama"),
        ("folder.v1", "folder.v1"),
    ],
)
def test_a_file_on_the_command_line_names_the_model(tmp_path: Path, file: str, name: str) -> None:
    (tmp_path / file).touch()
    assert list(choose_models(Settings(), [str(tmp_path / file)]).models) == [name]

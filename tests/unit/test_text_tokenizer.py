"""TextModel from a folder: special tokens, BOS and EOS, templates, errors that name the file."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from quantd.daemon.errors import ModelRefused, RequestError
from quantd.daemon.text import TextModel

WORDS = ["<unk>", "<s>", "</s>", "<|im_end|>", "hello", "world", "user", "assistant", ":", "!"]
Folder = Callable[..., Path]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """Writes a model's folder; files are given by name, with JSON for what is not a string."""

    def write(*, bos: bool = False, special: tuple[str, ...] = ("<s>",), **files: Any) -> Path:
        vocab = {word: i for i, word in enumerate(WORDS)}
        tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.decoder = decoders.Sequence([decoders.Replace("</w>", " ")])
        tokenizer.add_special_tokens(list(special))
        if bos:
            tokenizer.post_processor = processors.TemplateProcessing(
                single="<s> $A", special_tokens=[("<s>", 1)]
            )
        tokenizer.enable_truncation(max_length=4)
        tokenizer.enable_padding(length=8)
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        for name, content in files.items():
            path = tmp_path / name.replace("__", ".")
            path.write_text(content if isinstance(content, str) else json.dumps(content))
        return tmp_path

    return write


def test_importing_the_room_is_light() -> None:
    code = (
        "import sys, quantd.daemon.text;"
        "print([m for m in ('tokenizers', 'jinja2', 'numpy', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- encoding -------------------------------------------------------------------------------------


def test_nothing_is_truncated_or_padded(folder: Folder) -> None:
    assert TextModel.load(folder()).encode("hello " * 9) == [4] * 9
    assert TextModel.load(folder()).encode("") == []


@pytest.mark.parametrize(
    ("bos", "config", "expected"),
    [
        (True, {}, [1, 4]),
        (False, {}, [4]),
        (False, {"add_bos_token": True}, [1, 4]),
        (True, {"add_bos_token": True}, [1, 4]),
        (False, {"add_bos_token": True, "add_eos_token": True}, [1, 4, 2]),
        # The post-processor wins where it adds something, as in transformers.
        (True, {"add_bos_token": False}, [1, 4]),
        (True, {"add_bos_token": True, "add_eos_token": True}, [1, 4]),
    ],
)
def test_bos_and_eos(folder: Folder, bos: bool, config: dict[str, Any], expected: Any) -> None:
    config = {"bos_token": "<s>", "eos_token": "</s>", **config}
    model = TextModel.load(folder(bos=bos, tokenizer_config__json=config))
    assert model.encode("hello") == expected
    assert model.encode("hello", add_special_tokens=False) == [4]


@pytest.mark.parametrize("bos", [True, False])
def test_a_text_is_cut_at_its_end_and_keeps_its_special_tokens(folder: Folder, bos: bool) -> None:
    config = {"bos_token": "<s>", "eos_token": "</s>"}
    config |= {} if bos else {"add_bos_token": True, "add_eos_token": True}  # type: ignore[dict-item]
    model = TextModel.load(folder(bos=bos, tokenizer_config__json=config))
    end = [] if bos else [2]
    assert model.encode_within("hello world !", 9) == [1, 4, 5, 9, *end]
    assert model.encode_within("hello world !", 2 + len(end)) == [1, 4, *end]
    with pytest.raises(
        RequestError, match=f"must be more than the {1 + len(end)} tokens"
    ) as failed:
        model.encode_within("hello world !", 1)
    assert failed.value.param == "truncate_prompt_tokens"


def test_pairs(folder: Folder) -> None:
    path = folder()
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer.save(str(path / "tokenizer.json"))
    model = TextModel.load(path)
    assert model.encode_pair("hello", "world ! !") == ([1, 4, 2, 5, 9, 9, 2], 3)
    assert model.encode_pair("hello", "world ! !", 6) == ([1, 4, 2, 5, 9, 2], 3)
    with pytest.raises(RequestError, match="is 4, must be more than the 4 tokens that are kept"):
        model.encode_pair("hello", "world", 4)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A </s> $B", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer.save(str(path / "tokenizer.json"))
    assert TextModel.load(path).encode_pair("hello", "world") == ([1, 4, 2, 5], None)


def test_a_lone_surrogate_is_refused(folder: Folder) -> None:
    with pytest.raises(RequestError, match="lone surrogate at character 1"):
        TextModel.load(folder()).encode("a\ud800")


# --- special tokens -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("generation", "config", "tokenizer", "expected"),
    [
        ({"eos_token_id": 2}, {}, {}, (2,)),
        ({"eos_token_id": [2, 3]}, {"eos_token_id": 2}, {}, (2, 3)),
        ({}, {"text_config": {"eos_token_id": [3]}}, {"eos_token": "</s>"}, (3, 2)),
        ({}, {"eos_token_id": None}, {"eos_token": {"content": "<|im_end|>"}}, (3,)),
        ({}, {}, {}, ()),
    ],
)
def test_eos_ids_are_of_all_files(
    folder: Folder, generation: Any, config: Any, tokenizer: Any, expected: tuple[int, ...]
) -> None:
    path = folder(
        generation_config__json=generation,
        config__json=config,
        tokenizer_config__json=tokenizer,
    )
    assert TextModel.load(path).eos_token_ids == expected


def test_bos_id_and_context(folder: Folder) -> None:
    path = folder(config__json={"bos_token_id": 1, "max_position_embeddings": 512})
    model = TextModel.load(path)
    assert (model.bos_token_id, model.max_context) == (1, 512)
    assert TextModel.load(path, max_context=64).max_context == 64
    path = folder(special_tokens_map__json={"bos_token": "</s>"})
    assert TextModel.load(path).bos_token_id == 2


def test_tokens_that_only_the_configuration_declares(folder: Folder) -> None:
    config = {
        "added_tokens_decoder": {
            "10": {"content": "<think>", "special": False},
            "3": {"content": "<|im_end|>", "special": True},
            "11": {"content": "<|pad|>", "special": True},
        },
        "eos_token": "</s>",
        "additional_special_tokens": ["<not there>"],
    }
    model = TextModel.load(folder(tokenizer_config__json=config))
    assert model.vocab_size == 12
    assert model.encode("hello<think>world<|im_end|>") == [4, 10, 5, 3]
    assert model.decode([4, 10, 3, 2, 11, 5]) == "hello<think>world"
    assert model.decode([4, 3], skip_special_tokens=False) == "hello<|im_end|>"


def test_a_declared_token_with_an_impossible_id(folder: Folder) -> None:
    config = {"added_tokens_decoder": {"99": {"content": "<far>", "special": True}}}
    with pytest.raises(ModelRefused, match="'<far>' the id 99, but in tokenizer.json .* 10"):
        TextModel.load(folder(tokenizer_config__json=config))


def test_token_text_and_bytes(folder: Folder) -> None:
    model = TextModel.load(folder())
    assert (model.token_text(4), model.token_bytes(4)) == ("hello", b"hello")
    assert model.token_bytes(1) == b"<s>"
    assert model.token_bytes(4711) == b""


# --- files that are wrong -------------------------------------------------------------------------


def test_a_folder_without_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ModelRefused, match="has no tokenizer.json"):
        TextModel.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", '{"version": "1.0", "model": {"type": "Abacus"}}'),
        ("tokenizer_config.json", "{'"),
        ("tokenizer_config.json", "[1]"),
        ("generation_config.json", '{"eos_token_id": "two"}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {}}}'),
        ("config.json", b"\xff\xfe"),
        ("chat_template.jinja", b"\xff\xfe"),
    ],
)
def test_a_broken_file_is_named(folder: Folder, name: str, content: str | bytes) -> None:
    path = folder()
    (path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ModelRefused) as error:
        TextModel.load(path)
    assert name in str(error.value) or str(path) in str(error.value)


# --- chat -----------------------------------------------------------------------------------------

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }} : {{ m.content }} ! {% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)
CHAT = [{"role": "user", "content": "hello"}]


def test_the_template_writes_the_only_bos(folder: Folder) -> None:
    config = {"bos_token": "<s>", "chat_template": TEMPLATE}
    model = TextModel.load(folder(bos=True, tokenizer_config__json=config))
    assert model.has_chat_template
    assert model.encode_chat(CHAT) == [1, 6, 8, 4, 9, 7, 8]
    assert model.encode_chat(CHAT, add_generation_prompt=False) == [1, 6, 8, 4, 9]


def test_where_templates_come_from(folder: Folder) -> None:
    path = folder(tokenizer_config__json={"chat_template": "config"})
    assert TextModel.load(path).render_chat(CHAT) == "config"
    (path / "chat_template.json").write_text('{"chat_template": "json"}')
    assert TextModel.load(path).render_chat(CHAT) == "config"
    (path / "tokenizer_config.json").write_text("{}")
    assert TextModel.load(path).render_chat(CHAT) == "json"
    (path / "chat_template.jinja").write_text("jinja")
    assert TextModel.load(path).render_chat(CHAT) == "jinja"


def test_named_templates(folder: Folder) -> None:
    templates = [
        {"name": "default", "template": "plain"},
        {"name": "tool_use", "template": "tools {{ tools | length }}"},
    ]
    model = TextModel.load(folder(tokenizer_config__json={"chat_template": templates}))
    assert model.render_chat(CHAT) == "plain"
    assert model.render_chat(CHAT, tools=[{"type": "function"}]) == "tools 1"


def test_a_model_without_template(folder: Folder) -> None:
    model = TextModel.load(folder())
    assert not model.has_chat_template
    with pytest.raises(RequestError, match="no chat template") as error:
        model.encode_chat(CHAT)
    assert error.value.param == "messages"

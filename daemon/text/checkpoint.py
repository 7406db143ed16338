"""What the small JSON files beside a checkpoint's tokenizer say. Reads files, knows no library."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantd.daemon.errors import ModelRefused

_NAMED_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


@dataclass(frozen=True, slots=True)
class AddedToken:
    id: int
    content: str
    special: bool
    single_word: bool
    lstrip: bool
    rstrip: bool
    normalized: bool


@dataclass(frozen=True, slots=True)
class TextFiles:
    """The facts of a model's folder that concern text."""

    named_tokens: Mapping[str, str]
    """bos_token, eos_token, … → the token's string; chat templates see them under these names."""
    extra_special_tokens: tuple[str, ...]
    added_tokens: tuple[AddedToken, ...]
    """From tokenizer_config.json, by id; tokenizer.json may lack some of them."""
    eos_token_ids: tuple[int, ...]
    """From generation_config.json and config.json, in this order."""
    bos_token_id: int | None
    add_bos_token: bool | None
    add_eos_token: bool | None
    """None: not said, tokenizer.json's post-processor decides."""
    chat_templates: Mapping[str, str]
    """By name; "default" is the usual one."""
    max_context: int | None


def read_text_files(folder: Path) -> TextFiles:
    """Raises ModelRefused that names the file when one of them cannot be understood."""
    tokenizer = _read(folder / "tokenizer_config.json")
    special = _read(folder / "special_tokens_map.json")
    generation = _read(folder / "generation_config.json")
    config = _read(folder / "config.json")
    text_config = config.get("text_config") or {}
    tokens = {**special, **{k: v for k, v in tokenizer.items() if v is not None}}
    bos = [c.get("bos_token_id") for c in (generation, config, text_config)]
    return TextFiles(
        named_tokens={name: _content(tokens[name]) for name in _NAMED_TOKENS if tokens.get(name)},
        extra_special_tokens=_extra_tokens(tokens),
        added_tokens=_added_tokens(folder, tokenizer),
        eos_token_ids=_eos_ids(folder, generation, config, text_config),
        bos_token_id=next((i for i in bos if isinstance(i, int)), None),
        add_bos_token=tokenizer.get("add_bos_token"),
        add_eos_token=tokenizer.get("add_eos_token"),
        chat_templates=_chat_templates(folder, tokenizer),
        max_context=config.get("max_position_embeddings")
        or text_config.get("max_position_embeddings"),
    )


def _read(path: Path) -> dict[str, Any]:
    """An empty dict when there is no such file: every one of these is optional."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ModelRefused(f"{path} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise ModelRefused(f"{path} must hold a JSON object, not a {type(data).__name__}")
    return data


def _content(token: Any) -> str:
    """A token is written as its string or as an object with its flags."""
    return str(token["content"]) if isinstance(token, dict) else str(token)


def _extra_tokens(tokens: Mapping[str, Any]) -> tuple[str, ...]:
    extra: list[Any] = []
    for key in ("additional_special_tokens", "extra_special_tokens"):
        value = tokens.get(key) or []
        extra += value.values() if isinstance(value, dict) else value
    return tuple(_content(token) for token in extra)


def _added_tokens(folder: Path, tokenizer: Mapping[str, Any]) -> tuple[AddedToken, ...]:
    try:
        added = [
            AddedToken(
                id=int(key),
                content=flags["content"],
                special=bool(flags.get("special", False)),
                single_word=bool(flags.get("single_word", False)),
                lstrip=bool(flags.get("lstrip", False)),
                rstrip=bool(flags.get("rstrip", False)),
                normalized=bool(flags.get("normalized", False)),
            )
            for key, flags in (tokenizer.get("added_tokens_decoder") or {}).items()
        ]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        path = folder / "tokenizer_config.json"
        raise ModelRefused(f"{path}: added_tokens_decoder is not understood: {error!r}") from error
    return tuple(sorted(added, key=lambda token: token.id))


def _eos_ids(folder: Path, *configs: Mapping[str, Any]) -> tuple[int, ...]:
    ids: list[int] = []
    for config in configs:
        value = config.get("eos_token_id")
        for token in value if isinstance(value, list) else [value]:
            if token is None:
                continue
            if not isinstance(token, int):
                raise ModelRefused(f"{folder}: eos_token_id must be a number or a list: {value!r}")
            ids.append(token)
    return tuple(dict.fromkeys(ids))


def _chat_templates(folder: Path, tokenizer: Mapping[str, Any]) -> dict[str, str]:
    """chat_template.jinja wins over tokenizer_config.json, as in transformers; then
    chat_template.json. Further ones lie in additional_chat_templates/NAME.jinja."""
    templates: dict[str, str] = {}
    for source in (
        _read(folder / "chat_template.json").get("chat_template"),
        tokenizer.get("chat_template"),
    ):
        if isinstance(source, str):
            templates["default"] = source
        elif isinstance(source, list):
            templates.update({t["name"]: t["template"] for t in source})
    files = {"default": folder / "chat_template.jinja"}
    files |= {p.stem: p for p in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    for name, path in files.items():
        try:
            templates[name] = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise ModelRefused(f"{path} cannot be read: {error}") from error
    return templates

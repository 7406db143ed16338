"""The facts of a GGUF file that concern text, as `checkpoint.py` has them of a folder."""

from __future__ import annotations

from collections.abc import Mapping

from quantd.daemon.errors import ModelRefused
from quantd.daemon.gguf.tokenizer import adds_bos
from quantd.daemon.gguf.tokenizer_metadata import CONTROL, TokenizerMetadata
from quantd.daemon.text.checkpoint import TextFiles

_TEMPLATE = "tokenizer.chat_template"
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")
_ENDS = ("eos_token", "eot_token", "eom_token")
_TURN_ENDS = frozenset(
    {
        "<|eot_id|>",
        "<|eom_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|eot|>",
        "<|end_of_turn|>",
        "<|end_of_text|>",
        "<|endoftext|>",
        "<|return|>",
        "<|call|>",
        "<end_of_turn>",
        "<end_of_utterance>",
        "<EOT>",
        "<|END_OF_TURN_TOKEN|>",
        "<｜end▁of▁sentence｜>",
    }
)
"""Control tokens of these names end an answer. A folder lists them in generation_config.json; a
GGUF file names one eos_token_id, often without the end of a turn (Phi-3) or of a text (Qwen)."""


def text_files(metadata: Mapping[str, object], tokenizer: TokenizerMetadata) -> TextFiles:
    """Raises GgufError or ModelRefused that names the key."""
    tokens, ids = tokenizer.tokens, tokenizer.ids
    turn_ends = [
        i for i, kind in enumerate(tokenizer.types) if kind == CONTROL and tokens[i] in _TURN_ENDS
    ]
    stated = [ids[name] for name in _ENDS if name in ids]
    return TextFiles(
        named_tokens={name: tokens[ids[name]] for name in (*_NAMED, "mask_token") if name in ids},
        extra_special_tokens=(),
        added_tokens=(),
        eos_token_ids=tuple(dict.fromkeys([*stated, *turn_ends])),
        bos_token_id=ids.get("bos_token"),
        add_bos_token=adds_bos(tokenizer),
        add_eos_token=bool(tokenizer.add_eos),
        chat_templates=chat_templates(metadata),
        max_context=_max_context(metadata, tokenizer.architecture),
    )


def chat_templates(metadata: Mapping[str, object]) -> dict[str, str]:
    """tokenizer.chat_template is the usual one, tokenizer.chat_template.NAME are further ones."""
    templates: dict[str, str] = {}
    for key, value in metadata.items():
        if key != _TEMPLATE and not key.startswith(_TEMPLATE + "."):
            continue
        if not isinstance(value, str):
            raise ModelRefused(f"{key} must be a string, not {type(value).__name__}")
        templates[key.removeprefix(_TEMPLATE).removeprefix(".") or "default"] = value
    return templates


def _max_context(metadata: Mapping[str, object], architecture: str) -> int | None:
    key = f"{architecture}.context_length"
    value = metadata.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ModelRefused(f"{key} is {value!r}, must be a number above 0")
    return value

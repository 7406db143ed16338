"""The tokenizer.ggml.* keys of a GGUF file, checked and typed.

Specification: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md#tokenizer
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from quantd.daemon.gguf.reader import GgufError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""The values of token_type."""

_T = TypeVar("_T")
_PREFIX = "tokenizer.ggml."
_PADDING = re.compile(r"\[PAD([0-9]{1,9})\]")
_IDS = {
    "bos_token": ("bos_token_id",),
    "eos_token": ("eos_token_id",),
    "eot_token": ("eot_token_id",),
    "eom_token": ("eom_token_id",),
    "unk_token": ("unknown_token_id",),
    "sep_token": ("separator_token_id", "seperator_token_id"),
    "pad_token": ("padding_token_id",),
    "cls_token": ("cls_token_id",),
    "mask_token": ("mask_token_id",),
}
"""What we call a token → the keys of its id; one has been misspelled for long."""


@dataclass(frozen=True, slots=True)
class TokenizerMetadata:
    """All of it that concerns text. Every id is below len(tokens); no token occurs twice."""

    architecture: str
    model: str
    pre: str | None
    tokens: Sequence[str]
    types: Sequence[int]
    scores: Sequence[float] | None
    merges: Sequence[str] | None
    ids: Mapping[str, int]
    """bos_token, eos_token, eot_token, eom_token, unk_token … → id; absent: the file has none."""
    add_bos: bool | None
    add_eos: bool | None
    add_space_prefix: bool | None
    padding: frozenset[int]
    """Rows that the converter made up to reach the width of the output layer; no tokens."""

    @property
    def vocab_size(self) -> int:
        """Ids in [0, this) may be sampled: the padding at the end is not among them."""
        return next(i + 1 for i in reversed(range(len(self.tokens))) if i not in self.padding)

    @property
    def is_gemma(self) -> bool:
        return self.architecture.startswith("gemma")


def read_tokenizer_metadata(metadata: Mapping[str, object]) -> TokenizerMetadata:
    """Raises GgufError that names the key."""
    keys = _Keys(metadata)
    tokens = keys.strings("tokens")
    if not tokens:
        raise GgufError("tokenizer.ggml.tokens is missing or empty: the file has no vocabulary")
    _refuse_duplicates(tokens)
    types = keys.numbers("token_type", len(tokens))
    if types is not None and not all(NORMAL <= kind <= BYTE for kind in types):
        raise GgufError(f"tokenizer.ggml.token_type must be {NORMAL} to {BYTE} for each token")
    kinds = [NORMAL] * len(tokens) if types is None else [int(kind) for kind in types]
    padding = frozenset(
        i
        for i, token in enumerate(tokens)
        if token.startswith("[PAD") and _is_padding(i, token, kinds[i])
    )
    if len(padding) == len(tokens):
        raise GgufError("tokenizer.ggml.tokens has nothing but padding")
    return TokenizerMetadata(
        architecture=str(metadata.get("general.architecture", "")),
        model=keys.one("model", str) or "",
        pre=keys.one("pre", str),
        tokens=tokens,
        types=kinds,
        scores=keys.numbers("scores", len(tokens)),
        merges=keys.strings("merges"),
        ids=_ids(keys, len(tokens)),
        add_bos=keys.one("add_bos_token", bool),
        add_eos=keys.one("add_eos_token", bool),
        add_space_prefix=keys.one("add_space_prefix", bool),
        padding=padding,
    )


def _is_padding(number: int, token: str, kind: int) -> bool:
    """Converters count them from 0 or from their place, and have called them unused, user-defined
    and unknown."""
    match = _PADDING.fullmatch(token)
    if match is None:
        return False
    return kind == UNUSED or (kind in (USER_DEFINED, UNKNOWN) and int(match[1]) == number)


def _ids(keys: _Keys, size: int) -> dict[str, int]:
    ids: dict[str, int] = {}
    for name, spellings in _IDS.items():
        for key in spellings:
            token = keys.one(key, int)
            if token is None:
                continue
            if not 0 <= token < size:
                raise GgufError(
                    f"tokenizer.ggml.{key} is {token}, must be below {size}, the number of tokens"
                )
            ids.setdefault(name, token)
    return ids


def _refuse_duplicates(tokens: Sequence[str]) -> None:
    if len(set(tokens)) == len(tokens):
        return
    first: dict[str, int] = {}
    for i, token in enumerate(tokens):
        if first.setdefault(token, i) != i:
            raise GgufError(
                f"tokenizer.ggml.tokens has {token!r} twice, as {first[token]} and as {i}"
            )


class _Keys:
    """Typed access to tokenizer.ggml.*; what is absent is None."""

    def __init__(self, metadata: Mapping[str, object]) -> None:
        self._metadata = metadata

    def one(self, key: str, kind: type[_T]) -> _T | None:
        value = self._metadata.get(_PREFIX + key)
        if value is None:
            return None
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise GgufError(f"{_PREFIX}{key} is {value!r:.80}, must be of the type {kind.__name__}")
        return value

    def strings(self, key: str) -> list[str] | None:
        value = self._metadata.get(_PREFIX + key)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise GgufError(f"{_PREFIX}{key} must be an array of strings")
        return value

    def numbers(self, key: str, length: int) -> Sequence[Any] | None:
        value = self._metadata.get(_PREFIX + key)
        if value is None:
            return None
        if not isinstance(value, array):
            raise GgufError(f"{_PREFIX}{key} must be an array of numbers")
        if len(value) != length:
            raise GgufError(f"{_PREFIX}{key} has {len(value)} items, but there are {length} tokens")
        return value

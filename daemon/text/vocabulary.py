"""Which bytes each token stands for.

`tokenizers` decodes whole sequences; a stream needs single tokens. The common decoders (byte-level
BPE; SentencePiece with byte fallback; Metaspace; none) are a map from a token to bytes, plus a
rule for the first token, so a text is the concatenation of its tokens' bytes, read as UTF-8. For
any other decoder `Vocabulary.rule` is None and `window.py` takes over.
"""

from __future__ import annotations

import json
import re
from collections.abc import Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's map of bytes to printable characters, turned round: printable Latin-1 stands for
    itself, the other bytes for U+0100 and up in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_LEVEL = _byte_level_alphabet()


@dataclass(frozen=True, slots=True)
class PieceRule:
    """How a token's string becomes bytes."""

    byte_level: bool = False
    byte_fallback: bool = False
    replace: tuple[tuple[str, str], ...] = ()
    dropped_in_first: str = ""
    """Removed from the first token of a text (Metaspace's replacement character)."""
    separator: str = ""
    """Before every token but the first."""
    strip: tuple[str, int] = ("", 0)
    """This string is removed from the text's beginning, at most so many times."""

    def piece(self, token: str, *, first: bool) -> bytes:
        if self.byte_level:
            try:
                return bytes([_BYTE_LEVEL[char] for char in token])
            except KeyError:  # an added token, which is plain text
                return token.encode()
        if first and self.dropped_in_first:
            token = token.replace(self.dropped_in_first, "")
        for old, new in self.replace:
            token = token.replace(old, new)
        if self.byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        return (token if first else self.separator + token).encode()


def rule_of(decoder: dict[str, Any] | None) -> PieceRule | None:
    """The rule for tokenizer.json's "decoder", or None when it is not a map of single tokens."""
    if decoder is None:
        return PieceRule(separator=" ")
    if decoder["type"] == "ByteLevel":
        return PieceRule(byte_level=True)
    if decoder["type"] == "Metaspace":
        char = decoder["replacement"]
        prepends = decoder.get("prepend_scheme", "always") != "never"
        return PieceRule(replace=((char, " "),), dropped_in_first=char if prepends else "")
    if decoder["type"] == "Sequence":
        return _rule_of_sequence(decoder["decoders"])
    return None


def _rule_of_sequence(steps: list[dict[str, Any]]) -> PieceRule | None:
    """Replace*, ByteFallback?, Fuse?, Strip? in this order: the SentencePiece kind."""
    if len(steps) == 1:
        return rule_of(steps[0])
    steps = list(steps)
    replace: list[tuple[str, str]] = []
    while steps and steps[0]["type"] == "Replace":
        step = steps.pop(0)
        if "String" not in step["pattern"]:
            return None
        replace.append((step["pattern"]["String"], step["content"]))
    byte_fallback = bool(steps) and steps[0]["type"] == "ByteFallback"
    del steps[:byte_fallback]
    fused = bool(steps) and steps[0]["type"] == "Fuse"
    del steps[:fused]
    strip = ("", 0)
    if fused and steps and steps[0]["type"] == "Strip" and not steps[0]["stop"]:
        step = steps.pop(0)
        strip = (step["content"], step["start"])
    if steps:
        return None
    return PieceRule(byte_fallback=byte_fallback, replace=tuple(replace), strip=strip)


class Vocabulary:
    """Token ids to bytes, with a cache. Ids that the tokenizer does not know (rows that pad the
    model's output layer) stand for nothing."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        decoder = tokenizer.decoder
        self.rule = rule_of(None if decoder is None else json.loads(decoder.__getstate__()))
        added = tokenizer.get_added_tokens_decoder()
        self.special = frozenset(i for i, token in added.items() if token.special)
        self._cache: dict[int, bytes] = {}
        self.size = max([tokenizer.get_vocab_size(with_added_tokens=True) - 1, *added]) + 1

    def is_special(self, token: int) -> bool:
        return token in self.special

    def hidden(self, *, skip_special_tokens: bool, kept: Set[int] = frozenset()) -> Set[int]:
        """Special tokens that take no part in a text. kept: those that are not skipped."""
        return self.special - kept if skip_special_tokens else frozenset()

    def piece(self, token: int, *, first: bool = False) -> bytes:
        """The bytes of a token; `first`: where it begins a text."""
        if first:
            return self._piece(token, first=True)
        piece = self._cache.get(token)
        if piece is None:
            piece = self._cache[token] = self._piece(token, first=False)
        return piece

    def pieces(self) -> list[bytes]:
        """The bytes of every token. Takes a moment, and does not fill the cache."""
        return [self._piece(token, first=False) for token in range(self.size)]

    def _piece(self, token: int, *, first: bool) -> bytes:
        text = self.tokenizer.id_to_token(token)
        if text is None:
            return b""
        if self.rule is None:
            decoded: str = self.tokenizer.decode([token], skip_special_tokens=False)
            return decoded.encode()
        return self.rule.piece(text, first=first)

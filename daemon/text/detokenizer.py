"""Tokens to text, one at a time.

Invariant: the deltas of any split of a token sequence, with the one of `flush`, concatenate to the
text of the whole sequence, and what was given out is never taken back. A delta holds whole
characters only. Each token costs its own bytes, however long or malformed the text before it is.

Malformed UTF-8 becomes U+FFFD, one for each maximal subpart (Unicode 15, section 3.9, as WHATWG's
and Rust's decoders do). This differs from `tokenizers` in one case: after SentencePiece byte
tokens that are malformed, it gives one U+FFFD for *every* byte of the run, also for its well-formed
characters. That cannot be known before the run ends, so it would stop a stream of CJK text made
of byte tokens until its last byte.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence, Set
from typing import Protocol

from quantd.daemon.text.vocabulary import PieceRule, Vocabulary
from quantd.daemon.text.window import WindowDetokenizer

_MAX_CHAR_BYTES = 4


class Detokenizer(Protocol):
    def feed(self, token: int) -> str:
        """The text that this token completes; often empty, never half a character."""

    def flush(self) -> str:
        """The end: U+FFFD if the last character is incomplete."""


def detokenizer(
    vocabulary: Vocabulary,
    prompt: Sequence[int] = (),
    *,
    skip_special_tokens: bool = True,
    kept: Set[int] = frozenset(),
) -> Detokenizer:
    """A detokenizer of what follows the prompt. Nothing of the prompt is given out, but where it
    ends in the middle of a character that the output completes, the character comes whole. kept:
    special tokens that are shown also when others are skipped."""
    hidden = vocabulary.hidden(skip_special_tokens=skip_special_tokens, kept=kept)
    if vocabulary.rule is None:
        return WindowDetokenizer(vocabulary, prompt, hidden)
    return _PieceDetokenizer(vocabulary, vocabulary.rule, prompt, hidden)


class _PieceDetokenizer:
    def __init__(
        self, vocabulary: Vocabulary, rule: PieceRule, prompt: Sequence[int], hidden: Set[int]
    ) -> None:
        self._vocabulary = vocabulary
        self._hidden = hidden
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._first = not any(
            token not in hidden and vocabulary.piece(token) for token in reversed(prompt)
        )
        self._tail = b"" if self._first else self._incomplete_end(prompt)
        prefix, times = rule.strip
        self._strip = prefix
        self._strips_left = times if self._first else 0

    def feed(self, token: int) -> str:
        piece = b"" if token in self._hidden else self._vocabulary.piece(token)
        if not piece:
            return ""
        if self._first:
            piece = self._vocabulary.piece(token, first=True)
            self._first = False
        if self._tail and piece:
            piece = self._joined(piece)
        return self._stripped(self._utf8.decode(piece))

    def flush(self) -> str:
        return self._stripped(self._utf8.decode(b"", final=True))

    def _incomplete_end(self, prompt: Sequence[int]) -> bytes:
        """The bytes of an unfinished character at the prompt's end; a special token ends one."""
        end = b""
        for token in reversed(prompt):
            if len(end) >= _MAX_CHAR_BYTES or self._vocabulary.is_special(token):
                break
            end = self._vocabulary.piece(token) + end
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        decoder.decode(end[-_MAX_CHAR_BYTES:])
        return decoder.getstate()[0]

    def _joined(self, piece: bytes) -> bytes:
        """The prompt's unfinished character and the output's first bytes; without the former when
        the output does not continue it: its U+FFFD belongs to the prompt."""
        tail, self._tail = self._tail, b""
        try:
            codecs.getincrementaldecoder("utf-8")().decode(tail + piece[:1])
        except UnicodeDecodeError:
            return piece
        return tail + piece

    def _stripped(self, text: str) -> str:
        while self._strips_left and text:
            if not text.startswith(self._strip):
                self._strips_left = 0
                break
            text = text[len(self._strip) :]
            self._strips_left -= 1
        return text

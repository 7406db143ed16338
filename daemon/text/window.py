"""Incremental detokenization for decoders that are not a map of single tokens (WordPiece, CTC, …).

It decodes a short window again with each token and gives out what is new. The window is bounded,
so a model that emits malformed text costs no more than one that does not.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from itertools import islice
from os.path import commonprefix

from quantd.daemon.text.vocabulary import Vocabulary

_CONTEXT_TOKENS = 5
_MAX_PENDING_TOKENS = 8
"""More than the tokens of any character: what is still U+FFFD after so many stays so."""


class WindowDetokenizer:
    def __init__(self, vocabulary: Vocabulary, prompt: Sequence[int], hidden: Set[int]) -> None:
        """hidden: tokens that take no part in the text."""
        self._vocabulary = vocabulary
        self._hidden = hidden
        shown = (token for token in reversed(prompt) if self._is_shown(token))
        self._context = list(islice(shown, _CONTEXT_TOKENS))[::-1]
        self._pending: list[int] = []

    def feed(self, token: int) -> str:
        if not self._is_shown(token):
            return ""
        self._pending.append(token)
        before, after = self._texts()
        if after.endswith("�") and len(self._pending) < _MAX_PENDING_TOKENS:
            return ""
        return self._advance(before, after)

    def flush(self) -> str:
        return self._advance(*self._texts())

    def _texts(self) -> tuple[str, str]:
        return self._decode(self._context), self._decode(self._context + self._pending)

    def _advance(self, before: str, after: str) -> str:
        # The context's own text may change with what follows (a character that the prompt left
        # unfinished), so the common beginning is cut and not a number of characters.
        new = after[len(commonprefix([before, after])) :]
        self._context = (self._context + self._pending)[-_CONTEXT_TOKENS:]
        self._pending = []
        return new

    def _is_shown(self, token: int) -> bool:
        return token not in self._hidden and bool(self._vocabulary.piece(token))

    def _decode(self, tokens: list[int]) -> str:
        # Those that are to be skipped are not among them.
        text: str = self._vocabulary.tokenizer.decode(tokens, skip_special_tokens=False)
        return text

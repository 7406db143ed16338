"""One sequence's output: tokens in, text that may be shown out."""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import NamedTuple

from quantd.daemon.errors import RequestError
from quantd.daemon.text.detokenizer import detokenizer
from quantd.daemon.text.stop import StopMatcher
from quantd.daemon.text.tokenizer import TextModel


class TextDelta(NamedTuple):
    text: str
    """To be appended to what was shown; may be empty."""
    tokens_consumed: int
    """How many of the fed tokens count. Fewer than were fed when a stop string ended the output:
    then the last one that counts is the one that completed the stop string."""
    stopped: str | None = None
    """The stop string that ended the output."""
    offsets: tuple[int, ...] = ()
    """For each consumed token where its text begins, in characters of the output before any stop
    string is cut off (the `text_offset` of completions, from the output's beginning)."""


class OutputText:
    """Detokenizes, looks for stop strings, and holds back what is undecided.

    Deltas depend on how tokens were grouped; their concatenation does not. After `stopped` the
    output is over: further tokens are not consumed.
    """

    def __init__(
        self,
        text_model: TextModel,
        prompt_ids: Sequence[int],
        stop: tuple[str, ...] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        min_tokens: int = 0,
        kept: Set[int] = frozenset(),
    ) -> None:
        """min_tokens: stop strings are looked for only in the text after so many tokens. kept:
        special tokens that are shown also when others are skipped."""
        if not all(stop):
            raise RequestError("stop strings must not be empty", param="stop")
        self._detokenizer = detokenizer(
            text_model.vocabulary,
            prompt_ids,
            skip_special_tokens=skip_special_tokens,
            kept=kept,
        )
        self._matcher = StopMatcher(stop, include_stop=include_stop)
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._num_chars = 0

    def feed(self, tokens: Sequence[int], *, ends_with_stop_token: bool = False) -> TextDelta:
        """ends_with_stop_token: sampling the last token ended the sequence. Its text is shown
        only with include_stop (and, for a special token, if those are not skipped)."""
        parts: list[str] = []
        offsets: list[int] = []
        for i, token in enumerate(tokens):
            if self._matcher.matched is not None:
                break
            offsets.append(self._num_chars)
            hidden = ends_with_stop_token and i == len(tokens) - 1 and not self._include_stop
            parts.append(self._add("" if hidden else self._detokenizer.feed(token)))
        return self._delta(parts, offsets)

    def flush(self) -> TextDelta:
        """The end of the sequence, once: gives out what was held back. Consumes no token; a
        stop string may still match, as incomplete characters become U+FFFD here."""
        if self._matcher.matched is not None:
            return self._delta([], [])
        parts = [self._add(self._detokenizer.flush())]
        if self._matcher.matched is None:
            parts.append(self._matcher.flush())
        return self._delta(parts, [])

    def _add(self, text: str) -> str:
        self._num_tokens += 1
        self._num_chars += len(text)
        return text if self._num_tokens <= self._min_tokens else self._matcher.feed(text)

    def _delta(self, parts: list[str], offsets: list[int]) -> TextDelta:
        return TextDelta("".join(parts), len(offsets), self._matcher.matched, tuple(offsets))

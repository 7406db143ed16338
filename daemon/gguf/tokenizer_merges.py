"""The merges of a BPE vocabulary: read from the file, or found again from the pieces' scores.

SentencePiece stores no merges: it joins the two neighbours whose piece has the greatest score. The
same is said by a list of all pairs of pieces that make a piece, best first, which is how
transformers converts such a model (`generate_merges`).
"""

from __future__ import annotations

import itertools
from collections.abc import Container, Sequence

from quantd.daemon.gguf.reader import GgufError
from quantd.daemon.gguf.tokenizer_metadata import NORMAL, USER_DEFINED, TokenizerMetadata

_MAX_PIECE = 1024
"""Characters; a piece of n is split in n - 1 ways. Real ones stay below 50."""

Merges = list[tuple[str, str]]


def read_merges(merges: Sequence[str]) -> Merges:
    """From "left right". Raises GgufError for one that is not of this form."""
    pairs: Merges = []
    for i, merge in enumerate(merges):
        # A token may begin with a space where the vocabulary is not byte-level.
        at = merge.find(" ", 1)
        if at < 0 or at + 1 == len(merge):
            raise GgufError(f"tokenizer.ggml.merges: number {i} is {merge!r}, must be two tokens")
        pairs.append((merge[:at], merge[at + 1 :]))
    return pairs


def refuse_unknown(merges: Merges, known: Container[str]) -> None:
    """Raises GgufError for the first merge that takes or makes what is no token."""
    for i, (left, right) in enumerate(merges):
        for token in (left, right, left + right):
            if token not in known:
                raise GgufError(
                    f"tokenizer.ggml.merges: number {i} joins {left!r} and {right!r}, but "
                    f"{token!r} is no token"
                )


def derive_merges(metadata: TokenizerMetadata, tokens: Sequence[str]) -> Merges:
    """All pairs of `tokens` that make one, by the score of what they make, the greatest first; of
    equal ones the longer left side first. Raises GgufError when there are no scores to go by."""
    kinds = metadata.types
    pieces = {
        token: i for i, token in enumerate(tokens) if kinds[i] == NORMAL or kinds[i] == USER_DEFINED
    }
    scores = _scores(metadata, pieces)
    longest = max(pieces, key=len, default="")
    if len(longest) > _MAX_PIECE:
        raise GgufError(
            f"tokenizer.ggml.tokens: number {pieces[longest]} has {len(longest)} characters, at "
            f"most {_MAX_PIECE}"
        )

    merges: Merges = []
    ordered = sorted(pieces.items(), key=lambda item: -scores[item[1]])
    for _, group in itertools.groupby(ordered, key=lambda item: scores[item[1]]):
        begin = len(merges)
        for piece, _ in group:
            for at in range(len(piece) - 1, 0, -1):
                left = piece[:at]
                if left in pieces and (right := piece[at:]) in pieces:
                    merges.append((left, right))
        if len(merges) > begin + 1:
            merges[begin:] = sorted(merges[begin:], key=_lengths, reverse=True)
    return merges


def _lengths(pair: tuple[str, str]) -> tuple[int, int]:
    return len(pair[0]), len(pair[1])


def _scores(metadata: TokenizerMetadata, pieces: dict[str, int]) -> Sequence[float]:
    """By id; the greater, the earlier it is made."""
    if metadata.is_gemma:
        # The file has -1000 for the user-defined ones, which come first, all of them equal; the
        # others are in order, and that is exact where their scores are rounded.
        user_defined = (kind == USER_DEFINED for kind in metadata.types)
        return [1 if is_first else -i for i, is_first in enumerate(user_defined)]
    scores = metadata.scores
    if scores is None:
        raise GgufError("tokenizer.ggml.scores is missing, and so is tokenizer.ggml.merges")
    normal = {scores[i] for i in pieces.values() if metadata.types[i] == NORMAL}
    if len(normal) == 1 and len(pieces) > 1:
        raise GgufError(
            f"tokenizer.ggml.scores has {normal.pop()} for every token, which gives no order of "
            "merges; convert the model again"
        )
    if any(score != score for score in scores):
        raise GgufError("tokenizer.ggml.scores must be numbers, and has a NaN")
    return scores

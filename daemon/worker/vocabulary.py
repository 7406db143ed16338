"""How many token ids a model may produce: output layers are padded, tokenizers are not."""

from __future__ import annotations

from pathlib import Path

import msgspec

from quantd.plugins.api import Refused


class _AddedToken(msgspec.Struct):
    id: int


class _Model(msgspec.Struct):
    vocab: dict[str, int] | list[tuple[str, float]] = {}


class _Tokenizer(msgspec.Struct):
    model: _Model
    added_tokens: list[_AddedToken] = []


def sampled_vocab_size(folder: Path, padded: int) -> int:
    """Ids in [0, this) have a meaning: one more than the tokenizer's greatest id, at most `padded`;
    `padded` itself when there is no tokenizer.json."""
    path = folder / "tokenizer.json"
    if not path.exists():
        return padded
    try:
        tokenizer = msgspec.json.decode(path.read_bytes(), type=_Tokenizer)
    except msgspec.DecodeError as error:
        raise Refused(f"{path} is not understood: {error}") from error
    vocab = tokenizer.model.vocab
    greatest = max(vocab.values(), default=-1) if isinstance(vocab, dict) else len(vocab) - 1
    greatest = max(greatest, max((token.id for token in tokenizer.added_tokens), default=-1))
    return min(padded, greatest + 1) if greatest >= 0 else padded

"""A `tokenizers.Tokenizer` from the metadata of a GGUF file, equal to the model's tokenizer.json.

What tokenizer.json says and the file does not: the flags of added tokens (here: matched in the raw
text, no space stripped; Phi-3 is known to strip after its markers), and whether SentencePiece's
space comes before the text only or also after each special token (here: also after, as in
tokenizer.json of Llama 2 and in llama.cpp). BOS and EOS are the caller's: there is no
post-processor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from quantd.daemon.gguf.reader import GgufError
from quantd.daemon.gguf.tokenizer_merges import (
    Merges,
    derive_merges,
    read_merges,
    refuse_unknown,
)
from quantd.daemon.gguf.tokenizer_metadata import (
    BYTE,
    CONTROL,
    UNKNOWN,
    USER_DEFINED,
    TokenizerMetadata,
)
from quantd.daemon.gguf.tokenizer_pre import BYTES, PRE_TOKENIZERS, PreTokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.pre_tokenizers import PreTokenizer as Steps

_SPACE = "▁"
_NEEDED = "".join(map(chr, range(0x21, 0x7F))) + "ĠĊ"
"""Printable ASCII, the space and the line feed, in the byte-level alphabet."""
_PHI3_NOT_STRIPPING = frozenset({"<unk>", "<s>", "<|endoftext|>"})


def build_tokenizer(metadata: TokenizerMetadata) -> Tokenizer:
    """Blocking: a second for the largest vocabularies. Raises GgufError."""
    if metadata.model == "gpt2":
        tokenizer = _byte_level(metadata)
    elif metadata.model == "llama":
        tokenizer = _sentence_piece(metadata)
    else:
        raise GgufError(
            f"tokenizer.ggml.model is {metadata.model!r}, must be one of 'gpt2', 'llama'"
        )
    _add_tokens(tokenizer, metadata)
    return tokenizer


def pre_tokenizer_of(metadata: TokenizerMetadata) -> PreTokenizer:
    """For a byte-level vocabulary. Raises GgufError for a name that is not known."""
    if metadata.pre is not None and metadata.pre in PRE_TOKENIZERS:
        return PRE_TOKENIZERS[metadata.pre]
    stated = "missing" if metadata.pre is None else f"{metadata.pre!r}, which is not supported"
    raise GgufError(
        f"tokenizer.ggml.pre is {stated}; it must be one of {', '.join(sorted(PRE_TOKENIZERS))}"
    )


def adds_bos(metadata: TokenizerMetadata) -> bool:
    """Does the tokenizer put BOS before a text? Where the file is silent, the family decides."""
    if metadata.add_bos is not None:
        return metadata.add_bos
    return metadata.model == "llama" or pre_tokenizer_of(metadata).adds_bos


def _byte_level(metadata: TokenizerMetadata) -> Tokenizer:
    from tokenizers import decoders, normalizers

    pre = pre_tokenizer_of(metadata)
    if metadata.merges is None:
        raise GgufError("tokenizer.ggml.merges is missing")
    vocab = _vocab(metadata, metadata.tokens)
    _refuse_missing_bytes(vocab)
    merges = read_merges(metadata.merges)
    tokenizer = _bpe(vocab, merges, ignore_merges=pre.ignore_merges)
    if pre.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _steps(pre)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _bpe(vocab: dict[str, int], merges: Merges, **options: Any) -> Tokenizer:
    from tokenizers import Tokenizer, models

    try:
        return Tokenizer(models.BPE(vocab, merges, **options))
    except Exception as error:  # the library raises bare Exception, for an unknown token mostly
        refuse_unknown(merges, vocab)
        raise GgufError(f"the tokenizer cannot be built: {error}") from error


def _steps(pre: PreTokenizer) -> Steps:
    from tokenizers import Regex, pre_tokenizers

    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
            if step == BYTES
            else pre_tokenizers.Split(Regex(step), behavior="isolated")
            for step in pre.steps
        ]
    )


def _sentence_piece(metadata: TokenizerMetadata) -> Tokenizer:
    from tokenizers import decoders, normalizers

    tokens = _spelled_pieces(metadata)
    vocab = _vocab(metadata, tokens)
    merges = (
        derive_merges(metadata, tokens) if metadata.merges is None else read_merges(metadata.merges)
    )
    unknown = _unknown_token(metadata, tokens)
    tokenizer = _bpe(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    prefix = metadata.add_space_prefix
    if prefix is None:
        prefix = not metadata.is_gemma
    spaces = normalizers.Replace(" ", _SPACE)
    tokenizer.normalizer = (
        normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if prefix else spaces
    )
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    steps += [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _spelled_pieces(metadata: TokenizerMetadata) -> Sequence[str]:
    """Gemma's runs of spaces are written with spaces in the file, and are ▁ to the tokenizer."""
    if not metadata.is_gemma:
        return metadata.tokens
    known = frozenset(metadata.tokens)
    spelled: list[str] = []
    for token in metadata.tokens:
        run = _SPACE * len(token) if token and not token.strip(" ") else token
        spelled.append(token if run in known else run)
    return spelled


def _unknown_token(metadata: TokenizerMetadata, tokens: Sequence[str]) -> str | None:
    """Raises GgufError when a character that is no token could be lost."""
    number = metadata.ids.get("unk_token")
    if number is None:
        number = next((i for i, kind in enumerate(metadata.types) if kind == UNKNOWN), None)
    num_bytes = sum(kind == BYTE for kind in metadata.types)
    if number is None and num_bytes < 256:
        raise GgufError(
            f"tokenizer.ggml.token_type marks {num_bytes} tokens as bytes, must be 256 where there "
            "is no unknown token"
        )
    return None if number is None else tokens[number]


def _vocab(metadata: TokenizerMetadata, tokens: Sequence[str]) -> dict[str, int]:
    """Without gaps: padding between tokens stays, and no text leads there."""
    return {token: i for i, token in enumerate(tokens[: metadata.vocab_size])}


def _refuse_missing_bytes(vocab: Mapping[str, int]) -> None:
    """Bytes that are no token are dropped from a text. Real vocabularies do without some of the
    control characters and of the lead bytes of private use, but not without these."""
    lost = [char for char in _NEEDED if char not in vocab]
    if lost:
        raise GgufError(
            f"tokenizer.ggml.tokens lacks {len(lost)} characters of the byte-level alphabet, of "
            f"them {lost[0]!r}"
        )


def _add_tokens(tokenizer: Tokenizer, metadata: TokenizerMetadata) -> None:
    """Control tokens are special: skipped in an answer's text. User-defined ones are text that is
    always one token."""
    from tokenizers import AddedToken

    strips = metadata.architecture == "phi3" and metadata.model == "llama"
    tokens = _spelled_pieces(metadata) if metadata.model == "llama" else metadata.tokens
    special: list[AddedToken] = []
    plain: list[AddedToken] = []
    for i, kind in enumerate(metadata.types):
        token = tokens[i]
        if kind not in (CONTROL, UNKNOWN, USER_DEFINED) or not token or i in metadata.padding:
            continue
        rstrip = strips and token not in _PHI3_NOT_STRIPPING
        is_special = kind != USER_DEFINED
        added = AddedToken(token, rstrip=rstrip, normalized=False, special=is_special)
        (special if is_special else plain).append(added)
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(plain)

"""How byte-level vocabularies cut a text into words before merging, by tokenizer.ggml.pre.

The file has a name only; what it stands for is in the tokenizer.json of the model that the name
was given for, and in llama.cpp's src/llama-vocab.cpp. A name is here when both are known to agree.
Patterns are in Oniguruma's syntax, as tokenizer.json has them; digits are \\p{N} there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

BYTES = ""
"""A step: from here on each byte is one character of the byte-level alphabet."""


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    steps: tuple[str, ...]
    """In order: patterns whose matches stand alone; BYTES once."""
    nfc: bool = False
    """Is the text brought into the composed form first?"""
    ignore_merges: bool = False
    """Is a word that is a token taken whole, though merging would not lead there?"""
    adds_bos: bool = False
    """What add_bos_token means where the file does not say."""


_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CL100K = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _SPACES
)
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _SPACES
_QWEN35 = (
    _CONTRACTIONS
    + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    + _SPACES
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"
_TEKKEN = (
    f"{_BEFORE}{_UPPER}*{_LOWER}+|{_BEFORE}{_UPPER}+{_LOWER}*"
    + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*"
    + _SPACES
)
_O200K = (
    f"{_BEFORE}{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|{_BEFORE}{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*"
    + _SPACES
)
_DEEPSEEK_LETTERS = (
    "41-5a 61-7a b5 c0-d6 d8-f6 f8-1ba 1bc-1bf 1c4-293 295-2af 370-373 376 377 37b-37d 37f "
    "386 388-38a 38c 38e-3a1 3a3-3f5 3f7-481 48a-52f 531-556 10a0-10c5 13a0-13f5 13f8-13fd "
    "1c90-1cba 1cbd-1cbf 1d00-1d2b 1d6b-1d77 1d79-1d9a 1e00-1f15 1f18-1f1d 1f20-1f45 "
    "1f48-1f4d 1f50-1f57 1f59 1f5b 1f5d 1f5f-1f7d 1f80-1fb4 1fb6-1fbc 1fbe 1fc2-1fc4 "
    "1fc6-1fcc 1fd0-1fd3 1fd6-1fdb 1fe0-1fec 1ff2-1ff4 1ff6-1ffc 2102 2107 210a-2113 2115 "
    "2119-211d 2124 2126 2128 212a-212d 212f-2134 2139 213c-213f 2145-2149 214e 2183 2184 "
    "2c00-2c7b 2c7e-2ce4 2ceb-2cee 2cf2 2cf3 a640-a66d a680-a69b a722-a76f a771-a787 "
    "a78b-a78e ab70-abbf fb00-fb06 fb13-fb17 ff21-ff3a ff41-ff5a 10400-1044f 104b0-104d3 "
    "104d8-104fb 10c80-10cb2 10cc0-10cf2 118a0-118df 1e900-1e943 "
)
"""Ranges of code points: the letters with two cases, as of the Unicode of the time."""


def _char_class(ranges: str) -> str:
    """The inside of a class, from hexadecimal ranges: many of these characters look alike."""
    return "".join(
        "-".join(chr(int(end, 16)) for end in part.split("-")) for part in ranges.split()
    )


# The third step takes ASCII letters out of words once more (:-~ has them), as published.
_DEEPSEEK_LLM = (
    r"[\r\n]",
    rf"\s?[{_char_class(_DEEPSEEK_LETTERS)}]+",
    r"\s?[!-/:-~" + _char_class("ff01-ff0f ff1a-ff5e 2018-201f 3000-3002") + r"]+",
    r"\s+$",
    f"[{_char_class('4e00-9fa5 800-4e00 ac00-d7ff')}]+",
    r"\p{N}",
    BYTES,
)
_DEEPSEEK_CODER = (
    r"[\r\n]",
    r"\s?\p{L}+",
    r"\s?\p{P}+",
    f"[{_char_class('4e00-9fa5 800-4e00 ac00-d7ff')}]+",
    r"\p{N}",
    BYTES,
)
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    f"[{_char_class('4e00-9fa5 3040-309f 30a0-30ff')}]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*" + _SPACES,
    BYTES,
)

_gpt2 = PreTokenizer((_GPT2, BYTES))
_digits = PreTokenizer((r"\p{N}", _GPT2, BYTES))
_cl100k = PreTokenizer((_CL100K, BYTES))
_llama3 = replace(_cl100k, ignore_merges=True, adds_bos=True)
_qwen2 = PreTokenizer((_QWEN2, BYTES), nfc=True)
_o200k = PreTokenizer((_O200K, BYTES))

PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {
    "gpt-2": _gpt2,
    "phi-2": _gpt2,
    "mpt": replace(_gpt2, nfc=True),
    "olmo": replace(_gpt2, nfc=True),
    "smollm": _digits,
    "starcoder": _digits,
    "refact": _digits,
    "command-r": replace(_digits, nfc=True),
    # In falcon's tokenizer.json digits are looked for in the byte-level text.
    "falcon": PreTokenizer(
        (r"[\p{P}$+<=>^~|`]+", _GPT2, BYTES, r"\p{N}+", "[0-9][0-9][0-9]"),
    ),
    "llama-bpe": _llama3,
    "llama3": _llama3,
    "llama-v3": _llama3,
    "falcon3": _llama3,
    "pixtral": _llama3,
    "lfm2": _llama3,
    "smaug-bpe": _cl100k,
    "dbrx": _cl100k,
    "chatglm-bpe": _cl100k,
    "glm4": replace(_cl100k, ignore_merges=True),
    "qwen2": _qwen2,
    "deepseek-r1-qwen": _qwen2,
    "qwen35": PreTokenizer((_QWEN35, BYTES), nfc=True),
    "tekken": PreTokenizer((_TEKKEN, BYTES), ignore_merges=True, adds_bos=True),
    "gpt-4o": _o200k,
    "llama4": _o200k,
    "deepseek-llm": PreTokenizer(_DEEPSEEK_LLM),
    "deepseek-coder": PreTokenizer(_DEEPSEEK_CODER),
    "deepseek-v3": PreTokenizer(_DEEPSEEK_V3),
}

"""Text as rules see it: without case, accents, invisible characters and look-alikes.

Each character is normalized by itself, so a text may be split anywhere: the normalized pieces add
up to the normalized text. Numbers keep their digits, in ASCII; white space stays white space.
"""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_right

from quantd.daemon.safety.confusables import read_as

_ASCII_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1b\x7f]")
_DROPPED = (
    # Combining marks that belong to no script: accents, strokes through letters, "Zalgo".
    *((0x0300, 0x0370), (0x1AB0, 0x1B00), (0x1DC0, 0x1E00), (0x20D0, 0x2100), (0xFE20, 0xFE30)),
    # Invisible though they are letters, marks or symbols by their category.
    *((0x115F, 0x1161), (0x17B4, 0x17B6), (0x180B, 0x1810), (0x2800, 0x2801), (0x3164, 0x3165)),
    *((0xFE00, 0xFE10), (0xFFA0, 0xFFA1), (0xE0000, 0xE1000)),
)
"""Half-open ranges, in order."""
_STARTS = [start for start, _ in sorted(_DROPPED)]
_STOPS = [stop for _, stop in sorted(_DROPPED)]
_MAX_CACHED = 1 << 14


class _Table(dict[str, str]):
    """Character → what it becomes, filled as characters come; bounded, as there are a million."""

    def __missing__(self, char: str) -> str:
        if len(self) >= _MAX_CACHED:
            self.clear()
        made = self[char] = _fold(char)
        return made


_TABLE = _Table()


def normalize(text: str) -> str:
    if text.isascii() and not _ASCII_CONTROL.search(text):
        return text.lower()
    return "".join(map(_TABLE.__getitem__, text))


def normalize_at(text: str, offset: int) -> tuple[str, list[int] | range]:
    """The same, and for each character of it where in `text`, counted from `offset`, it is from."""
    if text.isascii() and not _ASCII_CONTROL.search(text):
        return text.lower(), range(offset, offset + len(text))
    pieces = [_TABLE[char] for char in text]
    at = [offset + i for i, piece in enumerate(pieces) for _ in piece]
    return "".join(pieces), at


def _fold(char: str) -> str:
    if char.isspace():
        return char if char.isascii() else "\n" if char in "\x85\u2028\u2029" else " "
    if _is_dropped(char):
        return ""
    return "".join(
        _fold_one(part) for part in unicodedata.normalize("NFKD", char) if not _is_dropped(part)
    )


def _fold_one(char: str) -> str:
    if unicodedata.category(char) == "Cs":
        return "\ufffd"  # half of a pair: no text, and RE2 takes none
    digit = unicodedata.decimal(char, None)
    if digit is not None:
        return str(digit)
    return "".join(read_as(folded) for folded in char.casefold())


def _is_dropped(char: str) -> bool:
    code = ord(char)
    place = bisect_right(_STARTS, code) - 1
    if place >= 0 and code < _STOPS[place]:
        return True
    return not char.isspace() and unicodedata.category(char) in ("Cc", "Cf")

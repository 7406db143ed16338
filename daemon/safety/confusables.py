"""Characters that look like Latin letters: which letter each is read as.

Only what is read as one lower-case ASCII letter is here; Unicode's compatibility forms (full width,
mathematical alphabets, circled letters) are taken back by NFKD, and variants of Latin letters are
told by their names. A class of look-alikes has to stay one through case folding, so a letter of
which only the capital looks Latin (В, Н, Т) is mapped in both cases. Unicode's own table (UTS #39,
9 000 rows) also equates 0 with O and 1 with l, which patterns of numbers cannot use.
"""

from __future__ import annotations

import re
import unicodedata

_LOOKS = {
    "a": "аαɑ",
    "b": "вβƅ",
    "c": "сϲ",
    "d": "ԁ",
    "e": "еєε",
    "g": "ɡցґ",
    "h": "нһհ",
    "i": "іιıɩӏ",
    "j": "јȷյ",
    "k": "кκ",
    "l": "ⅼ",
    "m": "м",
    "n": "ηոп",
    "o": "оοօσ",
    "p": "рρ",
    "q": "ԛզգ",
    "s": "ѕꜱ",
    "t": "тτ",
    "u": "υսʋμ",
    "v": "νѵ",
    "w": "ԝωѡ",
    "x": "хχ",
    "y": "уγү",
    "z": "ζ",
}
"""Letter → Cyrillic, Greek and Armenian letters, and Latin ones whose names do not tell."""
_READ_AS = {look: letter for letter, looks in _LOOKS.items() for look in looks}
_NAMED = re.compile(
    r"LATIN (?:SMALL LETTER|CAPITAL LETTER|LETTER SMALL CAPITAL) ([A-Z])(?: WITH .*)?"
    r"|(?:NEGATIVE |CROSSED )?(?:SQUARED|CIRCLED) LATIN CAPITAL LETTER ([A-Z])"
    r"|REGIONAL INDICATOR SYMBOL LETTER ([A-Z])"
)


def read_as(char: str) -> str:
    """The ASCII letter that a case-folded character is read as, else the character itself."""
    letter = _READ_AS.get(char)
    if letter is not None:
        return letter
    named = _NAMED.fullmatch(unicodedata.name(char, ""))
    if named is None:
        return char
    return (named[1] or named[2] or named[3]).lower()

"""JSON as it is written, piece by piece: what its escapes mean, and where its strings are."""

from __future__ import annotations

import re

from quantd.daemon.safety.normalize import normalize, normalize_at

_PAIR = r"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"
_ESCAPE = re.compile(_PAIR + r"|\\u[0-9a-fA-F]{4}|\\[^u]", re.DOTALL)
_UNFINISHED = re.compile(
    r"\\(u[0-9a-fA-F]{0,3}|u[dD][89abAB][0-9a-fA-F]{2}(\\(u[0-9a-fA-F]{0,3})?)?)?"
)
_SHORT = {"n": "\n", "t": "\t", "r": "\r", "b": "", "f": "\f"}


class JsonReader:
    """One text; places are counted from its beginning."""

    def __init__(self) -> None:
        self._unread = ""
        """The beginning of an escape, the last that was read."""
        self._start = 0
        """Of `_unread`."""
        self._quotes: list[int] = []
        """Those that begin and end strings, as far as they are remembered."""
        self._is_quoted = False
        """Where memory begins."""

    def read(self, text: str, start: int) -> tuple[str, list[int]]:
        """Normalized, and for each character of it where it is from."""
        text, start = self._unread + text, start - len(self._unread)
        self._unread = ""
        return self._read(text, start, is_end=False)

    def flush(self) -> tuple[str, list[int]]:
        text, self._unread = self._unread, ""
        return self._read(text, self._start, is_end=True)

    def _read(self, text: str, start: int, *, is_end: bool) -> tuple[str, list[int]]:
        pieces: list[str] = []
        at: list[int] = []
        position = 0
        while position < len(text):
            if text[position] != "\\":
                slash = text.find("\\", position)
                stop = len(text) if slash < 0 else slash
                seen, places = self._plain(text[position:stop], start + position)
            elif not is_end and _UNFINISHED.fullmatch(text, position):
                self._unread, self._start = text[position:], start + position
                break
            else:
                escape = _ESCAPE.match(text, position)
                written = escape[0] if escape else "\\"
                seen = normalize(_meaning(written))
                places = [start + position] * len(seen)
                stop = position + len(written)
            pieces.append(seen)
            at += places
            position = stop
        return "".join(pieces), at

    def _plain(self, text: str, start: int) -> tuple[str, list[int] | range]:
        quote = text.find('"')
        while quote >= 0:
            self._quotes.append(start + quote)
            quote = text.find('"', quote + 1)
        return normalize_at(text, start)

    def is_quoted(self, place: int) -> bool:
        """It is inside of a string."""
        return self._is_quoted ^ (sum(quote < place for quote in self._quotes) % 2 == 1)

    def crosses(self, start: int, stop: int) -> bool:
        """A string begins or ends in [start, stop)."""
        return any(start <= quote < stop for quote in self._quotes)

    def forget(self, place: int) -> None:
        """Nothing before it is asked for any more."""
        self._is_quoted = self.is_quoted(place)
        self._quotes = [quote for quote in self._quotes if quote >= place]


def _meaning(escape: str) -> str:
    """Of one that is whole; a lone half of a pair is no text and stays one."""
    if escape[1:2] != "u":
        return _SHORT.get(escape[1:], escape[1:])
    units = [int(escape[i + 2 : i + 6], 16) for i in range(0, len(escape), 6)]
    if len(units) == 1:
        return chr(units[0])
    return chr(0x10000 + ((units[0] - 0xD800) << 10) + (units[1] - 0xDC00))

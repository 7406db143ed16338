"""Personal data that has a form: a pattern for each kind, and a check for what that leaves open.

Patterns are for normalized text, in RE2's syntax; group 1 is what was found. A form is strict
rather than wide: a number without any sign of what it is (a date, an order's number) is none.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from typing import NamedTuple

Check = Callable[[str], int]
"""From the text of group 1 to how much of it was really found, in characters; 0: nothing."""


class Detector(NamedTuple):
    pattern: str
    span: int
    """Most characters that group 1 can have."""
    chars: str = ""
    """All that group 1 can consist of, when they are few enough to tell that it has ended."""
    check: Check | None = None


_DIGITS = "0123456789"
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_BEFORE, _AFTER = r"(?:^|[^\pL\pN])", r"(?:$|[^\pL\pN])"

_IBAN_LENGTHS = {
    **dict.fromkeys(("no",), 15),
    **dict.fromkeys(("be",), 16),
    **dict.fromkeys(("dk", "fi", "fo", "gl", "nl", "sd"), 18),
    **dict.fromkeys(("mk", "si"), 19),
    **dict.fromkeys(("at", "ba", "ee", "kz", "lt", "lu", "xk"), 20),
    **dict.fromkeys(("ch", "cr", "hr", "li", "lv"), 21),
    **dict.fromkeys(("bg", "bh", "de", "gb", "ge", "ie", "me", "rs", "va"), 22),
    **dict.fromkeys(("ae", "gi", "il", "iq", "om", "so", "tl"), 23),
    **dict.fromkeys(("ad", "cz", "es", "md", "pk", "ro", "sa", "se", "sk", "tn", "vg"), 24),
    **dict.fromkeys(("ly", "pt", "st"), 25),
    **dict.fromkeys(("is", "tr"), 26),
    **dict.fromkeys(("bi", "dj", "fr", "gr", "it", "mc", "mr", "sm"), 27),
    **dict.fromkeys(("al", "az", "by", "cy", "do", "gt", "hu", "lb", "ni", "pl", "sv"), 28),
    **dict.fromkeys(("br", "eg", "ps", "qa", "ua"), 29),
    **dict.fromkeys(("jo", "kw", "mu", "ye"), 30),
    **dict.fromkeys(("mt", "sc"), 31),
    **dict.fromkeys(("lc",), 32),
    **dict.fromkeys(("ru",), 33),
}
"""ISO 13616: a country's letters → characters."""


def _iban(text: str) -> int:
    length = _IBAN_LENGTHS.get(text[:2], 0)
    ends = [i + 1 for i, char in enumerate(text) if char != " "]
    if not length or len(ends) < length:
        return 0
    end = ends[length - 1]
    if text[end : end + 1] not in ("", " "):
        return 0
    code = text[:end].replace(" ", "")
    number = "".join(str(int(char, 36)) for char in code[4:] + code[:4])
    return end if int(number) % 97 == 1 else 0


_CARDS = re.compile(
    r"4\d{12}(\d{3}){0,2}"  # Visa
    r"|5[1-5]\d{14}|2[2-7]\d{14}"  # Mastercard
    r"|3[47]\d{13}|3[068]\d{12}|35\d{14}"  # American Express, Diners, JCB
    r"|6(?:011|5\d\d|4[4-9]\d|2\d\d)\d{12,15}",  # Discover, UnionPay
    re.ASCII,
)


def _card(text: str) -> int:
    number = text.replace(" ", "").replace("-", "")
    if not _CARDS.fullmatch(number):
        return 0
    total = 0
    for place, digit in enumerate(map(int, reversed(number))):
        total += digit if place % 2 == 0 else digit * 2 - 9 * (digit > 4)
    return len(text) if total % 10 == 0 else 0


def _ssn(text: str) -> int:
    area, group, serial = text.split("-")
    is_given = area not in ("000", "666") and area < "900" and group != "00" and serial != "0000"
    return len(text) if is_given else 0


def _ip(text: str) -> int:
    """The pattern wants three colons of IPv6: a::b is also C++, and 10:30:15 a time."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return 0
    return len(text)


DETECTORS = {
    "email": Detector(
        r"(?:^|[^a-z0-9._%+-])([a-z0-9][a-z0-9._%+-]{0,63}@(?:[a-z0-9-]{1,63}\.){1,6}[a-z]{2,24})"
        r"(?:$|[^a-z0-9-])",
        span=254,
        chars=_LETTERS + _DIGITS + "._%+-@",
    ),
    "phone": Detector(
        _BEFORE + r"(\+[1-9](?:[ ./()-]{0,2}[0-9]){7,14}"
        r"|(?:\([2-9][0-9]{2}\) ?|[2-9][0-9]{2}[ .-])[0-9]{3}[ .-][0-9]{4})" + _AFTER,
        span=44,
        chars=_DIGITS + "+ ./()-",
    ),
    "iban": Detector(
        _BEFORE + r"([a-z]{2}[0-9]{2}(?: ?[a-z0-9]){11,29})" + _AFTER, span=62, check=_iban
    ),
    "card": Detector(
        _BEFORE + r"([2-6](?:[ -]?[0-9]){12,18})" + _AFTER,
        span=37,
        chars=_DIGITS + " -",
        check=_card,
    ),
    "ip": Detector(
        r"(?:^|[^\pL\pN.:])((?:[0-9]{1,3}\.){3}[0-9]{1,3}|[0-9a-f]{0,4}(?::[0-9a-f]{0,4}){3,7})"
        r"(?:$|[^\pL\pN:])",
        span=39,
        chars=_DIGITS + "abcdef.:",
        check=_ip,
    ),
    "ssn": Detector(
        r"(?:^|[^\pL\pN-])([0-9]{3}-[0-9]{2}-[0-9]{4})(?:$|[^\pL\pN-])",
        span=11,
        chars=_DIGITS + "-",
        check=_ssn,
    ),
}

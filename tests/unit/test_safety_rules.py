"""Words, patterns and personal data: what is found, and what is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantd.daemon.safety.normalize import normalize, normalize_at
from quantd.daemon.safety.pii import DETECTORS
from quantd.daemon.safety.rules import BadRule, Rule, RuleSet, pattern_rule, pii_rule, word_rules
from quantd.daemon.safety.screen import Screen
from quantd.daemon.safety.stream import StreamFilter

BENIGN = Path(__file__).parents[1] / "fixtures" / "benign.txt"
WORDS = (
    *("anal", "arse", "ass", "butt", "clit", "cock", "cunt", "dick", "homo", "nazi", "penis"),
    *("rape", "sex", "shit", "tit", "fuck", "cum", "hell no", "bad thing"),
)


def found(rules: list[Rule], text: str) -> list[str]:
    """The pieces of the text that are found."""
    seen, at = normalize_at(text, 0)
    at = [*at, len(text)]
    matches = RuleSet(rules).find(seen, [0] * len(rules), len(seen), True)
    return [text[at[match.start] : at[match.stop]] for match in matches]


def words(*given: str) -> list[Rule]:
    return word_rules("w", given)


def test_whole_words_only() -> None:
    assert found(words("ass"), "assess the ass, a pass! ASS?") == ["ass", "ASS"]
    assert found(words("ass"), "ass") == ["ass"]
    assert found(words("ass"), "ass ass") == ["ass", "ass"]
    assert found(words("ass"), "ass_x xass ass1") == []


def test_phrases_over_any_white_space() -> None:
    assert found(words("bad thing"), "a bad\n  thing. bad-thing") == ["bad\n  thing"]


def test_the_longest_phrase_wins() -> None:
    assert found(words("bad", "bad thing"), "bad thing, bad things") == ["bad thing", "bad"]


def test_disguises() -> None:
    text = "b\u0430d, b\u200ba\u200bd, \uff22\uff21\uff24, b\u0336a\u0336d\u0336, b\u00e4d, b4d"
    assert len(found(words("bad"), text)) == 5


def test_a_word_in_any_disguise_is_the_same_rule() -> None:
    assert found(words("B\u00c4\u0500\u200b"), "bad") == ["bad"]


def test_scripts_without_spaces_are_found_inside() -> None:
    assert found(words("\u574f\u8bdd"), "\u8fd9\u662f\u574f\u8bdd\u5417") == ["\u574f\u8bdd"]


def test_words_with_signs() -> None:
    assert found(words("c++", ".net"), "c++ and .NET, c++11") == ["c++", ".NET"]


def test_a_word_without_anything_visible_is_refused() -> None:
    with pytest.raises(BadRule, match="no visible character"):
        words("\u200b")


def test_patterns() -> None:
    rules = [pattern_rule("p", r"project[ -]\d+|(?P<name>x)y{2}", 32)]
    assert found(rules, "Project-7, PROJECT 12, xyy") == ["Project-7", "PROJECT 12", "xyy"]


def test_a_pattern_has_no_longer_match_than_its_span() -> None:
    rules = [pattern_rule("p", "a[^b]*b", 5)]
    assert found(rules, "a123b a1234b aa12b") == ["a123b", "aa12b"]
    assert found(rules, "a12345a12b") == ["a12b"]


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("(?=x)", "invalid perl operator"),
        (r"(a)\1", "invalid escape sequence"),
        ("(", "missing \\)"),
        ("x*", "matches the empty text"),
        ("a{2000}", "invalid repetition size"),
    ],
)
def test_bad_patterns(pattern: str, reason: str) -> None:
    with pytest.raises(BadRule, match=reason):
        pattern_rule("p", pattern, 32)


PII = {
    "email": ["jane.doe+x@mail.example.co.uk", "A_B%c@x-y.org"],
    "phone": ["+49 171 1234567", "+1 (415) 555-2671", "(415) 555-2671", "415-555-2671"],
    "iban": ["DE89 3704 0044 0532 0130 00", "gb82west12345698765432", "NL91ABNA0417164300"],
    "card": ["4111 1111 1111 1111", "5555-5555-5555-4444", "378282246310005"],
    "ip": ["10.0.0.1", "2001:db8:0:0:1:0:0:1", "fe80::1:2:3"],
    "ssn": ["123-45-6789"],
}


@pytest.mark.parametrize("kind", PII)
def test_personal_data(kind: str) -> None:
    rules = [pii_rule("x", kind)]
    for given in PII[kind]:
        assert found(rules, given) == [given]
        assert found(rules, f"It is {given}, or ({given}).") == [given, given]
        assert found(rules, f"x{given}y") == [] or kind == "email"


def test_every_kind_that_the_configuration_knows() -> None:
    from quantd.daemon.config.safety import PII_KINDS

    assert set(PII) == set(DETECTORS) == set(PII_KINDS)


def test_personal_data_beside_other_numbers() -> None:
    assert found([pii_rule("x", "card")], "12 4111 1111 1111 1111 x") == ["4111 1111 1111 1111"]
    assert found([pii_rule("x", "iban")], "IBAN DE89 3704 0044 0532 0130 00 is mine") == [
        "DE89 3704 0044 0532 0130 00"
    ]
    assert found([pii_rule("x", "email")], "a@b.com.") == ["a@b.com"]


def test_digits_of_any_script() -> None:
    text = "\uff11\uff12\uff13-\u0664\u0665-6789"
    assert found([pii_rule("x", "ssn")], text) == [text]


def test_nothing_is_found_in_benign_text() -> None:
    rules = [*word_rules("c", WORDS), *(pii_rule("c", kind) for kind in DETECTORS)]
    for line in BENIGN.read_text("utf-8").splitlines():
        assert found(rules, line) == [], line


@pytest.mark.parametrize(
    "pattern",
    [r"(a+)+$", r"(a|aa)+b", r"(x+x+)+y", r"(?:.*a){12}q", r"^(([a-z])+.)+[A-Z]([a-z])+$"],
)
@pytest.mark.parametrize("char", ["a", "x"])
def test_a_pattern_that_backtracks_is_linear(pattern: str, char: str) -> None:
    """An engine that tries one way after the other would not end before the sun does."""
    rules = RuleSet([pattern_rule("p", pattern, 128)])
    text = char * (1 << 20) + "!"
    assert rules.is_clean(normalize(text))
    stream = StreamFilter(Screen({"p": "block"}, rules))
    assert stream.feed(text) + stream.flush() == text


def test_a_large_list() -> None:
    rules = word_rules("w", [f"word{i}x" for i in range(20_000)])
    assert found(rules, "word1x word19999x word20000x word1xx") == ["word1x", "word19999x"]

"""Text as rules see it, and where each character of it is from."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantd.daemon.safety.json_text import JsonReader
from quantd.daemon.safety.normalize import normalize, normalize_at


@pytest.mark.parametrize(
    "text",
    [
        "Secret",
        "SECRET",
        "s\u200be\u2060c\ufeffr\u00ade\u200dt",  # zero width
        "s\u0336e\u0336c\u0336r\u0336e\u0336t\u0336",  # struck through
        "\uff53\uff45\uff43\uff52\uff45\uff54",  # full width
        "\U0001d42c\U0001d41e\U0001d41c\U0001d42b\U0001d41e\U0001d42d",  # mathematical
        "\u24e2\u24d4\u24d2\u24e1\u24d4\u24e3",  # circled
        "\U0001f142\U0001f134\U0001f132\U0001f141\U0001f134\U0001f143",  # in squares
        "\u0455\u0435\u0441r\u0435\u0442",  # Cyrillic
        "s\u03b5cr\u03b5\u03c4",  # Greek
        "s\u00e9cr\u00eat",  # accents
        "se\u0301cre\u0302t",
        "\ua731\u1d07\u1d04\u0280\u1d07\u1d1b",  # small capitals
        "se\x00cr\x1bet",  # control characters
        "s\U000e0065ecret",  # tags
    ],
)
def test_what_looks_like_a_word_is_that_word(text: str) -> None:
    assert normalize(text) == "secret"


def test_numbers_and_white_space_stay() -> None:
    assert normalize("0O1l \t\n") == "0o1l \t\n"
    assert normalize("\u0661\u0662\uff13\u00a0\u2003\u2028") == "123  \n"


def test_scripts_keep_what_tells_their_words_apart() -> None:
    assert normalize("\u0e01\u0e34") != normalize("\u0e01\u0e35")  # Thai vowels are marks
    assert normalize("\u0915\u093f") != normalize("\u0915\u0941")  # so are Devanagari's


def test_half_of_a_pair_is_no_text() -> None:
    assert normalize("a\ud800b") == "a\ufffdb"


@given(st.text(), st.integers(0, 9))
def test_pieces_add_up(text: str, cut: int) -> None:
    assert normalize(text[:cut]) + normalize(text[cut:]) == normalize(text)


@given(st.text(), st.integers(0, 1000))
def test_each_character_is_from_somewhere(text: str, offset: int) -> None:
    seen, at = normalize_at(text, offset)
    assert seen == normalize(text) and len(seen) == len(at)
    assert list(at) == sorted(at)
    for char, place in zip(seen, at, strict=True):
        assert char in normalize(text[place - offset])


def read_json(written: str, cuts: set[int]) -> tuple[str, list[int], JsonReader]:
    reader = JsonReader()
    seen, at = "", []
    edges = [0, *sorted(cut for cut in cuts if cut < len(written)), len(written)]
    for start, stop in zip(edges, edges[1:], strict=False):
        text, places = reader.read(written[start:stop], start)
        seen, at = seen + text, at + places
    text, places = reader.flush()
    return seen + text, at + places, reader


@given(st.text(), st.booleans(), st.sets(st.integers(0, 40)))
def test_json_is_read_through_its_escapes(text: str, is_ascii: bool, cuts: set[int]) -> None:
    text = text.encode("utf-8", "replace").decode()
    written = json.dumps({"k": text}, ensure_ascii=is_ascii)
    seen, at, reader = read_json(written, cuts)
    inner = normalize(text)
    assert seen == '{"k": "' + inner + '"}'
    assert at == sorted(at)
    start = written.index(": ") + 3
    assert all(reader.is_quoted(place) for place in at if start <= place < len(written) - 2)
    assert not reader.is_quoted(0) and not reader.is_quoted(len(written) - 1)


@given(st.text(alphabet='\\u0d83eabc"n{', max_size=24), st.sets(st.integers(0, 24)))
def test_broken_json_reads_the_same_in_any_pieces(written: str, cuts: set[int]) -> None:
    whole, pieces = read_json(written, set()), read_json(written, cuts)
    assert whole[:2] == pieces[:2]

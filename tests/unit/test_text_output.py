"""OutputText: tokens to shown text, with stop strings, alignment and offsets."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from quantd.daemon.errors import RequestError
from quantd.daemon.text import OutputText, TextDelta, TextModel
from quantd.daemon.text.checkpoint import read_text_files

EOS = 256


def text_model() -> TextModel:
    """Ids 0 to 255 are bytes, 256 is EOS, 257 the word " END " as one token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(dict(zip(byte_order(alphabet), range(256), strict=True)), []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.add_tokens([AddedToken(" END ", normalized=False)])
    return TextModel(tokenizer, read_text_files(Path("/nonexistent")), max_context=100)


def byte_order(alphabet: list[str]) -> list[str]:
    """The byte-level alphabet in the order of its bytes: the printable ones are themselves."""
    others = iter(char for char in alphabet if ord(char) > 0xFF)
    own = {ord(char): char for char in alphabet if ord(char) <= 0xFF}
    return [own[byte] if byte in own else next(others) for byte in range(256)]


MODEL = text_model()


def feed_all(output: OutputText, groups: list[list[int]]) -> tuple[str, int, str | None]:
    text, consumed = "", 0
    for group in groups:
        delta = output.feed(group)
        text += delta.text
        consumed += delta.tokens_consumed
        if delta.stopped is not None:
            return text, consumed, delta.stopped
    delta = output.flush()
    return text + delta.text, consumed, delta.stopped


def grouped(ids: list[int], cuts: list[int]) -> list[list[int]]:
    points = sorted({0, len(ids), *(cut % (len(ids) + 1) for cut in cuts)})
    return [ids[a:b] for a, b in zip(points, points[1:], strict=False)]


def test_the_model_is_bytes() -> None:
    assert [MODEL.token_bytes(i) for i in range(256)] == [bytes([i]) for i in range(256)]
    assert MODEL.encode("é</s>") == [0xC3, 0xA9, EOS]


@given(
    st.text("ab世ZNED ", max_size=20),
    st.lists(st.sampled_from(["ZZZ", "ab", "世", "b世a", "END", " EN"]), max_size=3),
    st.lists(st.integers(0, 99)),
    st.booleans(),
)
def test_grouping_of_tokens_does_not_matter(
    text: str, stops: list[str], cuts: list[int], include: bool
) -> None:
    ids = MODEL.encode(text)
    one_by_one = feed_all(OutputText(MODEL, [], tuple(stops), include), [[i] for i in ids])
    in_groups = feed_all(OutputText(MODEL, [], tuple(stops), include), grouped(ids, cuts))
    assert one_by_one == in_groups
    shown, consumed, stopped = one_by_one
    if stopped is None:
        assert (shown, consumed) == (text, len(ids))
    elif not include:
        assert stopped not in shown and text.startswith(shown + stopped)
    whole = MODEL.decode(ids[:consumed])
    assert whole.startswith(shown)
    if stopped is not None and consumed:  # the last consumed token was needed
        assert stopped in whole
        assert not any(stop in MODEL.decode(ids[: consumed - 1]) for stop in stops)


def test_a_stop_string_inside_one_token() -> None:
    output = OutputText(MODEL, [], ("END",))
    assert output.feed([*b"ok", 257, *b"more"]) == TextDelta("ok ", 3, "END", (0, 1, 2))
    assert output.feed([65]) == TextDelta("", 0, "END", ())
    assert output.flush() == TextDelta("", 0, "END", ())


def test_hold_back_beside_multi_byte_characters() -> None:
    output = OutputText(MODEL, [], ("ZZZ",))
    pieces = [output.feed([byte]).text for byte in "世Z界ZZ".encode()]
    assert pieces == ["", "", "世", "", "", "", "Z界", "", ""]
    assert output.flush().text == "ZZ"


def test_an_unfinished_character_at_the_end() -> None:
    output = OutputText(MODEL, [], ("Z\ufffd",))
    assert output.feed([65, 0xE4, 0xB8]).text == "A"
    assert output.flush() == TextDelta("\ufffd", 0, None, ())
    stopped = OutputText(MODEL, [], ("Z\ufffd",))
    stopped.feed([65, 90, 0xE4])
    assert stopped.flush() == TextDelta("", 0, "Z\ufffd", ())


def test_offsets_are_characters_before_each_token() -> None:
    output = OutputText(MODEL, MODEL.encode("prompt"), ())
    assert output.feed([*"a世b".encode()]).offsets == (0, 1, 1, 1, 2)
    assert output.feed([65, EOS]).offsets == (3, 4)


@pytest.mark.parametrize(("include", "text"), [(False, "a"), (True, "aZ")])
def test_the_text_of_a_stop_token(include: bool, text: str) -> None:
    output = OutputText(MODEL, [], (), include_stop=include)
    delta = output.feed([97, 90], ends_with_stop_token=True)
    assert delta == TextDelta(text, 2, None, (0, 1))


def test_special_tokens_are_skipped_or_shown() -> None:
    assert OutputText(MODEL, []).feed([97, EOS, 98]).text == "ab"
    shown = OutputText(MODEL, [], skip_special_tokens=False)
    assert shown.feed([97, EOS, 98]).text == "a</s>b"
    ended = OutputText(MODEL, [], skip_special_tokens=False)
    assert ended.feed([97, EOS], ends_with_stop_token=True).text == "a"


def test_stop_strings_are_not_looked_for_before_min_tokens() -> None:
    output = OutputText(MODEL, [], ("ab",), min_tokens=3)
    assert output.feed([*b"abxab"]) == TextDelta("abx", 5, "ab", (0, 1, 2, 3, 4))
    short = OutputText(MODEL, [], ("ab",), min_tokens=3)
    assert short.feed([*b"ab"]).text == "ab"
    assert short.flush().text == ""


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(RequestError) as error:
        OutputText(MODEL, [], ("a", ""))
    assert error.value.param == "stop"

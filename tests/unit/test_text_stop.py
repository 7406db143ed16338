"""Stop strings against an oracle over the whole text, for every split."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from quantd.daemon.text.stop import StopMatcher


def oracle(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """The match that ends first, and of those the longest."""
    ends = [(text.find(s) + len(s), -len(s), s) for s in stops if s in text]
    if not ends:
        return text, None
    end, _, stop = min(ends)
    return text[: end if include else end - len(stop)], stop


def run(pieces: list[str], stops: list[str], include: bool = False) -> tuple[list[str], str | None]:
    matcher = StopMatcher(stops, include_stop=include)
    shown = []
    for piece in pieces:
        shown.append(matcher.feed(piece))
        if matcher.matched is not None:
            return shown, matcher.matched
    return [*shown, matcher.flush()], None


def splits(text: str, cuts: list[int]) -> list[str]:
    points = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    return [text[a:b] for a, b in zip(points, points[1:], strict=False)]


STOPS = st.lists(st.text("ab世", min_size=1, max_size=5), min_size=1, max_size=4)


@given(st.text("ab世", max_size=25), STOPS, st.lists(st.integers(0, 100)), st.booleans())
@example("aab", ["ab", "aab"], [1, 2], False)
@example("abab世", ["aba世", "bab世"], [1, 2, 3], False)
def test_any_split_gives_what_the_whole_text_gives(
    text: str, stops: list[str], cuts: list[int], include: bool
) -> None:
    shown, stopped = run(splits(text, cuts), stops, include)
    assert ("".join(shown), stopped) == oracle(text, stops, include)


@given(st.text("ab", max_size=25), STOPS)
def test_at_any_time_only_a_possible_beginning_is_held_back(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    shown = ""
    for i, char in enumerate(text):
        shown += matcher.feed(char)
        if matcher.matched is not None:
            return
        held = text[len(shown) : i + 1]
        assert shown == text[: len(shown)]
        assert held == "" or any(stop.startswith(held) for stop in stops)


def test_the_match_that_ends_first_wins_and_then_the_longest() -> None:
    assert run(["xabcdy"], ["abcd", "bc"]) == (["xa"], "bc")
    assert run(["xabc"], ["bc", "abc", "c"]) == (["x"], "abc")


def test_a_stop_string_is_the_whole_output() -> None:
    assert run(["ST", "OP"], ["STOP"]) == (["", ""], "STOP")
    assert run(["ST", "OP"], ["STOP"], include=True) == (["ST", "OP"], "STOP")


def test_a_prefix_at_the_end_is_released() -> None:
    assert run(["text ST", "O"], ["STOP"]) == (["text ", "", "STO"], None)


def test_text_after_the_stop_string_is_dropped() -> None:
    assert run(["a END b"], ["END"]) == (["a "], "END")
    assert run(["a END b"], ["END"], include=True) == (["a END"], "END")


def test_a_long_stop_string_over_repeating_text() -> None:
    stop = "a" * 2000 + "b"
    shown, stopped = run(["a" * 500] * 20, [stop])
    assert ("".join(shown), stopped) == ("a" * 10_000, None)
    shown, stopped = run([*["a" * 500] * 20, "b!"], [stop])
    assert ("".join(shown), stopped) == ("a" * 8000, stop)

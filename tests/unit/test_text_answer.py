"""The parts of an answer, put together again."""

from __future__ import annotations

from quantd.daemon.text.answer import (
    Call,
    CallArguments,
    CallStart,
    Content,
    PlainAnswer,
    Reasoning,
    WholeAnswer,
    whole,
)


def test_parts_become_a_whole() -> None:
    parts = [
        Reasoning("why"),
        Reasoning(" not"),
        Content("first "),
        CallStart(0, "id0", "f"),
        CallArguments(0, '{"a"'),
        CallArguments(0, ": 1}"),
        CallStart(1, "id1", "g"),
        Content("last"),
    ]
    calls = [Call("id0", "f", '{"a": 1}'), Call("id1", "g", "")]
    assert whole(parts) == WholeAnswer("first last", "why not", calls)
    assert whole([]) == WholeAnswer()


def test_plain_text_is_content() -> None:
    parser = PlainAnswer()
    assert [*parser.feed("<think>a"), *parser.feed(""), *parser.flush()] == [Content("<think>a")]
    assert parser.num_calls == 0 and parser.reasoning_spans == ()

"""An answer under a policy, in every split: parts, rules, guards, and what ends it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from quantd.daemon.config import (
    GuardSettings,
    ModelSettings,
    PolicySettings,
    RuleSettings,
    SafetySettings,
    Settings,
)
from quantd.daemon.safety.guard import Guard, Verdict
from quantd.daemon.safety.policy import Policy, compile_policies
from quantd.daemon.safety.screen import Action
from quantd.daemon.server.choice import Delta
from quantd.daemon.server.outgoing import OutputScreen
from quantd.daemon.text.answer import CallArguments, CallStart, Content, Part, Reasoning, joined

SETTINGS = Settings(
    models={"m": ModelSettings(name="m", path=Path("m"))},
    safety=SafetySettings(
        rules={
            "w": RuleSettings(name="w", words=("bad", "bad thing")),
            "x": RuleSettings(name="x", words=("odd",)),
            "long": RuleSettings(name="long", max_chars=90),
        },
        guards={"g": GuardSettings(name="g", model="m", window_chars=64)},
        policies={
            "rules": PolicySettings(name="rules", output={"w": "redact", "x": "block"}),
            "some": PolicySettings(
                name="some", output={"w": "block"}, reasoning=False, tool_calls=False
            ),
            "long": PolicySettings(name="long", output={"w": "redact", "long": "block"}),
            "guard": PolicySettings(name="guard", output={"g": "block", "w": "redact"}),
            "told": PolicySettings(name="told", output={"g": "annotate", "w": "annotate"}),
        },
    ),
)
POLICIES = compile_policies(SETTINGS).by_name


class Watch:
    """The guard holds what has "kill" in it to be unsafe."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.counted: list[str] = []

    def count(self, stage: str, actions: Mapping[str, Action], found: Sequence[str]) -> None:
        self.counted += found

    async def judge(self, guard: Guard, text: str, asked: str | None) -> Verdict:
        assert len(text) <= 2 * guard.settings.window_chars
        return Verdict(("g",) if "kill" in text else (), 1.0)


WORDS = st.lists(
    st.sampled_from(
        ["bad", "bad thing", "b", "odd", "kill", "ki", " ", "fine words ", "x" * 30, '"']
    ),
    max_size=6,
).map("".join)
RUNS = st.lists(st.tuples(st.sampled_from("cra"), WORDS), max_size=4)


def parts_of(runs: list[tuple[str, str]]) -> list[Part]:
    parts: list[Part] = []
    for kind, text in runs:
        if kind == "c":
            parts.append(Content(text))
        elif kind == "r":
            parts.append(Reasoning(text))
        else:
            number = sum(isinstance(part, CallStart) for part in parts)
            parts += [CallStart(number, "id", "f"), CallArguments(number, text)]
    return joined(part for part in parts if isinstance(part, CallStart) or part.text)


def run(policy: Policy, deltas: list[list[Part]]) -> tuple[list[Part], Delta]:
    """What was shown, and the delta that was the last."""
    screen = OutputScreen(Watch(policy), lambda: "asked", True, False)
    shown: list[Part] = []

    async def go() -> Delta:
        for number, parts in enumerate(deltas, start=1):
            delta = Delta(0, "", list(parts))
            delta.finish_reason = "stop" if number == len(deltas) else None
            await screen.take(delta)
            shown.extend(delta.parts)
            if delta.finish_reason is not None:
                return delta
        raise AssertionError("the last delta ends it")

    last = asyncio.run(go())
    return joined(shown), last


def chars_of(parts: list[Part]) -> list[list[Part]]:
    """A delta for each character."""
    deltas: list[list[Part]] = []
    for part in parts:
        if isinstance(part, CallStart):
            deltas.append([part])
        else:
            deltas += [[part._replace(text=char)] for char in part.text]
    return [*deltas, []]


@settings(max_examples=300)
@given(RUNS, st.sampled_from(sorted(POLICIES)))
def test_no_split_changes_what_is_let_through(runs: list[tuple[str, str]], name: str) -> None:
    parts = parts_of(runs)
    whole, first = run(POLICIES[name], [parts])
    chars, second = run(POLICIES[name], chars_of(parts))
    assert whole == chars
    assert first.finish_reason == second.finish_reason
    assert first.filtered is not None and second.filtered is not None
    if "g" in first.filtered:  # rules may have looked on behind what a guard has blocked
        assert "g" in second.filtered
    else:
        assert first.filtered == second.filtered


@given(RUNS, st.sampled_from(sorted(POLICIES)))
def test_nothing_that_is_blocked_is_shown(runs: list[tuple[str, str]], name: str) -> None:
    parts = parts_of(runs)
    shown, last = run(POLICIES[name], chars_of(parts))
    texts = [part.text for part in shown if not isinstance(part, CallStart)]
    if name == "guard":
        assert "kill" not in "".join(texts)
    if name == "rules":
        assert not any("odd" in text.replace('"', " ").split() for text in texts)
    if name == "long":
        assert sum(len(text.replace("[w]", "")) for text in texts) <= 90
    if name == "some":
        unwatched = [part for part in parts if isinstance(part, Reasoning | CallArguments)]
        assert (
            last.finish_reason == "content_filter"
            or [part for part in shown if isinstance(part, Reasoning | CallArguments)] == unwatched
        )
    if name == "told":
        assert shown == parts and last.finish_reason == "stop"
    if last.finish_reason == "stop" and not last.filtered:
        assert shown == parts

"""An answer under a policy: what is let through of it, delta by delta."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from quantd.daemon.safety.guard import Guard, Verdict
from quantd.daemon.safety.policy import Policy
from quantd.daemon.safety.screen import Action
from quantd.daemon.safety.stream import StreamFilter
from quantd.daemon.text.answer import CallArguments, CallStart, Content, Part, Reasoning, joined

if TYPE_CHECKING:
    from quantd.daemon.server.choice import Delta, TokenEntry

TextPart = Content | Reasoning | CallArguments


class Watcher(Protocol):
    """As `screening.Watch`."""

    @property
    def policy(self) -> Policy: ...
    def count(self, stage: str, actions: Mapping[str, Action], found: Sequence[str]) -> None: ...
    async def judge(self, guard: Guard, text: str, asked: str | None) -> Verdict | None: ...


class OutputScreen:
    """One choice's answer.

    Invariant: what has been let through is a beginning of what the policy makes of the whole
    answer, however it came in deltas. Each run of one kind (content, reasoning, a call's
    arguments) is a text of its own. After a block the answer is over.
    """

    def __init__(
        self, watch: Watcher, asked: Callable[[], str], takes_parts: bool, is_json: bool
    ) -> None:
        """asked: the prompt, for guards. is_json: content is JSON, as calls' arguments are."""
        self._watch = watch
        self._stage = watch.policy.output
        self._takes_parts = takes_parts
        self._rules = _Rules(watch.policy, is_json)
        self._guards = _Guards(watch, asked) if self._stage.guards else None
        self._entries: list[TokenEntry] = []

    async def take(self, delta: Delta) -> None:
        """In place: what may be sent of it. A block ends it with "content_filter". Raises
        Unavailable when a guard has failed that must not."""
        parts: Sequence[Part] = delta.parts
        if not self._takes_parts:
            parts = [Content(delta.text)] if delta.text else []
        is_end = delta.finish_reason is not None
        shown = self._rules.take(parts, is_end)
        blocked = self._rules.blocked
        if self._guards is not None:
            shown = await self._guards.take(shown, is_end or blocked is not None)
            blocked = self._guards.blocked or blocked
        delta.parts = joined(shown) if self._takes_parts else []
        delta.text = "" if self._takes_parts else "".join(_text(part) for part in shown)
        if blocked is not None:
            delta.finish_reason, delta.stop_reason = "content_filter", None
        self._finish(delta)

    def _finish(self, delta: Delta) -> None:
        found = dict(self._rules.found)
        if self._guards is not None:
            found |= self._guards.found
        actions = self._stage.actions
        filtered = {name: actions[name] != "annotate" for name in found}
        is_end = delta.finish_reason is not None
        if self._rules.changes or (self._guards is not None and self._guards.holds):
            # Which tokens a text that was taken out came from is not known any more.
            self._entries += delta.entries
            delta.entries = self._entries if is_end and not any(filtered.values()) else []
        if is_end:
            delta.filtered = filtered
            self._watch.count("output", actions, list(found))


class _Rules:
    """Parts through the policy's rules."""

    def __init__(self, policy: Policy, is_json: bool) -> None:
        self.blocked: str | None = None
        self.found: Counter[str] = Counter()
        self._policy = policy
        self._is_json = is_json
        self._screen = policy.output.screen
        self.changes = self._screen is not None and self._screen.changes
        self._last: TextPart | None = None
        """Of the text that is open."""
        self._filter: StreamFilter | None = None
        self._num_chars = 0
        """Of the texts before it."""

    def take(self, parts: Sequence[Part], is_end: bool) -> list[Part]:
        if self._screen is None:
            return list(parts)
        shown: list[Part] = []
        for part in parts:
            if self.blocked is None:
                self._take(part, shown)
        if is_end and self.blocked is None:
            self._close(shown)
        return shown if self.changes else list(parts)

    def _take(self, part: Part, shown: list[Part]) -> None:
        if self._last is None or not _goes_on(self._last, part):
            self._close(shown)
            if self.blocked is not None:
                return
        if isinstance(part, CallStart) or not is_watched(self._policy, part):
            shown.append(part)
            return
        if self._filter is None:
            assert self._screen is not None
            is_json = (
                self._is_json if isinstance(part, Content) else isinstance(part, CallArguments)
            )
            self._filter = StreamFilter(self._screen, is_json=is_json, num_before=self._num_chars)
        self._last = part
        self._add(self._filter.feed(part.text), shown)

    def _add(self, text: str, shown: list[Part]) -> None:
        assert self._filter is not None and self._last is not None
        if text:
            shown.append(self._last._replace(text=text))
        if self._filter.blocked is not None:
            self.blocked = self._filter.blocked
            self.found += self._filter.found

    def _close(self, shown: list[Part]) -> None:
        """The end of the open text."""
        if self._filter is not None:
            self._add(self._filter.flush(), shown)
            self._num_chars = self._filter.num_chars
            if self.blocked is None:
                self.found += self._filter.found
        self._last = self._filter = None


class _Guards:
    """Parts through the policy's guards: held back until all have judged them, a window at once."""

    def __init__(self, watch: Watcher, asked: Callable[[], str]) -> None:
        self.blocked: str | None = None
        self.found: dict[str, int] = {}
        self._watch = watch
        self._asked = asked
        self._stage = watch.policy.output
        guards = self._stage.guards
        judged = {name for guard in guards for name in guard.categories}
        self.holds = any(self._stage.actions.get(name) == "block" for name in judged)
        self._size = min(guard.settings.window_chars for guard in guards)
        self._waiting: list[Part] = []
        self._text = ""
        """All that is watched."""
        self._num_judged = 0
        self._num_shown = 0
        """Characters of it."""

    async def take(self, parts: Sequence[Part], is_end: bool) -> list[Part]:
        self._waiting += parts
        self._text += "".join(_text(part) for part in parts if self._is_watched(part))
        # What has no text of its own goes with the text before it, also if the next is blocked.
        shown = self._release(self._num_judged if self.holds else len(self._text))
        while self.blocked is None:
            stop = self._num_judged + self._size
            if stop > len(self._text):
                if not is_end or self._num_judged == len(self._text):
                    break
                stop = len(self._text)
            await self._judge(stop)
            self._num_judged = stop
            if self.blocked is None:
                shown += self._release(stop)
        return shown

    async def _judge(self, stop: int) -> None:
        for guard in self._stage.guards:
            window = guard.window(self._text, stop)
            verdict = await self._watch.judge(guard, window, self._asked())
            for category in () if verdict is None else verdict.categories:
                action = self._stage.actions.get(category)
                if action is not None:
                    self.found[category] = self.found.get(category, 0) + 1
                    self.blocked = category if action == "block" else self.blocked

    def _release(self, stop: int) -> list[Part]:
        """The waiting parts up to so many watched characters."""
        shown: list[Part] = []
        while self._waiting:
            part = self._waiting[0]
            size = len(_text(part)) if self._is_watched(part) else 0
            room = stop - self._num_shown
            if size > room:
                if room > 0 and not isinstance(part, CallStart):
                    shown.append(part._replace(text=part.text[:room]))
                    self._waiting[0] = part._replace(text=part.text[room:])
                    self._num_shown += room
                break
            shown.append(self._waiting.pop(0))
            self._num_shown += size
        return shown

    def _is_watched(self, part: Part) -> bool:
        return is_watched(self._watch.policy, part)


def is_watched(policy: Policy, part: Part) -> bool:
    if isinstance(part, Content):
        return True
    return policy.reasoning if isinstance(part, Reasoning) else policy.tool_calls


def _goes_on(last: TextPart, part: Part) -> bool:
    if isinstance(last, CallArguments) and isinstance(part, CallArguments):
        return last.call == part.call
    return type(last) is type(part)


def _text(part: Part) -> str:
    return "" if isinstance(part, CallStart) else part.text

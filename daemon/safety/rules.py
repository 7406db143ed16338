"""Categories of words, patterns and personal data, compiled, and where a text has them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from quantd.daemon.safety.normalize import normalize
from quantd.daemon.safety.pii import DETECTORS, Check

if TYPE_CHECKING:
    from collections.abc import Iterable

MAX_SPACES = 8
"""White space characters that may stand for one space of a phrase."""
_MAX_MEMORY = 64 << 20
"""For one automaton; RE2 takes what it needs."""
_UNSPACED = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]"
"""Scripts that put nothing between words."""


class BadRule(ValueError):
    """What is wrong with a word or a pattern."""


class Found(NamedTuple):
    """Half-open range of normalized characters."""

    start: int
    stop: int
    rule: int
    category: str


@dataclass(frozen=True, slots=True)
class Rule:
    """Matches depend on `span + 1` characters behind their start and on one before it, and on
    nothing else of the text."""

    category: str
    regex: Any
    group: int
    """Of the regex: what was found. Around it may be a character that ends a word."""
    span: int
    """Most characters of a match; longer ones are none."""
    chars: str = ""
    """All that a match can consist of; "" is anything."""
    check: Check | None = None

    def matches(self, text: str, start: int, limit: int, stop: int) -> Iterator[tuple[int, int]]:
        """Without overlap, in order, those that begin in [start, limit). Nothing from `stop` on is
        taken for the end of the text; it is len(text) only when the text is over."""
        position = max(start - 1, 0)  # where the character before a word may be
        while (match := self.regex.search(text, position, stop)) is not None:
            first, last = match.span(self.group)
            if first >= limit:
                return
            if last - first > self.span or match.end() > first + self.span + 1:
                last = self._shorter(text, position, first, stop)
            if last > first and self.check is not None:
                last = first + self.check(text[first:last])
            if first >= start and last > first:
                yield first, last
                start, position = last, max(last - 1, 0)
            else:
                position = max(first, position + 1)

    def _shorter(self, text: str, position: int, first: int, stop: int) -> int:
        """Where a match from `first` ends that is within the span, else `first`."""
        match = self.regex.search(text, position, min(first + self.span + 1, stop))
        if match is None or match.start(self.group) != first:
            return first
        last: int = match.end(self.group)
        return last if last - first <= self.span else first


class RuleSet:
    """Rules that are looked for together. Immutable."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        self.rules = tuple(rules)
        self._any = _compile("|".join(f"(?:{rule.regex.pattern})" for rule in rules), quiet=True)
        """Most texts have nothing: one search tells."""
        spans: dict[str, int] = {}
        for rule in rules:
            spans[rule.chars] = max(rule.span, spans.get(rule.chars, 0))
        self._spans = sorted(spans.items(), key=lambda item: (item[0] != "", -item[1]))

    def settled(self, text: str) -> int:
        """So many starts are decided by a text that goes on: they have all that they depend on,
        because the longest match would end before the last character, or because a character
        follows that the match cannot have. May be below 0."""
        limit = len(text) - 1
        for chars, span in self._spans:
            most = len(text) - span - 1
            if chars and most < limit:
                most = max(most, len(text[:-1].rstrip(chars)))
            limit = min(limit, most)
        return limit

    def is_clean(self, text: str) -> bool:
        """Nothing is in a normalized text that is over. Linear, in one search."""
        return self._any.search(text) is None

    def find(self, text: str, starts: Sequence[int], limit: int, is_end: bool) -> list[Found]:
        """In order of their starts, which are below `limit`; `starts` has for each rule where its
        next match may begin."""
        stop = len(text) if is_end else len(text) - 1
        if stop <= 0 or self._any.search(text, max(min(starts) - 1, 0), stop) is None:
            return []
        found = [
            Found(first, last, number, rule.category)
            for number, rule in enumerate(self.rules)
            for first, last in rule.matches(text, starts[number], limit, stop)
        ]
        return sorted(found)


def _compile(pattern: str, *, quiet: bool = False) -> Any:
    """Raises BadRule with RE2's reason. quiet: groups are not asked for."""
    import re2  # most daemons have no rules

    options = re2.Options()
    options.case_sensitive = False
    options.never_capture = quiet
    options.log_errors = False
    options.max_mem = _MAX_MEMORY
    try:
        return re2.compile(pattern, options=options)
    except re2.error as error:
        reason = error.args[0]
        raise BadRule(reason.decode() if isinstance(reason, bytes) else str(reason)) from None


def pattern_rule(category: str, pattern: str, span: int) -> Rule:
    """Raises BadRule: not in RE2's syntax, or matches where there is nothing."""
    regex = _compile(pattern, quiet=True)
    if regex.search("") is not None:
        raise BadRule("it matches the empty text")
    return Rule(category, regex, 0, span)


def pii_rule(category: str, kind: str) -> Rule:
    detector = DETECTORS[kind]
    regex = _compile(detector.pattern)
    return Rule(category, regex, 1, detector.span, detector.chars, detector.check)


def word_rules(category: str, words: Iterable[str]) -> list[Rule]:
    """One or two rules for all words: those of scripts without spaces are found anywhere, others
    as whole words only. Raises BadRule."""
    import re2

    unspaced = re2.compile(_UNSPACED)
    bounded: list[str] = []
    free: list[str] = []
    for word in words:
        seen = normalize(word).split()
        if not seen:
            raise BadRule(f"{word!r} has no visible character")
        edges = seen[0][0], seen[-1][-1]
        kind = free if any(unspaced.search(edge) for edge in edges) else bounded
        kind.append(" ".join(seen))
    rules = []
    if bounded:
        pattern = rf"(?:^|[^\pL\pN\pM_])({_alternatives(bounded)})(?:$|[^\pL\pN\pM_])"
        rules.append(Rule(category, _compile(pattern), 1, _span(bounded), _chars(bounded)))
    if free:
        pattern = f"({_alternatives(free)})"
        rules.append(Rule(category, _compile(pattern), 1, _span(free), _chars(free)))
    return rules


def _alternatives(phrases: Sequence[str]) -> str:
    """The longest first, so that it wins."""
    import re2

    space = rf"\s{{1,{MAX_SPACES}}}"
    ordered = sorted(set(phrases), key=lambda phrase: (-len(phrase), phrase))
    return "|".join(space.join(map(re2.escape, phrase.split())) for phrase in ordered)


def _span(phrases: Sequence[str]) -> int:
    return max(len(phrase) + (MAX_SPACES - 1) * phrase.count(" ") for phrase in phrases)


def _chars(phrases: Sequence[str]) -> str:
    chars = set("".join(phrases))
    return "".join(sorted(chars | set("\t\n\f\r") if " " in chars else chars))

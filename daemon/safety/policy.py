"""Policies compiled from the settings: which holds for a request, and what it looks for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import NoReturn

from quantd.daemon.config import PolicySettings, RuleSettings, Settings
from quantd.daemon.config.safety import Action
from quantd.daemon.errors import ConfigError
from quantd.daemon.safety.guard import Guard
from quantd.daemon.safety.rules import (
    BadRule,
    Rule,
    RuleSet,
    pattern_rule,
    pii_rule,
    word_rules,
)
from quantd.daemon.safety.screen import Screen


@dataclass(frozen=True, slots=True)
class Stage:
    """What is done in one direction; nothing when both are empty."""

    screen: Screen | None = None
    guards: tuple[Guard, ...] = ()
    actions: Mapping[str, Action] = field(default_factory=dict)
    """Of all categories, by rules and by guards."""

    def __bool__(self) -> bool:
        return self.screen is not None or bool(self.guards)


@dataclass(frozen=True, slots=True)
class Policy:
    name: str
    input: Stage
    output: Stage
    reasoning: bool
    tool_calls: bool
    keys: tuple[str, ...]
    models: tuple[str, ...]

    def holds(self, caller: str, model: str | None) -> bool:
        """model: None asks for the caller alone."""
        return _is_among(caller, self.keys) and (model is None or _is_among(model, self.models))


class Policies:
    """All that are in force. Immutable: a reload puts another one in its place."""

    def __init__(self, policies: Mapping[str, Policy], guards: Mapping[str, Guard]) -> None:
        self.by_name = MappingProxyType(dict(policies))
        self.guards = MappingProxyType(dict(guards))

    def of(self, caller: str, model: str | None) -> Policy | None:
        """The first that holds, in the order of the file."""
        return next((p for p in self.by_name.values() if p.holds(caller, model)), None)


def _is_among(name: str, patterns: tuple[str, ...]) -> bool:
    return not patterns or any(fnmatchcase(name, pattern) for pattern in patterns)


def compile_policies(settings: Settings) -> Policies:
    """Raises ConfigError that names the place, the key and what is wrong."""
    return _Compiler(settings).policies()


class _Compiler:
    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._safety = settings.safety
        self._guards = {name: Guard(given) for name, given in self._safety.guards.items()}
        self._rules: dict[tuple[str, int], list[Rule]] = {}

    def policies(self) -> Policies:
        names = {*self._settings.models}.union(*(m.aliases for m in self._settings.models.values()))
        for name, guard in self._safety.guards.items():
            if guard.model not in names:
                known = ", ".join(self._settings.models) or "none"
                reason = f"there is no such model; there are: {known}"
                self._fail(f"guards.{name}.model", guard.model, reason)
        for name, given in self._safety.rules.items():
            self._compiled(name, given, PolicySettings(name="").pattern_chars)
        policies = {name: self._policy(given) for name, given in self._safety.policies.items()}
        return Policies(policies, self._guards)

    def _policy(self, given: PolicySettings) -> Policy:
        return Policy(
            given.name,
            self._stage(given, "input", given.input),
            self._stage(given, "output", given.output),
            given.reasoning,
            given.tool_calls,
            given.keys,
            given.models,
        )

    def _stage(self, policy: PolicySettings, key: str, asked: Mapping[str, Action]) -> Stage:
        actions = {name: action for name, action in asked.items() if action != "off"}
        rules: list[Rule] = []
        limits: dict[str, int] = {}
        guards = [guard for guard in self._guards.values() if guard.categories & actions.keys()]
        judged = {name for guard in guards for name in guard.categories}
        for name in asked:
            given = self._safety.rules.get(name)
            if given is None and not any(name in g.categories for g in self._guards.values()):
                self._fail(f"policies.{policy.name}.{key}", name, self._unknown())
            if given is not None and name in actions:
                rules += self._compiled(name, given, policy.pattern_chars)
                if given.max_chars:
                    limits[name] = given.max_chars
            if actions.get(name) == "redact" and (name in judged or name in limits):
                reason = "what a guard or max_chars finds has no place that could be redacted"
                self._fail(f"policies.{policy.name}.{key}", f"{name} = redact", reason)
        screen = Screen(actions, RuleSet(rules) if rules else None, limits)
        return Stage(screen if rules or limits else None, tuple(guards), actions)

    def _unknown(self) -> str:
        guards = self._guards.values()
        known = sorted({*self._safety.rules}.union(*(guard.categories for guard in guards)))
        return f"no rules or guard find such a category; known: {', '.join(known) or 'none'}"

    def _compiled(self, name: str, given: RuleSettings, span: int) -> list[Rule]:
        """The same ones for policies that want the same."""
        key = (name, span)
        if key not in self._rules:
            self._rules[key] = self._compile(name, given, span)
        return self._rules[key]

    def _compile(self, name: str, given: RuleSettings, span: int) -> list[Rule]:
        rules: list[Rule] = []
        try:
            rules += word_rules(name, given.words)
        except BadRule as error:
            self._fail(f"rules.{name}.words", given.words, str(error))
        if given.words_file is not None:
            rules += self._from_file(name, given)
        for pattern in given.patterns:
            try:
                rules.append(pattern_rule(name, pattern, span))
            except BadRule as error:
                self._fail(f"rules.{name}.patterns", pattern, str(error))
        return rules + [pii_rule(name, kind) for kind in given.pii]

    def _from_file(self, name: str, given: RuleSettings) -> list[Rule]:
        path = given.words_file
        assert path is not None
        try:
            lines = [line.strip() for line in path.read_text("utf-8").splitlines()]
            words = [line for line in lines if line and not line.startswith("#")]
            return word_rules(name, words)
        except (OSError, ValueError) as error:  # BadRule is one
            reason = error.strerror if isinstance(error, OSError) else str(error)
            self._fail(f"rules.{name}.words_file", path, f"cannot be read: {reason}")

    def _fail(self, key: str, value: object, reason: str) -> NoReturn:
        key = f"safety.{key}"
        where = self._settings.origin.get(key, "the configuration")
        shown = str(value) if len(str(value)) <= 80 else str(value)[:77] + "..."
        raise ConfigError(f"{where}: {key}: {shown!r}: {reason}", param=key)

"""What is looked for in one direction of a policy, and what is done about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from quantd.daemon.safety.rules import RuleSet

Action = Literal["off", "annotate", "redact", "block"]


@dataclass(frozen=True, slots=True)
class Screen:
    actions: Mapping[str, Action]
    """By category; none is "off"."""
    rules: RuleSet | None = None
    limits: Mapping[str, int] = field(default_factory=dict)
    """Category → most characters of all texts together."""

    @property
    def changes(self) -> bool:
        """The text that comes out may be another one, so it has to be held back."""
        looked_for = {rule.category for rule in self.rules.rules} if self.rules else set()
        return any(self.actions[name] != "annotate" for name in looked_for.union(self.limits))

    @property
    def max_chars(self) -> int | None:
        """What is longer is blocked."""
        blocking = [n for name, n in self.limits.items() if self.actions[name] == "block"]
        return min(blocking, default=None)

    @property
    def held(self) -> int:
        """Most normalized characters that are held back of a text that goes on."""
        return 0 if self.rules is None else 2 + max(rule.span for rule in self.rules.rules)

"""What a reload changes: what can be applied to the running daemon, and what needs a restart."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from quantd.daemon.config.load import SECTIONS, rules
from quantd.daemon.config.settings import Settings


@dataclass(frozen=True, slots=True)
class Changes:
    """The difference between two configurations, as keys."""

    live: tuple[str, ...] = ()
    """Applied at once: "log.level"."""
    restart: tuple[str, ...] = ()
    """In the file but not in force until a restart."""
    models_added: tuple[str, ...] = ()
    models_removed: tuple[str, ...] = ()
    models_changed: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """A line for each change, for a person."""
        return [
            *(f"{key} has changed" for key in self.live),
            *(f"{key} has changed and needs a restart" for key in self.restart),
            *(f"model {name} is new" for name in self.models_added),
            *(f"model {name} is gone" for name in self.models_removed),
            *(f"model {name} has changed" for name in self.models_changed),
        ]

    def __bool__(self) -> bool:
        return bool(self.lines())


def diff(old: Settings, new: Settings) -> Changes:
    """What is different in `new`; neither is changed."""
    live: list[str] = []
    restart: list[str] = []
    for section, struct in SECTIONS.items():
        before, after = getattr(old, section), getattr(new, section)
        for name, rule in rules(struct).items():
            if getattr(before, name) != getattr(after, name):
                (live if rule.live else restart).append(f"{section}.{name}")
    if old.safety != new.safety:
        live.append("safety")
    return Changes(
        live=tuple(live),
        restart=tuple(restart),
        models_added=tuple(name for name in new.models if name not in old.models),
        models_removed=tuple(name for name in old.models if name not in new.models),
        models_changed=tuple(
            name
            for name, model in new.models.items()
            if name in old.models and old.models[name] != model
        ),
    )


def in_force(old: Settings, new: Settings) -> Settings:
    """`new` with the keys that need a restart as they were in `old`."""
    parts = {}
    for section, struct in SECTIONS.items():
        before = getattr(old, section)
        kept = {
            name: getattr(before, name) for name, rule in rules(struct).items() if not rule.live
        }
        parts[section] = dataclasses.replace(getattr(new, section), **kept)
    return dataclasses.replace(new, **parts)

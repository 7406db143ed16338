"""`quantd check-config`: the effective configuration as TOML, each value with its origin."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from quantd.daemon.config import ModelSettings, Settings, load
from quantd.daemon.config.load import SAFETY, SECTIONS, rules
from quantd.daemon.safety import read_policies


def run(arguments: argparse.Namespace) -> int:
    """Raises ConfigError when the configuration is wrong."""
    settings = load(Path(arguments.config) if arguments.config else None)
    read_policies(settings)
    print(f"# {settings.file or 'no configuration file was found'}")
    print("\n".join(show(settings)))
    missing = [model for model in settings.models.values() if not model.path.exists()]
    for model in missing:
        where = settings.origin[f"models.{model.name}.path"]
        print(f"quantd: warning: {where}: there is nothing at {model.path}", file=sys.stderr)
    return 0


def show(settings: Settings) -> Iterator[str]:
    """Lines of TOML that mean the same settings."""
    for section, struct in SECTIONS.items():
        yield from _table(settings, section, f"[{section}]", struct, getattr(settings, section))
    for name, model in settings.models.items():
        header = f"[models.{json.dumps(name, ensure_ascii=False)}]"
        yield from _table(settings, f"models.{name}", header, ModelSettings, model)
    for kind, struct in SAFETY.items():
        for name, value in getattr(settings.safety, kind).items():
            header = f"[safety.{kind}.{json.dumps(name, ensure_ascii=False)}]"
            yield from _table(settings, f"safety.{kind}.{name}", header, struct, value)


def _table(
    settings: Settings, prefix: str, header: str, struct: type[Any], values: Any
) -> Iterator[str]:
    yield ""
    yield header
    lines = [
        (f"{name} = {rule.show(getattr(values, name))}", settings.origin[f"{prefix}.{name}"])
        for name, rule in rules(struct).items()
        if name != "name"
    ]
    width = min(max(len(line) for line, _ in lines), 48)
    for line, origin in lines:
        yield f"{line.ljust(width)}  # {origin}"

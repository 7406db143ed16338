"""A checkpoint that the command line names, without a daemon and its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from quantd.daemon.config import ModelSettings
from quantd.daemon.config.load import Value, build
from quantd.daemon.config.rules import embedded_models
from quantd.daemon.errors import ConfigError


def read_model(argument: str, flags: Mapping[str, tuple[str, str | None]]) -> ModelSettings:
    """`argument`: a folder, a file, "embedded:NAME" or such a NAME. `flags`: a setting → (its flag,
    its text or None). Raises ConfigError that names the flag, or says that nothing is there."""
    here = Path.cwd()
    named = f"embedded:{argument}" if argument in embedded_models() else argument
    values = {
        key: Value(text, name, here, True)
        for key, (name, text) in flags.items()
        if text is not None
    }
    values["path"] = Value(named, "command line", here, True)
    model = build(ModelSettings, f"models.{Path(argument).name}", values, {}, {"name": argument})
    if not model.path.exists():
        known = ", ".join(embedded_models())
        raise ConfigError(f"{argument}: no such folder or file (models inside: {known})")
    return model

"""Which models a command line means: `quantd serve [MODEL ...]`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from quantd.daemon.config.load import Value, build, check_names, check_tiers, flag, rules
from quantd.daemon.config.rules import embedded_models
from quantd.daemon.config.settings import ModelSettings, Settings
from quantd.daemon.errors import ConfigError

DEMO = "demo"


def choose_models(
    settings: Settings, arguments: Sequence[str] = (), flags: Mapping[str, str] | None = None
) -> Settings:
    """`settings` with the models that the command line names, and only these.

    An argument is the name of a configured model, NAME=PATH, the name of an embedded model, or a
    path, whose last part (without .gguf) becomes the name. Without arguments the configured models
    are served, and without any of these, the embedded demo. `flags` ("dtype" → text) hold for the
    models that the command line names, or for the demo.
    """
    flags = flags or {}
    if not arguments and settings.models:
        if flags:
            raise ConfigError(
                f"{flag('models', next(iter(flags)))} is for models named on the command line; "
                f"for configured models set it in {settings.file}"
            )
        return settings
    origin = dict(settings.origin)
    models: dict[str, ModelSettings] = {}
    for argument in arguments or (DEMO,):
        model = _one(settings, argument, flags, origin)
        if model.name in models:
            raise ConfigError(
                f"two models are named {model.name!r}; use NAME=PATH to tell them apart"
            )
        models[model.name] = model
    check_names(models, origin)
    check_tiers(models, origin)
    return dataclasses.replace(settings, models=models, origin=origin)


def _one(
    settings: Settings, argument: str, flags: Mapping[str, str], origin: dict[str, str]
) -> ModelSettings:
    here = Path.cwd()
    known = rules(ModelSettings)
    written = {key: Value(text, flag("models", key), here, True) for key, text in flags.items()}
    configured = settings.models.get(argument)
    if configured is not None:
        changed = {
            key: value.read(f"models.{argument}.{key}", known[key])
            for key, value in written.items()
        }
        origin.update({f"models.{argument}.{key}": written[key].origin for key in changed})
        return dataclasses.replace(configured, **changed)
    name, path = _name_and_path(argument)
    where = "command line"
    name = Value(name, where, here, True).read("model name", known["name"])
    written["path"] = Value(path, where, here, True)
    model = build(ModelSettings, f"models.{name}", written, origin, {"name": name})
    if not model.path.exists():
        names = [*settings.models, *embedded_models()]
        raise ConfigError(
            f"{argument}: no such folder or file, and no model of that name (known: "
            f"{', '.join(names) or 'none'})"
        )
    return model


def _name_and_path(argument: str) -> tuple[str, str]:
    name, equals, path = argument.partition("=")
    if equals and "/" not in name:
        return name, path
    if argument in embedded_models():
        return argument, f"embedded:{argument}"
    return _called(Path(argument).expanduser().resolve()), argument


def _called(path: Path) -> str:
    """The folder's name, or the GGUF file's without its suffix and the number of its shard."""
    if path.suffix != ".gguf":
        return path.name
    return re.sub(r"-\d{5}-of-\d{5}$", "", path.stem) or path.stem

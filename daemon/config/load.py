"""From file, environment and flags to `Settings`.

Every wrong value is a `ConfigError` that says where it stands and what is allowed.

Later sources win: defaults, file, environment, flags.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from quantd.daemon.config.environment import Environment
from quantd.daemon.config.rules import Rule
from quantd.daemon.config.safety import (
    GuardSettings,
    PolicySettings,
    RuleSettings,
    SafetySettings,
)
from quantd.daemon.config.settings import (
    LogSettings,
    ModelSettings,
    SchedulerSettings,
    ServerSettings,
    Settings,
    StoreSettings,
    WebhookSettings,
)
from quantd.daemon.errors import ConfigError

SECTIONS: dict[str, type[Any]] = {
    "server": ServerSettings,
    "scheduler": SchedulerSettings,
    "log": LogSettings,
    "store": StoreSettings,
    "webhooks": WebhookSettings,
}
SAFETY: dict[str, type[Any]] = {
    "rules": RuleSettings,
    "guards": GuardSettings,
    "policies": PolicySettings,
}
"""Tables of [safety], each with a table per name."""
_PREFIXED = ("log", "store", "webhooks")
"""Sections whose keys have their section's name in the flag."""
S = TypeVar("S")
Lines = Mapping[tuple[str, ...], int]


@dataclasses.dataclass(frozen=True, slots=True)
class Value:
    """A value as it was written, and where."""

    raw: object
    origin: str
    folder: Path
    is_text: bool = False
    """From a flag or the environment, where every value is text."""

    def read(self, key: str, rule: Rule) -> Any:
        try:
            if self.is_text:
                return rule.read_text(str(self.raw), self.folder)
            return rule.read(self.raw, self.folder)
        except ValueError as error:
            shown = _toml(self.raw)
            raise ConfigError(
                f"{self.origin}: {key} = {shown}: must be {error}", param=key
            ) from None


def load(
    file: Path | None = None,
    flags: Mapping[str, str] | None = None,
    environment: Environment | None = None,
) -> Settings:
    """The settings in force. `file` is `--config`; `flags` maps "section.key" to a flag's text.

    A file that is named (by `file` or $QUANTD_CONFIG) must exist; the usual places need not.
    """
    environment = Environment.read() if environment is None else environment
    path = _find(file, environment)
    document, lines = _parse(path) if path is not None else ({}, {})
    here = path.absolute().parent if path is not None else Path.cwd()
    values = _sections(document, lines, str(path), here)
    for name, struct in SECTIONS.items():
        # All of the file, also what a flag overrides: it would fail on the day without the flag.
        build(struct, name, values[name], {})
    if environment.log_level is not None:
        values["log"]["level"] = Value(environment.log_level, "$QUANTD_LOG", here, True)
    for key, text in (flags or {}).items():
        section, _, name = key.partition(".")
        values[section][name] = Value(text, flag(section, name), Path.cwd(), True)
    origin: dict[str, str] = {}
    parts = {name: build(SECTIONS[name], name, values[name], origin) for name in SECTIONS}
    parts["server"] = _places(parts["server"], values["server"], origin, environment)
    parts["store"] = _store_place(parts["store"], values["store"], environment)
    parts["webhooks"] = _secret_place(parts["webhooks"], values["webhooks"], origin, environment)
    models = _models(document, lines, str(path), here, origin)
    safety = _safety(document, lines, str(path), here, origin)
    return Settings(**parts, models=models, safety=safety, origin=origin, file=path)


def build(
    struct: type[S],
    prefix: str,
    values: Mapping[str, Value],
    origin: dict[str, str],
    given: Mapping[str, object] | None = None,
) -> S:
    """One struct from its written values; fills `origin`. `given`: fields that are not keys."""
    fields: dict[str, Any] = dict(given or {})
    for name, rule in rules(struct).items():
        if name in fields:
            continue
        key = f"{prefix}.{name}"
        origin[key] = "default"
        if name in values:
            fields[name] = values[name].read(key, rule)
            origin[key] = values[name].origin
    return struct(**fields)


def rules(struct: type[Any]) -> Mapping[str, Rule]:
    """The rule of each of a struct's fields."""
    hints = get_type_hints(struct, include_extras=True)
    return {name: hint.__metadata__[0] for name, hint in hints.items()}


def meanings(struct: type[Any]) -> Mapping[str, str]:
    """The one line of meaning of each of a struct's fields."""
    hints = get_type_hints(struct, include_extras=True)
    return {name: hint.__metadata__[1] for name, hint in hints.items()}


def flag(section: str, name: str) -> str:
    """How a command line spells a key."""
    prefix = f"{section}-" if section in _PREFIXED else ""
    return "--" + prefix + name.replace("_", "-")


def check_tiers(models: Mapping[str, ModelSettings], origin: Mapping[str, str]) -> None:
    """Blocks reach the disk by way of the host's memory."""
    for name, model in models.items():
        if model.disk_kv_path is not None and model.host_kv_bytes == 0:
            where = origin.get(f"models.{name}.disk_kv_path", "--disk-kv-path")
            raise ConfigError(
                f"{where}: models.{name}.disk_kv_path = {_toml(str(model.disk_kv_path))}: needs "
                f"models.{name}.host_kv_bytes above 0, which is 0"
            )


def check_names(models: Mapping[str, ModelSettings], origin: Mapping[str, str]) -> None:
    """No two models answer to one name."""
    owner: dict[str, str] = {name: name for name in models}
    for name, model in models.items():
        for alias in model.aliases:
            if owner.setdefault(alias, name) != name or alias == name:
                where = origin.get(f"models.{name}.aliases", "--alias")
                raise ConfigError(
                    f"{where}: models.{name}.aliases: "
                    f"{alias!r} is already a name of the model {owner[alias]!r}"
                )


def _find(file: Path | None, environment: Environment) -> Path | None:
    for named, origin in ((file, "--config"), (environment.config, "$QUANTD_CONFIG")):
        if named is not None:
            if not named.is_file():
                problem = "is a folder, not a file" if named.is_dir() else "does not exist"
                raise ConfigError(f"{origin}: {named} {problem}")
            return named
    return next((path for path in environment.config_files() if path.is_file()), None)


def _parse(path: Path) -> tuple[dict[str, object], Lines]:
    try:
        text = path.read_text(encoding="utf-8")
        return tomllib.loads(text), key_lines(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None


def key_lines(text: str) -> Lines:
    """The line of every key and table of a valid TOML document, by its path.

    tomllib keeps no positions. A statement (a header, or a key with its value) is the fewest lines
    from its start that parse alone, so each one is parsed by itself.
    """
    lines: dict[tuple[str, ...], int] = {}
    table: tuple[str, ...] = ()
    pending = ""
    start = 1
    for number, line in enumerate(text.replace("\r\n", "\n").split("\n"), 1):
        start = number if not pending else start
        pending += line + "\n"
        try:
            parsed = tomllib.loads(pending)
        except tomllib.TOMLDecodeError:
            continue
        header = pending.lstrip().startswith("[")
        paths = list(_paths(parsed))
        if header:
            table = paths[-1]
        for path in paths:
            lines.setdefault(path if header else table + path, start)
        pending = ""
    return lines


def _paths(value: object) -> Iterable[tuple[str, ...]]:
    """The path of each key of nested tables, outermost first."""
    if isinstance(value, list) and value and isinstance(value[-1], dict):
        value = value[-1]
    if isinstance(value, dict):
        for key, inner in value.items():
            yield (key,)
            yield from ((key, *rest) for rest in _paths(inner))


def _sections(
    document: dict[str, object], lines: Lines, file: str, folder: Path
) -> dict[str, dict[str, Value]]:
    """The written values of the fixed sections; a name that is not known is an error."""
    known = [*SECTIONS, "models", "safety"]
    for name in document:
        if name not in known:
            raise _unknown((name,), known, lines, file)
    return {
        name: _table(document.get(name, {}), (name,), rules(struct), lines, file, folder)
        for name, struct in SECTIONS.items()
    }


def _table(
    table: object,
    path: tuple[str, ...],
    known: Iterable[str],
    lines: Lines,
    file: str,
    folder: Path,
) -> dict[str, Value]:
    known = list(known)
    if not isinstance(table, dict):
        where = _where(path, lines, file)
        raise ConfigError(f"{where}: {_dotted(path)} = {_toml(table)}: must be a table of keys")
    for name in table:
        if name not in known:
            raise _unknown((*path, name), known, lines, file)
    return {
        name: Value(raw, _where((*path, name), lines, file), folder) for name, raw in table.items()
    }


def _models(
    document: dict[str, object], lines: Lines, file: str, folder: Path, origin: dict[str, str]
) -> dict[str, ModelSettings]:
    tables = document.get("models", {})
    models = _named(ModelSettings, tables, ("models",), lines, file, folder, origin)
    check_names(models, origin)
    check_tiers(models, origin)
    return models


def _safety(
    document: dict[str, object], lines: Lines, file: str, folder: Path, origin: dict[str, str]
) -> SafetySettings:
    written = _table(document.get("safety", {}), ("safety",), SAFETY, lines, file, folder)
    return SafetySettings(
        **{
            name: _named(SAFETY[name], value.raw, ("safety", name), lines, file, folder, origin)
            for name, value in written.items()
        }
    )


def _named(
    struct: type[S],
    tables: object,
    path: tuple[str, ...],
    lines: Lines,
    file: str,
    folder: Path,
    origin: dict[str, str],
) -> dict[str, S]:
    """A struct for each of the tables; its name is the table's own key."""
    if not isinstance(tables, dict):
        prefix = _dotted(path)
        raise ConfigError(f"{_where(path, lines, file)}: {prefix} must be tables: [{prefix}.NAME]")
    known = {name: rule for name, rule in rules(struct).items() if name != "name"}
    made: dict[str, S] = {}
    for name, table in tables.items():
        here = (*path, name)
        where = _where(here, lines, file)
        written = _table(table, here, known, lines, file, folder)
        Value(name, where, folder).read(_dotted(here), rules(struct)["name"])
        for key in _needed(struct):
            if key not in written:
                raise ConfigError(f"{where}: {_dotted(here)}: `{key}` is missing")
        made[name] = build(struct, _dotted(here), written, origin, {"name": name})
    return made


def _needed(struct: type[Any]) -> list[str]:
    """Keys that a table cannot leave out."""
    return [
        field.name
        for field in dataclasses.fields(struct)
        if field.default is field.default_factory is dataclasses.MISSING and field.name != "name"
    ]


def _places(
    server: ServerSettings,
    written: Mapping[str, Value],
    origin: dict[str, str],
    environment: Environment,
) -> ServerSettings:
    """Fills in the two values that, if "auto", depend on the user and on the service manager."""

    if _is_auto(written, "socket"):
        server = dataclasses.replace(server, socket=environment.default_socket())
    if _is_auto(written, "api_keys_file") and environment.credentials is not None:
        credential = environment.credentials / "api-key"
        # The unit's own fallback is "none": an empty file, in contrast, is an error.
        if credential.is_file() and credential.read_bytes().strip() != b"none":
            origin["server.api_keys_file"] = "credential"
            server = dataclasses.replace(server, api_keys_file=credential)
    return server


def _store_place(
    store: StoreSettings, written: Mapping[str, Value], environment: Environment
) -> StoreSettings:
    if not _is_auto(written, "path"):
        return store
    return dataclasses.replace(store, path=environment.default_state())


def _secret_place(
    webhooks: WebhookSettings,
    written: Mapping[str, Value],
    origin: dict[str, str],
    environment: Environment,
) -> WebhookSettings:
    if _is_auto(written, "secret_file") and environment.credentials is not None:
        credential = environment.credentials / "webhook-secret"
        if credential.is_file():
            origin["webhooks.secret_file"] = "credential"
            webhooks = dataclasses.replace(webhooks, secret_file=credential)
    if webhooks.url and webhooks.secret_file is None:
        raise ConfigError(
            f"{origin['webhooks.url']}: webhooks.url = {_toml(webhooks.url)}: needs "
            "webhooks.secret_file, the secret that events are signed with"
        )
    return webhooks


def _is_auto(written: Mapping[str, Value], name: str) -> bool:
    return name not in written or written[name].raw == "auto"


def _unknown(path: tuple[str, ...], known: Iterable[str], lines: Lines, file: str) -> ConfigError:
    from difflib import get_close_matches

    known = list(known)
    near = get_close_matches(path[-1], known, 1, 0.5)
    hint = f"did you mean {near[0]!r}?" if near else "known here: " + ", ".join(known)
    key = _dotted(path)
    return ConfigError(f"{_where(path, lines, file)}: unknown key {key}; {hint}", param=key)


def _where(path: tuple[str, ...], lines: Lines, file: str) -> str:
    """file:line of a key, or of the nearest table around it."""
    while path and path not in lines:
        path = path[:-1]
    return f"{file}:{lines[path]}" if path else file


def _dotted(path: tuple[str, ...]) -> str:
    return ".".join(path)


def _toml(value: object) -> str:
    """A value as TOML would have it, short."""
    if isinstance(value, bool):
        return "true" if value else "false"
    text = f'"{value}"' if isinstance(value, str) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."

"""What a value of the configuration may be: one rule per key, attached to the struct's field.

A rule turns what a file, a flag or an environment variable holds into the field's value, or raises
`ValueError` with what is allowed. Files give typed values (`read`), flags and the environment give
text (`read_text`).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

_UNITS = {"": 1, "B": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
_SIZE = re.compile(r"\s*(\d{1,18}(?:\.\d{1,9})?)\s*([A-Za-z]*)\s*", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """`live`: a reload applies a change of this key without a restart."""

    live: bool = False

    @property
    def allowed(self) -> str:
        """Completes the sentence "must be …"."""
        raise NotImplementedError

    def read(self, value: object, folder: Path) -> object:
        """The field's value; relative paths are relative to `folder`."""
        raise NotImplementedError

    def read_text(self, text: str, folder: Path) -> object:
        return self.read(text, folder)

    def show(self, value: object) -> str:
        """The field's value as a file would have it."""
        if value is None:
            return '"auto"'
        if isinstance(value, bool):
            return str(value).lower()
        if isinstance(value, (int, float)):
            return f"{value:.10g}" if isinstance(value, float) else str(value)
        if isinstance(value, tuple):
            return "[" + ", ".join(self.show(item) for item in value) + "]"
        return '"' + str(value).replace("\\", "\\\\").replace('"', '\\"') + '"'


@dataclass(frozen=True, slots=True, kw_only=True)
class Integer(Rule):
    """A whole number in [low, high]; `auto`: the word "auto" stands for None."""

    low: int
    high: int
    auto: bool = False

    @property
    def allowed(self) -> str:
        return f"an integer from {self.low} to {self.high}" + (' or "auto"' if self.auto else "")

    def read(self, value: object, folder: Path) -> object:
        if self.auto and value == "auto":
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(self.allowed)
        if not self.low <= value <= self.high:
            raise ValueError(self.allowed)
        return value

    def read_text(self, text: str, folder: Path) -> object:
        return self.read(int(text) if re.fullmatch(r"[+-]?[0-9]{1,18}", text) else text, folder)


@dataclass(frozen=True, slots=True, kw_only=True)
class Octal(Rule):
    """Permission bits, written 0o660 in TOML or 660 on a command line."""

    @property
    def allowed(self) -> str:
        return "permission bits from 0o000 to 0o777"

    def read(self, value: object, folder: Path) -> object:
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 0o777:
            raise ValueError(self.allowed)
        return value

    def read_text(self, text: str, folder: Path) -> object:
        matched = re.fullmatch(r"(?:0o)?([0-7]{1,4})", text)
        return self.read(int(matched[1], 8) if matched else text, folder)

    def show(self, value: object) -> str:
        return f"0o{value:o}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Seconds(Rule):
    """A finite duration in [low, high]; `forever`: -1 is allowed too."""

    low: float
    high: float
    forever: bool = False

    @property
    def allowed(self) -> str:
        text = f"seconds from {self.low:.10g} to {self.high:.10g}"
        return text + (", or -1 for never" if self.forever else "")

    def read(self, value: object, folder: Path) -> object:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(self.allowed)
        if self.forever and value == -1:
            return -1.0
        if not (math.isfinite(value) and self.low <= value <= self.high):
            raise ValueError(self.allowed)
        return float(value)

    def read_text(self, text: str, folder: Path) -> object:
        try:
            return self.read(float(text), folder)
        except ValueError:
            raise ValueError(self.allowed) from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Size(Rule):
    """Bytes, as an integer or as text with a binary unit; `auto`: "auto" stands for None."""

    low: int
    auto: bool = False

    @property
    def allowed(self) -> str:
        text = f'bytes, at least {self.low}, as an integer or like "512MiB" or "2GiB"'
        return text + (' or "auto"' if self.auto else "")

    def read(self, value: object, folder: Path) -> object:
        if self.auto and value == "auto":
            return None
        if isinstance(value, str):
            matched = _SIZE.fullmatch(value)
            if matched is None or matched[2].upper() not in _UNITS:
                raise ValueError(self.allowed)
            number = Decimal(matched[1]) * _UNITS[matched[2].upper()]
            value = int(number) if number == int(number) else None
        if isinstance(value, bool) or not isinstance(value, int) or not self.low <= value < 1 << 63:
            raise ValueError(self.allowed)
        return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Flag(Rule):
    @property
    def allowed(self) -> str:
        return "true or false"

    def read(self, value: object, folder: Path) -> object:
        if not isinstance(value, bool):
            raise ValueError(self.allowed)
        return value

    def read_text(self, text: str, folder: Path) -> object:
        return self.read({"true": True, "false": False}.get(text, text), folder)


@dataclass(frozen=True, slots=True, kw_only=True)
class OneOf(Rule):
    choices: tuple[str, ...]

    @property
    def allowed(self) -> str:
        return "one of " + ", ".join(f'"{choice}"' for choice in self.choices)

    def read(self, value: object, folder: Path) -> object:
        if not isinstance(value, str) or value not in self.choices:
            raise ValueError(self.allowed)
        return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Text(Rule):
    """Text without control characters; `pattern` is matched in full, `meaning` says it in words."""

    pattern: str = r"\S(?:.*\S)?"
    meaning: str = "text, not empty"

    @property
    def allowed(self) -> str:
        return self.meaning

    def read(self, value: object, folder: Path) -> object:
        if not isinstance(value, str) or not value.isprintable():
            raise ValueError(self.allowed)
        if re.fullmatch(self.pattern, value) is None:
            raise ValueError(self.allowed)
        return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts(Rule):
    """A list of texts without repeats; a comma separates them on a command line."""

    item: Text

    @property
    def allowed(self) -> str:
        return f"a list without repeats, each {self.item.allowed}"

    def read(self, value: object, folder: Path) -> object:
        if not isinstance(value, list):
            raise ValueError(self.allowed)
        try:
            items = tuple(self.item.read(entry, folder) for entry in value)
        except ValueError:
            raise ValueError(self.allowed) from None
        if len(set(items)) != len(items):
            raise ValueError(self.allowed)
        return items

    def read_text(self, text: str, folder: Path) -> object:
        return self.read([part.strip() for part in text.split(",")] if text else [], folder)


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights(Rule):
    """A table of names and numbers above 0; on a command line "NAME=2,OTHER=0.5"."""

    @property
    def allowed(self) -> str:
        return "a table of names and numbers above 0 and at most 1e6, like { alice = 2 }"

    def read(self, value: object, folder: Path) -> object:
        if not isinstance(value, dict):
            raise ValueError(self.allowed)
        for name, weight in value.items():
            number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
            if not name or not number or not 0 < weight <= 1e6:
                raise ValueError(self.allowed)
        return {name: float(weight) for name, weight in value.items()}

    def read_text(self, text: str, folder: Path) -> object:
        pairs = [part.partition("=") for part in text.split(",")] if text else []
        try:
            return self.read({name.strip(): float(weight) for name, _, weight in pairs}, folder)
        except ValueError:
            raise ValueError(self.allowed) from None

    def show(self, value: object) -> str:
        assert isinstance(value, dict)
        pairs = ", ".join(f"{Rule.show(self, name)} = {w:.10g}" for name, w in value.items())
        return "{ " + pairs + " }" if pairs else "{}"


@dataclass(frozen=True, slots=True, kw_only=True)
class TextTable(Rule):
    """A table of names and texts; on a command line "NAME=TEXT,OTHER=TEXT"."""

    name: Text
    value: Text | OneOf
    example: str

    @property
    def allowed(self) -> str:
        return (
            f"a table like {self.example}, each name {self.name.allowed}, each value "
            f"{self.value.allowed}"
        )

    def read(self, value: object, folder: Path) -> object:
        if not isinstance(value, dict):
            raise ValueError(self.allowed)
        try:
            return {
                self.name.read(name, folder): self.value.read(text, folder)
                for name, text in value.items()
            }
        except ValueError:
            raise ValueError(self.allowed) from None

    def read_text(self, text: str, folder: Path) -> object:
        pairs = [part.partition("=") for part in text.split(",")] if text else []
        return self.read({name.strip(): value.strip() for name, _, value in pairs}, folder)

    def show(self, value: object) -> str:
        assert isinstance(value, dict)
        show = super(TextTable, self).show
        pairs = ", ".join(f"{show(name)} = {show(text)}" for name, text in value.items())
        return "{ " + pairs + " }" if pairs else "{}"


@dataclass(frozen=True, slots=True, kw_only=True)
class FilePath(Rule):
    """A path; `~` is the home folder.

    `optional`: "" is none, and "auto" leaves the choice to the loader; both are None here.
    """

    optional: bool = False

    @property
    def allowed(self) -> str:
        return "a path" + (', "auto", or "" for none' if self.optional else "")

    def read(self, value: object, folder: Path) -> object:
        if not isinstance(value, str) or not value.isprintable():
            raise ValueError(self.allowed)
        if self.optional and value in ("", "auto"):
            return None
        if not value:
            raise ValueError(self.allowed)
        try:
            return folder / Path(value).expanduser()
        except RuntimeError as error:
            raise ValueError(f"a path ({error})") from None

    def show(self, value: object) -> str:
        return '""' if value is None else Rule.show(self, value)


@dataclass(frozen=True, slots=True, kw_only=True)
class SocketPath(FilePath):
    """A Unix socket's path, or "@name" in Linux's abstract namespace."""

    def read(self, value: object, folder: Path) -> object:
        if isinstance(value, str) and value.startswith("@"):
            return FilePath.read(self, value, Path())
        return FilePath.read(self, value, folder)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelPath(FilePath):
    """A checkpoint's folder or file, or `embedded:NAME` for one that comes with quantd."""

    @property
    def allowed(self) -> str:
        return 'a path or "embedded:NAME", NAME one of ' + ", ".join(embedded_models())

    def read(self, value: object, folder: Path) -> object:
        if isinstance(value, str) and value.startswith("embedded:"):
            name = value.removeprefix("embedded:")
            if name not in embedded_models():
                raise ValueError(self.allowed)
            return _EMBEDDED / name
        return FilePath.read(self, value, folder)


_EMBEDDED = Path(__file__).parent.parent / "embedded"


def embedded_models() -> tuple[str, ...]:
    """The models that come with quantd."""
    return tuple(sorted(path.parent.name for path in _EMBEDDED.glob("*/config.json")))

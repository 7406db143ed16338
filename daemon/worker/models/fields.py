"""Typed reading of config.json: what is absent, of the wrong type or not understood is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantd.plugins.api import Refused


class Fields:
    """One JSON object of config.json. A field that is absent or null takes the family's default.

    transformers writes only what differs from a family's defaults in some versions, so the defaults
    are part of the format.
    """

    def __init__(
        self, raw: Mapping[str, Any], defaults: Mapping[str, Any] | None = None, path: str = ""
    ) -> None:
        self._raw = raw
        self._defaults = defaults or {}
        self._path = path

    def __contains__(self, name: str) -> bool:
        return self._raw.get(name) is not None

    def value(self, name: str, default: Any = None) -> Any:
        value = self._raw.get(name)
        if value is None:
            value = self._defaults.get(name)
        return default if value is None else value

    def integer(self, name: str, default: int | None = None) -> int:
        value = self._required(name, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.wrong(name, "an integer")
        if value < 1:
            raise self.wrong(name, "at least 1")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self._required(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.wrong(name, "a number")
        return value * 1.0

    def flag(self, name: str, default: bool | None = None) -> bool:
        value = self._required(name, default)
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        value = self._required(name, default)
        if not isinstance(value, str):
            raise self.wrong(name, "a string")
        return value

    def items(self, name: str, default: list[Any] | None = None) -> list[Any]:
        value = self._required(name, default)
        if not isinstance(value, list):
            raise self.wrong(name, "a list")
        return value

    def object(self, name: str, defaults: Mapping[str, Any] | None = None) -> Fields:
        value = self.value(name)
        if not isinstance(value, Mapping):
            raise self.wrong(name, "an object")
        return Fields(value, defaults, f"{self._path}{name}.")

    def keys(self) -> frozenset[str]:
        return frozenset(self._raw)

    def wrong(self, name: str, expected: str) -> Refused:
        return Refused(
            f"config.json: {self._path}{name} is {self._raw.get(name)!r}, must be {expected}"
        )

    def _required(self, name: str, default: Any) -> Any:
        value = self.value(name, default)
        if value is None:
            raise Refused(f"config.json: {self._path}{name} is missing")
        return value

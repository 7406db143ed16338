"""The tools that one answer may call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple


class Tool(NamedTuple):
    name: str
    parameters: Mapping[str, Any]
    """The JSON schema of its arguments, of type "object"."""
    strict: bool = True
    """Arguments obey the schema; else they are any JSON object."""


@dataclass(frozen=True, slots=True)
class Toolset:
    """What may be called; the prompt may show more tools than these."""

    tools: tuple[Tool, ...]
    required: bool = False
    """The answer is at least one call."""
    parallel: bool = True
    """More than one call is allowed."""

    @property
    def is_free(self) -> bool:
        """Nothing needs to be enforced: any answer will do, and so will any arguments."""
        return not self.required and self.parallel and not any(t.strict for t in self.tools)

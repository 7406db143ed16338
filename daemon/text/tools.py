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
    enforced: bool = False
    """Also a free answer has a grammar: its calls can be read, whatever the model would say."""

    @property
    def is_free(self) -> bool:
        """Nothing needs to be enforced: any answer will do, and so will any arguments."""
        if self.required or self.enforced or not self.parallel:
            return False
        return not any(tool.strict for tool in self.tools)

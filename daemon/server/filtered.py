"""What a reply says of the safety filter: the categories that were found, and whether their text
was taken out. Absent where nothing was found.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from quantd.daemon.server.generate import Generation


class CategoryResult(msgspec.Struct):
    filtered: bool
    """Its text was taken out, or everything from there on."""
    detected: bool = True


Results = dict[str, CategoryResult]


class PromptResult(msgspec.Struct):
    content_filter_results: Results
    prompt_index: int = 0


def results_of(filtered: Mapping[str, bool] | None) -> Results | msgspec.UnsetType:
    """Of an answer."""
    if not filtered:
        return msgspec.UNSET
    return {category: CategoryResult(is_filtered) for category, is_filtered in filtered.items()}


def prompt_results(made: Generation) -> list[PromptResult] | msgspec.UnsetType:
    results = results_of(made.prompt_filtered)
    return msgspec.UNSET if results is msgspec.UNSET else [PromptResult(results)]


def members_of(filtered: Mapping[str, bool] | None) -> bytes:
    """The same of an answer as a JSON object's member with its comma, or nothing."""
    results = results_of(filtered)
    if results is msgspec.UNSET:
        return b""
    return b',"content_filter_results":' + msgspec.json.encode(results)

"""Arguments that are written one by one, and not as one JSON object: what may be asked of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

_IGNORED = {"title", "description", "default", "examples", "$schema", "$id", "$comment"}
_KNOWN = _IGNORED | {"type", "properties", "required", "additionalProperties"}
_DEFINITIONS = {"$defs", "definitions"}


class Parameter(NamedTuple):
    key: str
    schema: Mapping[str, Any]
    """With the definitions that it may refer to."""
    required: bool


def flat_refusal(
    schema: Mapping[str, Any], is_key: Callable[[str], bool], allowed: str
) -> str | None:
    """Why the arguments cannot be held to an object's schema; `allowed` says how keys must be."""
    unknown = sorted(schema.keys() - _KNOWN - _DEFINITIONS)
    if unknown:
        return f"{unknown[0]} is not supported for the arguments as a whole"
    properties = schema.get("properties", {})
    for key in schema.get("required", ()):
        if key not in properties:
            return f"required: {key!r} is not among the properties"
    for key, value in properties.items():
        if not is_key(key):
            return f"properties: {key!r} must be {allowed}"
        if not isinstance(value, Mapping):
            return f"properties.{key} must be an object"
    return None


def parameters_of(schema: Mapping[str, Any]) -> Sequence[Parameter]:
    """Of a schema that was not refused."""
    definitions = {name: schema[name] for name in _DEFINITIONS if name in schema}
    required = schema.get("required", ())
    return [
        Parameter(key, {**_definitions_for(value, definitions), **value}, key in required)
        for key, value in schema.get("properties", {}).items()
    ]


def _definitions_for(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> dict[str, Any]:
    return dict(definitions) if "$ref" in str(schema) else {}


def is_string(schema: Any) -> bool:
    """Does the schema allow strings only?"""
    if not isinstance(schema, Mapping):
        return False
    if "enum" in schema and isinstance(schema["enum"], list):
        return all(isinstance(item, str) for item in schema["enum"])
    if "const" in schema:
        return isinstance(schema["const"], str)
    return schema.get("type") in ("string", ["string"])

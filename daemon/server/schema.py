"""Types as JSON Schema: of the structs that bodies are decoded with and replies are encoded from,
so that what the schema says is what happens."""

from __future__ import annotations

import ast
import functools
import inspect
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any, get_args, get_type_hints

import msgspec

_PACKAGE = "quantd.daemon.server."
_REF = "#/components/schemas/{name}"


class Types:
    """All types that operations name, "module.Name" in this package, and all that those hold."""

    def __init__(self, bodies: Iterable[str], replies: Iterable[str]) -> None:
        bodies = list(bodies)
        self._kinds = {name: _named(name) for name in dict.fromkeys([*bodies, *replies])}
        while missing := self._later(self._generate()[1]):
            self._kinds |= {name: _named(name) for name in missing}
        schemas, components = self._generate()
        self._schemas = dict(zip(self._kinds, schemas, strict=True))
        _describe(self._kinds.values(), components)
        for name in components.keys() - self._reached(bodies, components):
            _always_whole(components[name])
        self.components: Mapping[str, Any] = {
            _short(name): self._tidy(components[name]) for name in sorted(components, key=_short)
        }
        """By name."""

    def schema(self, names: Sequence[str]) -> Any:
        """Of what is one of these types."""
        found = [self._tidy(self._schemas[name]) for name in names]
        return found[0] if len(found) == 1 else {"anyOf": found}

    def schema_of(self, kind: Any) -> Any:
        """Of a type that holds no structs."""
        return self._tidy(msgspec.json.schema(kind))

    def _generate(self) -> tuple[tuple[dict[str, Any], ...], dict[str, Any]]:
        return msgspec.json.schema_components(self._kinds.values(), ref_template=_REF)

    def _later(self, components: Any) -> set[str]:
        """Types that are named in place of what is decoded later, and are not there yet."""
        named = {name for node in _nodes(components) for name in node.get("x-types", ())}
        return named - self._kinds.keys()

    def _reached(self, names: Iterable[str], components: Mapping[str, Any]) -> set[str]:
        found: set[str] = set()
        todo: list[Any] = [self._schemas[name] for name in names]
        while todo:
            for node in _nodes(todo.pop()):
                todo += [self._schemas[name] for name in node.get("x-types", ())]
                name = node.get("$ref", "").rpartition("/")[2]
                if name and name not in found:
                    found.add(name)
                    todo.append(components[name])
        return found

    def _tidy(self, node: Any) -> Any:
        """As a reader wants it: no titles, whole numbers as integers, the types of what is decoded
        later in their place."""
        if isinstance(node, list):
            return [self._tidy(item) for item in node]
        if not isinstance(node, dict):
            return node
        if "x-types" in node:
            return self.schema(node["x-types"])
        made = {key: self._tidy(value) for key, value in node.items() if key != "title"}
        if "properties" in node:
            made["properties"] = {k: self._tidy(v) for k, v in node["properties"].items()}
        if "$ref" in made:
            made["$ref"] = _REF.format(name=_short(made["$ref"].rpartition("/")[2]))
        if "mapping" in made:
            made["mapping"] = {
                tag: _REF.format(name=_short(ref.rpartition("/")[2]))
                for tag, ref in made["mapping"].items()
            }
        kinds = made.get("anyOf")
        if kinds is not None and {"type": "integer"} in kinds:
            made["anyOf"] = kinds = [kind for kind in kinds if kind != {"type": "number"}]
            if len(kinds) == 1:
                made |= made.pop("anyOf")[0]
        return made


def _named(name: str) -> Any:
    """A tuple with names is shown as the object that `_asdict` makes of it."""
    path = name if name.startswith("quantd.") else _PACKAGE + name
    module, _, attribute = path.rpartition(".")
    kind = getattr(import_module(module), attribute)
    if hasattr(kind, "_asdict"):
        fields = list(get_type_hints(kind).items())
        return msgspec.defstruct(
            kind.__name__, fields, module=kind.__module__, namespace={"__doc__": kind.__doc__}
        )
    return kind


def _short(name: str) -> str:
    """msgspec calls types by their full names where two have the same."""
    return name.removeprefix(_PACKAGE)


def _nodes(value: Any) -> Iterator[dict[str, Any]]:
    """All objects in it."""
    if isinstance(value, dict):
        yield value
        for item in value.values():
            yield from _nodes(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _nodes(item)


def _always_whole(component: dict[str, Any]) -> None:
    """What is encoded has all of its fields, also those that a default is given for."""
    required = component.setdefault("required", [])
    for name, schema in component.get("properties", {}).items():
        if "default" in schema:
            del schema["default"]
            if name not in required:
                required.append(name)


# --- the lines under fields -----------------------------------------------------------------------


def _describe(kinds: Iterable[Any], components: Mapping[str, Any]) -> None:
    """Puts in `RULES`, and what the source says below each field."""
    for struct in _structs(kinds):
        full = f"{struct.__module__}.{struct.__qualname__}"
        component = components[full if full in components else struct.__name__]
        for rule, value in getattr(struct, "RULES", {}).items():
            if rule == "required":
                component[rule] = [*component[rule], *value]
            elif rule == "properties":
                component[rule] |= value
            else:
                component[rule] = value
        encoded = dict(zip(struct.__struct_fields__, struct.__struct_encode_fields__, strict=True))
        for owner in reversed(struct.__mro__):
            for field, text in _docs(owner.__module__).get(owner.__name__, {}).items():
                schema = component["properties"].get(encoded.get(field))
                if schema is not None:
                    schema["description"] = text


def _structs(kinds: Iterable[Any]) -> list[type[msgspec.Struct]]:
    found: dict[type[msgspec.Struct], None] = {}
    todo = list(kinds)
    while todo:
        kind = todo.pop()
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
            if kind not in found:
                found[kind] = None
                todo += get_type_hints(kind).values()
        else:
            todo += get_args(kind)
    return list(found)


@functools.cache
def _docs(module: str) -> Mapping[str, Mapping[str, str]]:
    """Class → field → the string below it."""
    if not module.startswith("quantd."):
        return {}
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    return {node.name: dict(_docs_of(node)) for node in tree.body if isinstance(node, ast.ClassDef)}


def _docs_of(node: ast.ClassDef) -> Iterator[tuple[str, str]]:
    for field, below in zip(node.body, node.body[1:], strict=False):
        if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
            continue
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            yield field.target.id, re.sub(r"\s+", " ", str(below.value.value))

"""The Jinja environment of chat templates. The only module that imports Jinja at its top: it is
itself imported when the first template is compiled."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from types import BuiltinMethodType, MethodType
from typing import Any

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from quantd.daemon.text import bounds

_PREFIX = "__bounds_"
_TICK = _PREFIX + "tick"
_CONCAT = _PREFIX + "concat"
_OUTPUT = _PREFIX + "output"

Measure = Callable[..., int]

_FILTERS: dict[str, Measure] = {
    **dict.fromkeys(
        ("capitalize", "e", "escape", "forceescape", "lower", "pprint", "safe", "string"),
        bounds.escaped_size,
    ),
    **dict.fromkeys(
        ("striptags", "title", "trim", "truncate", "upper", "urlencode", "wordcount"),
        bounds.escaped_size,
    ),
    "batch": bounds.batched_size,
    "center": bounds.padded_size,
    "indent": bounds.indented_size,
    "format": lambda form, *values, **named: bounds.percent_size(form, named or values),
    "join": bounds.joined_size,
    "replace": bounds.replaced_size,
    "round": bounds.rounded_size,
    "slice": bounds.sliced_size,
    "sum": bounds.summed_size,
    "wordwrap": bounds.wrapped_size,
    "xmlattr": bounds.escaped_size,
}
_METHODS: dict[str, Measure] = {
    "center": bounds.padded_size,
    "expandtabs": bounds.expanded_size,
    "join": lambda separator, items: bounds.joined_size(items, separator),
    "ljust": bounds.padded_size,
    "replace": bounds.replaced_size,
    "rjust": bounds.padded_size,
    "to_bytes": bounds.number_size,
    "translate": bounds.translated_size,
    "zfill": bounds.padded_size,
}
"""Of str, bytes and int."""


class _BoundsRewriter(NodeTransformer):
    """A tick into every loop and macro, and bounded functions in place of `~` and of printing."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.body.insert(0, _tick_node(node.lineno))
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Macro:
        self.generic_visit(node)
        node.body.insert(0, _tick_node(node.lineno))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Call:
        self.generic_visit(node)
        return _call(_CONCAT, node.nodes, node.lineno)

    def visit_Output(self, node: nodes.Output) -> nodes.Output:
        self.generic_visit(node)
        node.nodes = [_call(_OUTPUT, [_printed(part)], part.lineno) for part in node.nodes]
        return node


def _printed(part: nodes.Expr) -> nodes.Expr:
    """The template's own text is worth counting too: a loop may print it without end."""
    if isinstance(part, nodes.TemplateData):
        return nodes.Const(part.data, lineno=part.lineno)
    return part


def _call(name: str, arguments: list[nodes.Expr], lineno: int) -> nodes.Call:
    return nodes.Call(nodes.Name(name, "load"), arguments, [], None, None, lineno=lineno)


def _tick_node(lineno: int) -> nodes.ExprStmt:
    return nodes.ExprStmt(_call(_TICK, [], lineno), lineno=lineno)


def _concat(*values: Any) -> str:
    bounds.build(sum(map(bounds.text_size, values)))
    return "".join(map(str, values))


class _GenerationTag(Extension):
    """{% generation %}…{% endgeneration %} marks the assistant's text for training; here it only
    scopes its body, as a call block does."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=lineno)


class _Formatter(SandboxedFormatter):
    def format_field(self, value: Any, format_spec: str) -> Any:
        bounds.build(bounds.field_size(value, format_spec))
        return super().format_field(value, format_spec)


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            bounds.check_power(left, right)
        elif operator == "*":
            bounds.check_product(left, right)
        elif operator == "%" and isinstance(left, str | bytes):
            bounds.build(bounds.percent_size(left, right))
        elif operator == "+" and bounds.is_sized(left) and bounds.is_sized(right):
            bounds.build(len(left) + len(right))
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: B902, N805
        if isinstance(__obj, BuiltinMethodType | MethodType):
            owner, measure = __obj.__self__, _METHODS.get(__obj.__name__)
            if measure is not None and isinstance(owner, str | bytes | int):
                args = tuple(map(bounds.listed, args))
                bounds.build(measure(owner, *args, *kwargs.values()))
        return super().call(__context, __obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        if super().wrap_str_format(value) is None:
            return None

        def formatted(*args: Any, **kwargs: Any) -> str:
            return _Formatter(self).vformat(str(value.__self__), args, kwargs)

        def formatted_map(mapping: Mapping[str, Any]) -> str:
            return _Formatter(self).vformat(str(value.__self__), (), mapping)

        return formatted if value.__name__ == "format" else formatted_map


def _bounded_filter(filter_: Callable[..., Any], measure: Measure) -> Callable[..., Any]:
    """Measures before it runs. Jinja's own first argument (a context) is kept and not measured."""
    signature = inspect.signature(filter_)
    skipped = 1 if hasattr(filter_, "jinja_pass_arg") else 0

    @functools.wraps(filter_)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        own, values = args[:skipped], _listed_first(args[skipped:])
        bound = signature.bind(*own, *values, **kwargs)
        bound.apply_defaults()
        bounds.build(measure(*bound.args[skipped:], **bound.kwargs))
        return filter_(*own, *values, **kwargs)

    return bounded


def _listed_first(values: Sequence[Any]) -> Sequence[Any]:
    return [bounds.listed(values[0]), *values[1:]] if values else values


class _Namespace(Namespace):
    """Jinja's namespace without underscored names, which it would shadow its own internals with."""

    def __init__(self, /, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for name in dict(*args, **kwargs):
            _check_name(name)

    def __repr__(self) -> str:
        return "<Namespace>"  # Jinja's own shows all values, however large

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace takes no name with a leading underscore: {name!r}")


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def helpers(account: bounds.Bounds) -> dict[str, Callable[..., Any]]:
    """What the rewritten template calls."""
    return {_TICK: account.tick, _CONCAT: _concat, _OUTPUT: account.output}


def compile_template(
    source: str, *, tojson: Callable[..., str], now: Callable[[], datetime]
) -> Template:
    """Raises jinja2.TemplateError. To be rendered with `helpers` among its variables, and with
    their bounds in force."""
    if _PREFIX in source:
        raise TemplateSyntaxError(f"names with {_PREFIX} are reserved", 1)
    environment = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationTag, "jinja2.ext.loopcontrols"],
    )
    # What is of no use to a chat and multiplies texts.
    del environment.filters["urlize"], environment.globals["lipsum"]
    for name, measure in _FILTERS.items():
        environment.filters[name] = _bounded_filter(environment.filters[name], measure)
    environment.filters["tojson"] = tojson
    environment.globals.update(
        raise_exception=_raise_exception,
        strftime_now=lambda form: now().strftime(form),
        namespace=_Namespace,
    )
    tree = _BoundsRewriter().visit(environment.parse(source))
    return environment.from_string(tree)

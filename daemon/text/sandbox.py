"""The Jinja environment of chat templates. The only module that imports Jinja at its top: it is
itself imported when the first template is compiled."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

_PREFIX = "__bounds_"
_TICK = _PREFIX + "tick"
_CONCAT = _PREFIX + "concat"


MAX_SECONDS = 10.0
MAX_CHARS = 16 * 1024 * 1024


class BoundExceeded(Exception):
    """The message continues "the chat template …"."""


class Bounds:
    """What one rendering may spend."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._deadline = clock() + MAX_SECONDS
        self._num_chars = 0

    @property
    def helpers(self) -> dict[str, Callable[..., Any]]:
        """What the rewritten template calls."""
        return {_TICK: self._tick, _CONCAT: _concat}

    def add_output(self, num_chars: int) -> None:
        self._num_chars += num_chars
        _check_size(self._num_chars)
        self._tick()

    def _tick(self) -> None:
        if self._clock() > self._deadline:
            raise BoundExceeded(f"ran for more than {MAX_SECONDS:g} seconds")


def _check_size(num_chars: int) -> None:
    if num_chars > MAX_CHARS:
        raise BoundExceeded(f"built a text of more than {MAX_CHARS} characters")


def _concat(*values: Any) -> str:
    parts = [str(value) for value in values]
    _check_size(sum(map(len, parts)))
    return "".join(parts)


class _BoundsRewriter(NodeTransformer):
    """A tick into every loop and macro, and a bounded function in place of `~`."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        node.body.insert(0, _tick_node(node.lineno))
        self.generic_visit(node)
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Macro:
        node.body.insert(0, _tick_node(node.lineno))
        self.generic_visit(node)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Call:
        self.generic_visit(node)
        return nodes.Call(
            nodes.Name(_CONCAT, "load"), node.nodes, [], None, None, lineno=node.lineno
        )


def _tick_node(lineno: int) -> nodes.ExprStmt:
    call = nodes.Call(nodes.Name(_TICK, "load"), [], [], None, None, lineno=lineno)
    return nodes.ExprStmt(call, lineno=lineno)


class _GenerationTag(Extension):
    """{% generation %}…{% endgeneration %} marks the assistant's text for training; here it only
    scopes its body, as a call block does."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=lineno)


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "*", "**"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and not (_is_small(left) and _is_small(right)):
            raise BoundExceeded("raises numbers above 1000 to a power")
        if operator == "*":
            for sized, times in ((left, right), (right, left)):
                if _is_sized(sized) and isinstance(times, int):
                    _check_size(len(sized) * times)
        if operator == "+" and _is_sized(left) and _is_sized(right):
            _check_size(len(left) + len(right))
        return super().call_binop(context, operator, left, right)


def _is_sized(value: Any) -> bool:
    return isinstance(value, str | list | tuple)


def _is_small(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) < 1000


class _Namespace(Namespace):
    """Jinja's namespace without underscored names, which it would shadow its own internals with."""

    def __init__(self, /, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for name in dict(*args, **kwargs):
            _check_name(name)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace takes no name with a leading underscore: {name!r}")


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def compile_template(
    source: str, *, tojson: Callable[..., str], now: Callable[[], datetime]
) -> Template:
    """Raises jinja2.TemplateError. To be rendered with `Bounds.helpers` among its variables."""
    if _PREFIX in source:
        raise TemplateSyntaxError(f"names with {_PREFIX} are reserved", 1)
    environment = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationTag, "jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = tojson
    environment.globals.update(
        raise_exception=_raise_exception,
        strftime_now=lambda form: now().strftime(form),
        namespace=_Namespace,
    )
    tree = _BoundsRewriter().visit(environment.parse(source))
    return environment.from_string(tree)

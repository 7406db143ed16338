"""What one rendering of a chat template may spend, and how much its operations are about to build.

Every operation whose result can be much longer than its operands is measured before it runs: a
template from a stranger must not fill the memory, and by the time a result exists it is too late.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

MAX_SECONDS = 10.0
MAX_CHARS = 16 * 1024 * 1024
"""Of one text, of all output, and of a list in items."""
MAX_BUILT_CHARS = 16 * MAX_CHARS
"""Of all texts and lists that expressions build: templates that append to a text message by
message build it again each time."""
MAX_NUMBER_BITS = 1 << 14
MAX_JSON_INDENT = 32

_CONTAINERS: tuple[type[Any], ...] = (
    list,
    tuple,
    set,
    frozenset,
    dict,
    type({}.keys()),
    type({}.values()),
)
_PERCENT = re.compile(r"%(?:\([^)]*\))?[#0\- +]*(\d+|\*|)(?:\.(\d+|\*|))?")
_NUMBER = re.compile(r"\d+")


class BoundExceeded(Exception):
    """The message continues "the chat template …"."""


class Bounds:
    """One rendering's account."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._deadline = clock() + MAX_SECONDS
        self._num_output = 0
        self._num_built = 0

    def tick(self) -> None:
        if self._clock() > self._deadline:
            raise BoundExceeded(f"ran for more than {MAX_SECONDS:g} seconds")

    def build(self, num_chars: int) -> None:
        """Before a text of `num_chars` characters, or a list of as many items, is built."""
        check_size(num_chars)
        self._num_built += num_chars
        if self._num_built > MAX_BUILT_CHARS:
            raise BoundExceeded(f"built texts of more than {MAX_BUILT_CHARS} characters in all")
        self.tick()

    def output(self, value: Any) -> str:
        """What an expression between braces prints; macros and blocks count their own, too."""
        text = value if isinstance(value, str) else as_text(value)
        self._num_output += len(text)
        check_size(self._num_output)
        self.tick()
        return text

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Around a rendering, which stays within one thread."""
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)


_current: ContextVar[Bounds] = ContextVar("bounds of the rendering")


def build(num_chars: int) -> None:
    """`Bounds.build` of the rendering that runs here.

    Jinja evaluates constant expressions when it compiles; LookupError then makes it leave them to
    the rendering.
    """
    _current.get().build(num_chars)


def check_size(num_chars: int) -> None:
    if num_chars > MAX_CHARS:
        raise BoundExceeded(f"built a text of more than {MAX_CHARS} characters")


def as_text(value: Any) -> str:
    """str(value), of a size that was checked: a list may hold another a thousand times over."""
    check_size(text_size(value))
    return str(value)


def text_size(value: Any) -> int:
    """About the length of str(value); stops soon after MAX_CHARS."""
    if isinstance(value, str | bytes):
        return len(value)
    total = 0
    pending = [value]
    while pending and total <= MAX_CHARS:
        item = pending.pop()
        if isinstance(item, str | bytes):
            total += len(item) + 4
        elif isinstance(item, dict):
            total += 2
            pending += [*item.keys(), *item.values()]
        elif isinstance(item, _CONTAINERS):
            total += 2
            pending += item
        else:
            total += 8 + (item.bit_length() // 3 if isinstance(item, int) else 0)
    return total


def check_product(left: Any, right: Any) -> None:
    for sized, times in ((left, right), (right, left)):
        if is_sized(sized) and isinstance(times, int):
            build(len(sized) * max(0, times))
    if isinstance(left, int) and isinstance(right, int):
        if left.bit_length() + right.bit_length() > MAX_NUMBER_BITS:
            raise BoundExceeded(f"computed a number of more than {MAX_NUMBER_BITS} bits")


def check_power(base: Any, exponent: Any) -> None:
    if not (_is_small(base) and _is_small(exponent)):
        raise BoundExceeded("raises numbers above 1000 to a power")


def is_sized(value: Any) -> bool:
    return isinstance(value, str | bytes | list | tuple)


def _is_small(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) < 1000


# --- lengths of results, before they are built ----------------------------------------------------


def percent_size(template: Any, values: Any) -> int:
    """Of `template % values`."""
    form = template.decode("latin-1") if isinstance(template, bytes) else _text(template)
    directives: list[tuple[str, str]] = _PERCENT.findall(form)
    widths = sum(int(number) for pair in directives for number in pair if number.isdigit())
    if any("*" in pair for pair in directives):
        items = values if isinstance(values, tuple) else (values,)
        widths += sum(abs(item) for item in items if isinstance(item, int))
    # A mapping's values may be named any number of times.
    uses = len(directives) if isinstance(values, Mapping) else 1
    return len(form) + widths + uses * text_size(values)


def field_size(value: Any, form: str) -> int:
    """Of `format(value, form)`."""
    return text_size(value) + sum(map(int, _NUMBER.findall(form)))


def padded_size(text: Any, width: Any = 80, *_: Any) -> int:
    return max(text_size(text), _int(width))


def replaced_size(text: Any, old: Any, new: Any, count: Any = -1) -> int:
    whole, part = _text(text), _text(old)
    times = whole.count(part)
    if isinstance(count, int) and count >= 0:
        times = min(times, count)
    return len(whole) + times * max(0, len(_text(new)) - len(part))


def joined_size(items: Any, separator: Any = "", *_: Any) -> int:
    count = len(items) if hasattr(items, "__len__") else 0
    return text_size(items) + count * text_size(separator)


def indented_size(text: Any, width: Any = 4, *_: Any) -> int:
    text = _text(text)
    wide = len(width) if isinstance(width, str) else _int(width)
    return len(text) + (len(text.splitlines()) + 1) * wide


def wrapped_size(
    text: Any, width: Any = 79, _break: Any = True, wrapstring: Any = None, *_: Any
) -> int:
    text = _text(text)
    # Two lines in succession are longer than one width together.
    lines = 2 * len(text) // max(1, _int(width)) + len(text.splitlines()) + 1
    return len(text) + min(lines, len(text) + 1) * max(1, text_size(wrapstring or ""))


def escaped_size(text: Any, *_: Any) -> int:
    return text_size(text)


def batched_size(items: Any, count: Any, fill_with: Any = None) -> int:
    return _int(count) if fill_with is not None else 0


def sliced_size(items: Any, slices: Any, *_: Any) -> int:
    return _int(slices)


def summed_size(items: Any, _attribute: Any = None, start: Any = 0) -> int:
    """Of lists: each step builds the sum anew."""
    if not isinstance(start, list | tuple) or not hasattr(items, "__len__"):
        return 0
    total, longest = 0, len(start)
    for item in items:
        longest += len(item) if is_sized(item) else 0
        total += longest
    return total


def expanded_size(text: str | bytes, tab: Any = 8) -> int:
    tabs = text.count("\t") if isinstance(text, str) else text.count(b"\t")
    return len(text) + tabs * _int(tab)


def translated_size(text: str | bytes, table: Any, *_: Any) -> int:
    values = table.values() if isinstance(table, Mapping) else ()
    return len(text) * max([1, *(text_size(value) for value in values)])


def number_size(_number: Any, *arguments: Any) -> int:
    """Of `int.to_bytes`, whose arguments have names and any order."""
    return max(map(_int, arguments), default=1)


def rounded_size(_number: Any, precision: Any = 0, *_: Any) -> int:
    """Rounding computes a power of ten."""
    check_power(10, precision)
    return 0


def dump_json(value: Any, *, indent: int | None, **options: Any) -> str:
    """json.dumps, within bounds."""
    separators = options.get("separators") or ()
    build(text_size(value) + sum(map(text_size, separators)))
    if indent is None:
        return json.dumps(value, **options)
    if not 0 <= indent <= MAX_JSON_INDENT:
        raise BoundExceeded(f"asked for JSON with indent={indent}, above {MAX_JSON_INDENT}")
    parts: list[str] = []
    for part in json.JSONEncoder(indent=indent, **options).iterencode(value):
        build(len(part))
        parts.append(part)
    return "".join(parts)


def listed(items: Any) -> Any:
    """Iterators become lists, so that they can be measured and then used."""
    if isinstance(items, Iterable) and not hasattr(items, "__len__"):
        return list(items)
    return items


def _text(value: Any) -> str:
    return value if isinstance(value, str) else as_text(value)


def _int(value: Any) -> int:
    return abs(value) if isinstance(value, int) else 0

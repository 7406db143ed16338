"""What llguidance makes of a `Grammar`, and whether it can.

The server asks before anything is computed, and the worker makes masks of the same text; both go
through here, so that what was accepted is what is run. llguidance is imported at the first use.

A grammar comes from outside. Bounded are its bytes, the work of compiling it (`limits`), and the
recursion, by a stack that holds the deepest grammar of that many bytes.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, TypeVar

import msgspec

from quantd.daemon.types import Grammar

if TYPE_CHECKING:
    from llguidance import LLParserLimits
    from llguidance._lib import JsonCompileOptions

MAX_BYTES = {"json_schema": 256 << 10, "regex": 64 << 10, "lark": 256 << 10, "gbnf": 4 << 10}
"""Of a source in UTF-8. Lark is as long as the schemas that it holds; turning GBNF into it takes
time that grows with the square."""

MAX_LARK_LINES = 400
"""An error at the end of a chain of so many rules takes 0.8 s; it grows with the square."""

WHITESPACE = r"( |\r?\n[ \t]{0,32})"
"""Between JSON's tokens: one space, or one line break with an indent. Without a bound a model that
likes spaces never comes to an end."""

JSON_OPTIONS: JsonCompileOptions = {
    "whitespace_flexible": True,
    "whitespace_pattern": WHITESPACE,
    "item_separator": ",",
    "key_separator": ":",
    "coerce_one_of": False,
    "lenient": False,
}
_OPTIONS = '%llguidance {"no_forcing": true}'
"""Text that must follow is not forced in the tokens that llguidance would take for it: which ones
is the model's choice, and the worker has no tokenizer that encodes."""

_STACK_BYTES = 256 << 20
"""Address space of one thread. 256 KiB of schema need below 100 MB, also as one chain of `$ref`;
8 MB, the usual size, end at a chain of a thousand, and the process with them."""

_PLACE = re.compile(r"^at \d+\(\d+\): (failed to compile JSON schema: )?")
"""In our Lark, which the caller has not seen."""

_starting = threading.Lock()
Result = TypeVar("Result")


def llguidance_text(grammar: Grammar) -> str:
    """The grammar as llguidance reads it, all kinds as Lark. Raises ValueError for what is no JSON
    or no GBNF."""
    return f"{_lark(grammar)}\n{_OPTIONS}\n"


def _lark(grammar: Grammar) -> str:
    from llguidance import LLMatcher

    if grammar.kind == "lark":
        return grammar.source
    if grammar.kind == "gbnf":
        return _lark_of_gbnf(grammar.source)
    if grammar.kind == "regex":
        made = LLMatcher.grammar_from_regex(grammar.source)
        return msgspec.json.decode(made, type=_Made).grammars[0].lark_grammar or ""
    # They win over a schema's own "x-guidance", which could ask to pass over keywords.
    made = LLMatcher.grammar_from_json_schema(grammar.source, overrides=JSON_OPTIONS)
    schema = msgspec.json.decode(made, type=_Made).grammars[0].json_schema
    return "start: %json " + bytes(schema).decode()


class _Part(msgspec.Struct):
    json_schema: msgspec.Raw
    lark_grammar: str | None


class _Made(msgspec.Struct):
    """llguidance's own format: what its helpers give."""

    grammars: list[_Part]


def limits() -> LLParserLimits:
    """Of one grammar; below the defaults where these allow hundreds of megabytes. Its errors show
    nothing of the parser's state."""
    from llguidance import LLParserLimits

    return LLParserLimits(initial_lexer_fuel=300_000, max_lexer_states=50_000, verbose_errors=False)


def problem(grammar: Grammar) -> str | None:
    """Why no mask can be made of it; None: it can. Takes milliseconds, at worst two seconds; lets
    other threads run meanwhile. Only names of special tokens are left to the worker."""
    from llguidance import LLMatcher

    size, most = len(grammar.source.encode("utf-8", "surrogatepass")), MAX_BYTES[grammar.kind]
    if size > most:
        return f"it has {size} bytes; the limit is {most}"
    if grammar.kind == "lark":
        lines = grammar.source.count("\n") + 1
        if lines > MAX_LARK_LINES:
            return f"it has {lines} lines; the limit is {MAX_LARK_LINES}"
        if grammar.source.lstrip().startswith("{"):
            return "it is JSON and no grammar"  # llguidance would take its own format for one
    try:
        text = llguidance_text(grammar)
        is_error, messages = LLMatcher.validate_grammar_with_warnings(text, limits=limits())
    except ValueError as error:  # also JSON that is nested too deeply, or a lone surrogate
        return str(error)
    for message in messages:
        # A warning is a keyword that would be passed over.
        if is_error or not message.startswith("no tokenizer"):
            return first_line(message if grammar.kind == "lark" else _PLACE.sub("", message))
    return None


def first_line(message: str) -> str:
    """Of llguidance's errors, which go on with the source and its state; and what the parser of
    regular expressions says last."""
    lines = message.strip().split("\n")
    said = [line for line in lines[1:] if line.startswith("error: ")]
    return " ".join([lines[0][:300], *said[:1]])


def _lark_of_gbnf(gbnf: str) -> str:
    from llguidance.gbnf_to_lark import gbnf_to_lark

    try:
        return gbnf_to_lark(gbnf)
    except Exception as error:  # it raises its own, and whatever malformed input leads to
        message = str(error) or type(error).__name__
        raise ValueError(f"it is not understood as GBNF: {message}") from error


def on_deep_stack(function: Callable[[], Result]) -> Result:
    """Calls it, on a thread of its own: llguidance recurses as deep as a grammar's references go,
    and at the end of a stack the process ends."""
    done: Future[Result] = Future()

    def run() -> None:
        try:
            done.set_result(function())
        except BaseException as error:
            done.set_exception(error)

    thread = threading.Thread(target=run, name="grammar")
    with _starting:  # the size is that of all threads which start meanwhile
        before = threading.stack_size(_STACK_BYTES)
        try:
            thread.start()
        finally:
            threading.stack_size(before)
    return done.result()


class SeenGrammars:
    """The last `limit` grammars, by digest: a source may have 256 KiB. One thread only."""

    def __init__(self, limit: int = 1024) -> None:
        self._limit = limit
        self._digests: OrderedDict[bytes, None] = OrderedDict()

    def add(self, grammar: Grammar) -> None:
        self._digests[digest(grammar)] = None
        if len(self._digests) > self._limit:
            self._digests.popitem(last=False)

    def __contains__(self, grammar: Grammar) -> bool:
        """Also makes it the last one to be forgotten."""
        key = digest(grammar)
        if key not in self._digests:
            return False
        self._digests.move_to_end(key)
        return True


def digest(grammar: Grammar) -> bytes:
    source = f"{grammar.kind}\n{grammar.source}".encode("utf-8", "surrogatepass")
    return hashlib.blake2b(source, digest_size=16).digest()

"""`quantd eval`: one checkpoint or format against another, over a text."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from quantd.daemon.cli import child
from quantd.daemon.cli.checkpoint import read_model
from quantd.daemon.cli.plot import draw
from quantd.daemon.cli.screen import LastLine, bar, size, table
from quantd.daemon.config import ModelSettings
from quantd.daemon.errors import ConfigError, ModelRefused

_SHARED = ("device", "threads")
_WIDTH = 20
"""Of the names at the left."""


def run(arguments: argparse.Namespace) -> int:
    _check(arguments)
    a, b = (_model(arguments, side) for side in ("a", "b"))
    text = _read(Path(arguments.text))
    tokens, head, notes = _tokens(a, b, text)
    request = {
        "a": _fields(a),
        "b": _fields(b),
        "tokens": tokens,
        "head": head,
        "context": arguments.context,
        "windows": arguments.windows,
        "layers": arguments.layers,
    }
    result = {"text": arguments.text, "notes": notes} | _run(request)
    for side, model in (("a", a), ("b", b)):
        asked = {"path": str(model.path), "quantization": model.quantization}
        result[side] = asked | result[side]
    # Printed first: a plot that cannot be written must not cost the numbers.
    print(json.dumps(result, indent=2) if arguments.json else "\n".join(show(result)))
    if arguments.plot is not None:
        _write(Path(arguments.plot), draw(result))
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """Raises ConfigError for what would be found only when all the work is done."""
    if arguments.plot is not None:
        plot = Path(arguments.plot)
        if plot.suffix != ".svg":
            raise ConfigError(f"--plot = {arguments.plot}: must end in .svg")
        if not plot.absolute().parent.is_dir():
            raise ConfigError(f"--plot = {arguments.plot}: there is no folder {plot.parent}")
    if arguments.windows is not None and arguments.windows < 1:
        raise ConfigError(f"--windows = {arguments.windows}: must be at least 1")
    if arguments.context is not None and arguments.context < 2:
        raise ConfigError(f"--context = {arguments.context}: must be at least 2")


def _model(arguments: argparse.Namespace, side: str) -> ModelSettings:
    flags = {
        key: (f"--{key}-{side}", getattr(arguments, f"{key}_{side}"))
        for key in ("dtype", "quantization")
    }
    flags |= {key: (f"--{key}", getattr(arguments, key)) for key in _SHARED}
    return read_model(getattr(arguments, side), flags)


def _fields(model: ModelSettings) -> dict[str, Any]:
    """What LoadModel wants of it."""
    return {
        "path": str(model.path),
        "dtype": model.dtype,
        "quantization": model.quantization,
        "device": model.device,
        "threads": model.threads,
    }


def _read(path: Path) -> str:
    try:
        text = path.read_bytes().decode()
    except OSError as error:
        raise ConfigError(f"--text = {path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"--text = {path}: is not UTF-8 at byte {error.start}") from None
    if not text.strip():
        raise ConfigError(f"--text = {path}: is empty")
    return text


def _tokens(
    a: ModelSettings, b: ModelSettings, text: str
) -> tuple[list[int], list[int], list[str]]:
    """(the text's tokens, those that A's tokenizer puts before any text, notes). Raises
    ModelRefused when the two models cut the text differently."""
    tokens, head = _encoded(a, text)
    if a.path == b.path:
        return tokens, head, []
    other, other_head = _encoded(b, text)
    if tokens != other:
        raise ModelRefused(_difference(tokens, other))
    if head == other_head:
        return tokens, head, []
    # Not a reason to refuse: converters of one and the same model disagree on whether BOS is added.
    note = f"B would begin a text with the tokens {other_head}; both were given A's, {head}"
    return tokens, head, [note]


def _difference(a: list[int], b: list[int]) -> str:
    pairs = enumerate(zip(a, b, strict=False))
    at, found = next(
        ((i, f"{x} by A, {y} by B") for i, (x, y) in pairs if x != y),
        (min(len(a), len(b)), f"A has {len(a)} tokens, B {len(b)}"),
    )
    return f"A and B cut the text into different tokens, from token {at} on ({found})"


def _encoded(model: ModelSettings, text: str) -> tuple[list[int], list[int]]:
    # Imported here: the library is of no use to the other commands.
    from quantd.daemon.text.tokenizer import TextModel

    tokenizer = TextModel.load(model.path)
    plain = tokenizer.encode("x", add_special_tokens=False)
    full = tokenizer.encode("x")
    head = full[: full.index(plain[0])] if plain and plain[0] in full else []
    return tokenizer.encode(text, add_special_tokens=False), head


def _run(request: dict[str, Any]) -> dict[str, Any]:
    """Shows progress on stderr if that is a terminal."""
    if not sys.stderr.isatty():
        return child.run("evaluate", request, lambda progress: None)
    screen = LastLine(sys.stderr)

    def show_one(progress: dict[str, Any]) -> None:
        done, total = progress["done"], progress["total"]
        screen.show(f"{bar(done / total if total else 0.0)} {progress['stage']}")

    try:
        return child.run("evaluate", request, show_one)
    finally:
        screen.show("")


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        raise ConfigError(f"--plot = {path}: cannot be written: {error.strerror}") from None


def show(result: dict[str, Any]) -> Iterator[str]:
    """Lines for people."""
    for side in ("a", "b"):
        yield _pair(side.upper(), _about(result[side]))
    left = result["tokens_left_out"]
    more = f"; {left:,} tokens at its end left out" if left else ""
    plural = "" if result["windows"] == 1 else "s"
    windows = f"{result['windows']:,} window{plural} of {result['context']:,} tokens"
    yield _pair("text", f"{result['text']}: {windows}, {result['tokens']:,} predicted{more}")
    yield ""
    for side in ("a", "b"):
        yield _pair(f"perplexity of {side.upper()}", _interval(result[f"perplexity_{side}"]))
    yield _pair("B's over A's", _interval(result["perplexity_ratio"], places=5))
    kl = result["kl"]
    yield _pair("KL(A||B), nats", f"mean {_interval(kl, scientific=True)}")
    names = ("median", "p90", "p99", "max")
    yield _pair("", ", ".join(f"{name} {kl[name]:.3e}" for name in names))
    yield _pair("same first choice", _percent(result["same_first"]))
    yield _pair("same of first five", _percent(result["shared_five"]))
    yield from _layers(result)
    if result["windows"] > 1:
        yield ""
        yield "In brackets: 95 % intervals, from how much the windows differ."
    for note in result["notes"]:
        yield ""
        yield f"note: {note}"


def _pair(name: str, text: str) -> str:
    return f"{name.ljust(_WIDTH)}{text}"


def _about(side: dict[str, Any]) -> str:
    formats = ", ".join(f"{name} × {count}" for name, count in side["quantizers"])
    return f"{side['path']}: {side['dtype']}, {formats}, {size(side['weight_bytes'])} of weights"


def _interval(of: dict[str, float | None], places: int = 4, scientific: bool = False) -> str:
    form = ".3e" if scientific else f".{places}f"
    if of["low"] is None:
        return f"{of['value']:{form}}"
    return f"{of['value']:{form}} [{of['low']:{form}}, {of['high']:{form}}]"


def _percent(of: dict[str, float | None]) -> str:
    hundred = {key: None if value is None else 100 * value for key, value in of.items()}
    return f"{_interval(hundred, places=2)} %"


def _layers(result: dict[str, Any]) -> Iterator[str]:
    if "layers" not in result:
        return
    yield ""
    rows = [[row["name"], _error(row["weight"]), _error(row["output"])] for row in result["layers"]]
    yield table([["LINEAR LAYER", "WEIGHT ERROR", "OUTPUT ERROR"], *rows])
    yield ""
    rows = [[row["name"], _error(row["error"])] for row in result["hidden"]]
    yield table([["HIDDEN STATES BEFORE", "ERROR"], *rows])
    yield ""
    yield "Errors are relative to A: |B - A| / |A|. An output's is for A's own input; hidden"
    yield "states are each model's own, so their errors add up from layer to layer."


def _error(value: float | None) -> str:
    return "-" if value is None else f"{value:.2e}"

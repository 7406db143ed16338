"""`quantd inspect`: what a checkpoint is and how it would be run, from its headers."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from quantd.daemon.cli import child
from quantd.daemon.cli.checkpoint import read_model
from quantd.daemon.cli.screen import Spinner, size, table
from quantd.daemon.errors import QuantdError

_WIDTH = 14
"""Of the names at the left."""


def run(arguments: argparse.Namespace) -> int:
    """1 for a checkpoint that is refused, after all that can be said of it."""
    flags = {
        key: (f"--{key}", getattr(arguments, key)) for key in ("dtype", "quantization", "device")
    }
    model = read_model(arguments.path, flags)
    request = {
        "path": str(model.path),
        "dtype": model.dtype,
        "quantization": model.quantization,
        "device": model.device,
    }
    with Spinner("reading headers"):
        report = child.run("inspect", request, lambda progress: None)
    report["tokenizer"] = _tokenizer(model.path)
    if arguments.json:
        print(json.dumps(report, indent=2))
    else:
        print("\n".join(show(report, arguments.layers)))
    if report["refused"] is None:
        return 0
    sys.stdout.flush()
    print(f"quantd: {report['refused']}", file=sys.stderr)
    return 1


def _tokenizer(path: Path) -> dict[str, Any]:
    # Imported here: the library is of no use to the other commands.
    from quantd.daemon.text.tokenizer import TextModel

    try:
        text = TextModel.load(path)
    except QuantdError as error:
        return {"problem": str(error)}
    return {
        "kind": type(text.vocabulary.tokenizer.model).__name__,
        "size": text.vocab_size,
        "chat_template": text.has_chat_template,
    }


def show(report: dict[str, Any], layers: bool) -> Iterator[str]:
    """Lines for people; `layers`: each layer by itself too."""
    yield from _pairs([("path", report["path"]), *_checkpoint(report)])
    if "layers" in report:
        yield ""
        yield table([_HEADER, *_groups(report["layers"])])
        yield from _others(report["layers"])
    if layers and "layers" in report:
        yield ""
        yield table([["LAYER", *_HEADER[1:]], *map(_row, report["layers"])])
    for note in report["notes"]:
        yield ""
        yield f"note: {note}"


def _pairs(pairs: list[tuple[str, str]]) -> Iterator[str]:
    for name, text in pairs:
        yield f"{name.ljust(_WIDTH)}{text}"


def _checkpoint(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    model, said, stored = (report.get(key) for key in ("model", "said", "stored"))
    if model is not None:
        yield "architecture", f"{model['architecture']}, {_shape(model)}"
    elif said is not None:
        named = ", ".join(map(str, said["architectures"] or [said["model_type"] or "not said"]))
        yield "architecture", named
    if model is not None and model["pooling"] is not None:
        yield "made for", _pooling(model["pooling"])
    if said is not None and said["quant_method"] is not None:
        yield "quant_method", f"{said['quant_method']} (config.json)"
    if model is not None and "parameters" in model:
        yield "parameters", f"{model['parameters']:,}"
    if model is not None:
        limit = f", at most {model['context_limit']:,}"
        more = limit if model["context_limit"] != model["context"] else ""
        yield "context", f"{model['context']:,} tokens{more}"
    # Not what will be said of the whole: that there is no file, or that it is cut off.
    if report["tokenizer"].get("problem", "") != report["refused"]:
        yield "tokenizer", _tokens(report["tokenizer"], model)
    if stored is not None:
        types = ", ".join(f"{name} × {count}" for name, count in stored["types"].items())
        yield "stored", f"{size(stored['bytes'])} in {stored['tensors']} tensors ({types})"
    if "dtype" in report:
        yield "runs as", f"{report['dtype']} on {report['device']}"
    yield from _memory(report)


def _pooling(pooling: dict[str, Any]) -> str:
    if pooling["task"] == "rerank":
        return "reranking: a score for a query and a document"
    kinds = {"mean": "mean", "cls": "first token", "last": "last token"}
    normalized = ", normalized" if pooling["normalized"] else ""
    lengths = ", ".join(map(str, pooling["dimensions"]))
    cut = f", may be cut to {lengths or 'fewer'}" if pooling["matryoshka"] else ""
    return f"embeddings of {pooling['size']} ({kinds[pooling['kind']]}{normalized}{cut})"


def _shape(model: dict[str, Any]) -> str:
    experts = "" if model["experts"] is None else f", {model['experts']} experts"
    return (
        f"{model['layers']} layers, hidden {model['hidden_size']}, {model['heads']} heads "
        f"({model['kv_heads']} for keys and values) of {model['head_dim']}{experts}"
    )


def _tokens(tokenizer: dict[str, Any], model: dict[str, Any] | None) -> str:
    if "problem" in tokenizer:
        return f"none: {tokenizer['problem']}"
    template = "a" if tokenizer["chat_template"] else "no"
    rows = "" if model is None else f" ({model['output_rows']:,} rows in the model)"
    return f"{tokenizer['kind']}, {tokenizer['size']:,} tokens{rows}, {template} chat template"


def _memory(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    if "weight_bytes" in report:
        about = "" if report["weight_bytes_exact"] else "about "
        yield "weights", f"{about}{size(report['weight_bytes'])} of memory"
    if "kv_bytes_per_token" in report:
        per_token = report["kv_bytes_per_token"]
        whole = size(per_token * report["model"]["context"])
        each = f"{size(1000 * per_token)} of memory per 1,000 tokens"
        yield "keys, values", f"{each}, {whole} for a full context"


_HEADER = [
    "LAYERS",
    "QUANTIZER",
    "FORMAT",
    "STORED",
    "LOADED",
    "ROUTE",
    "BECAUSE OF",
]


def _groups(layers: list[dict[str, Any]]) -> list[list[str]]:
    """A row for all layers that are alike, the number of them first."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for layer in layers:
        kind = tuple(str(layer[key]) for key in ("quantizer", "format", "route", "reason"))
        # A refusal names its layer: those are one group.
        groups.setdefault(kind if layer["quantizer"] else ("None",), []).append(layer)
    return [_group(group) for group in groups.values()]


def _group(layers: list[dict[str, Any]]) -> list[str]:
    first = layers[0]
    summed = ("weights", "stored_bytes", "loaded_bytes")
    total = {key: sum(layer[key] for layer in layers) for key in summed}
    return [str(len(layers)), *_row(first | total)[1:]]


def _row(layer: dict[str, Any]) -> list[str]:
    name = layer["name"]
    if layer["quantizer"] is None:
        return [name, "none", "-", "-", "-", "-", "see below"]
    about = "" if layer["described"] else "about "
    return [
        name,
        layer["quantizer"],
        layer["format"],
        _bytes(layer["stored_bytes"], layer["weights"]),
        about + _bytes(layer["loaded_bytes"], layer["weights"]),
        layer["route"] or "not said",
        layer["reason"],
    ]


def _bytes(nbytes: int, weights: int) -> str:
    return f"{size(nbytes)} ({8 * nbytes / weights:.2f} bits each)"


def _others(layers: list[dict[str, Any]]) -> Iterator[str]:
    """Why the other quantizers do not take layers, and how many of them."""
    counts = Counter((name, why) for layer in layers for name, why in layer["others"])
    names: dict[tuple[str, int], list[str]] = {}
    for (name, why), count in counts.items():
        names.setdefault((why, count), []).append(name)
    if names:
        rows = [[str(count), ", ".join(some), why] for (why, count), some in names.items()]
        yield ""
        yield table([["LAYERS", "NOT BY", "WHY"], *rows])

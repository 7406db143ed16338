"""`quantd ps`."""

from __future__ import annotations

import argparse
import json
from typing import Any

from quantd.daemon.cli import client
from quantd.daemon.cli.screen import bar, size, table

_BATCH_HEADER = ["BATCH", "STATUS", "MODEL", "CALLER", "DONE", "FAILED"]
_HEADER = ["MODEL", "STATE", "WEIGHTS", "KV USED", "CONTEXT", "DEVICE", "RUNNING", "WAITING"]


def run(arguments: argparse.Namespace) -> int:
    daemon = client.find(arguments)
    models = _models(daemon)
    if arguments.json:
        print(json.dumps(models, indent=2))
        return 0
    batches = _batches(daemon)
    print(table([_HEADER, *map(_row, models)]))
    for model in models:
        if model["reason"]:
            print(f"\n{model['name']}: {model['reason']}")
    if batches:
        print("\n" + table([_BATCH_HEADER, *map(_batch_row, batches)]))
    return 0


def _batches(daemon: client.Target) -> list[dict[str, Any]]:
    """Those that have not ended: everybody's over the Unix socket, else the key's own."""
    if daemon.path is not None:
        found: list[dict[str, Any]] = daemon.get("/admin/batches")["batches"]
        return found
    try:
        page = daemon.get("/v1/batches")["data"]
    except client.ClientError:
        return []  # a daemon that keeps nothing
    return [
        {**batch, **batch["request_counts"], "caller": "-"}
        for batch in page
        if batch["status"] in ("validating", "in_progress", "finalizing", "cancelling")
    ]


def _batch_row(batch: dict[str, Any]) -> list[str]:
    done, total = batch["completed"] + batch["failed"], batch["total"]
    return [
        batch["id"],
        batch["status"],
        batch["model"] or "-",
        batch["caller"] or "-",
        f"{bar(done / total)} {done} of {total}" if total else "-",
        str(batch["failed"]),
    ]


def _models(daemon: client.Target) -> list[dict[str, Any]]:
    """What there is to know of each model; over TCP that is less, and without `info`: an API key
    is not an administrator's."""
    if daemon.path is None:
        return [_from_openai(model) for model in daemon.get("/v1/models")["data"]]
    engines = daemon.get("/admin/state")["engines"]
    models: list[dict[str, Any]] = daemon.get("/admin/models")["models"]
    return [model | {"stats": engines.get(model["name"])} for model in models]


def _row(model: dict[str, Any]) -> list[str]:
    info, stats = model.get("info"), model.get("stats")
    row = [model["name"], _state(model), "-", "-", str(model["max_context"] or "-"), "-", "-", "-"]
    if info is not None:
        row[2], row[5] = size(info["weight_bytes"]), info["device"]
    if info is not None and stats is not None:
        kv = stats["kv"]
        pool = size((kv["free"] + kv["used"] + kv["cached"]) * kv["block_bytes"])
        if kv["block_bytes"]:  # else it keeps nothing
            row[3] = f"{size(kv['used'] * kv['block_bytes'])} of {pool}"
        row[6:] = str(stats["running"]), str(stats["waiting"])
    return row


def _state(model: dict[str, Any]) -> str:
    state: str = model["state"]
    return f"{state} {model['progress']:.0%}" if state == "loading" else state


def _from_openai(model: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": model["id"],
        "state": model["state"],
        "reason": model["reason"],
        "progress": model["progress"],
        "max_context": model["max_model_len"],
        "aliases": model["aliases"],
    }

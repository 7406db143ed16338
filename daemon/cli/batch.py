"""`quantd batch FILE`: uploads it, waits with a bar, writes the results beside it."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from quantd.daemon.cli import client
from quantd.daemon.cli.client import ClientError, Target
from quantd.daemon.cli.screen import LastLine, bar
from quantd.daemon.errors import ConfigError

_POLL_SECONDS = 0.2
_ENDS = ("completed", "failed", "expired", "cancelled")
_SHOWN_ERRORS = 5


def run(arguments: argparse.Namespace) -> int:
    """0 if every request has an answer, 1 if not, 130 if Ctrl-C has cancelled it."""
    file = Path(arguments.file)
    endpoint = _endpoint(file)
    daemon = client.find(arguments)
    uploaded = daemon.upload("/v1/files", file, {"purpose": "batch"})
    body = {"input_file_id": uploaded["id"], "endpoint": endpoint}
    batch = daemon.post("/v1/batches", body | {"completion_window": arguments.window})
    if arguments.detach:
        print(batch["id"])
        return 0
    batch, is_cancelled = _wait(daemon, batch)
    if batch["status"] == "failed":
        _show_errors(file, batch["errors"]["data"])
        return 1
    outputs = Path(arguments.output or f"{file}.output.jsonl")
    errors = Path(arguments.errors or f"{file}.errors.jsonl")
    for id, path in ((batch["output_file_id"], outputs), (batch["error_file_id"], errors)):
        if id is not None:
            daemon.download(f"/v1/files/{id}/content", path)
    counts = batch["request_counts"]
    print(f"{batch['status']}: {counts['completed']} of {counts['total']} requests have an answer")
    if batch["output_file_id"]:
        print(f"{outputs}")
    if batch["error_file_id"]:
        print(f"{errors}")
    return 130 if is_cancelled else int(counts["failed"] > 0 or batch["status"] != "completed")


def _endpoint(file: Path) -> str:
    """What the first request asks for; the daemon checks the others against it."""
    try:
        with file.open("rb") as lines:
            first = next((line for line in lines if line.strip()), b"")
        url = json.loads(first.removeprefix(b"\xef\xbb\xbf"))["url"]
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        url = None
    if not isinstance(url, str):
        raise ConfigError(f'{file}: the first line is not a request of a batch with a "url"')
    return url


def _wait(daemon: Target, batch: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """The batch when it has ended, and whether Ctrl-C was why. A second Ctrl-C leaves it alone."""
    screen = LastLine(sys.stderr) if sys.stderr.isatty() else None
    is_cancelled = False
    try:
        while batch["status"] not in _ENDS:
            try:
                if screen is not None:
                    screen.show(_progress(batch))
                time.sleep(_POLL_SECONDS)
                batch = daemon.get(f"/v1/batches/{batch['id']}")
            except KeyboardInterrupt:
                if is_cancelled:
                    raise
                is_cancelled = True
                batch = _cancel(daemon, batch)
    finally:
        if screen is not None:
            screen.show("")
    return batch, is_cancelled


def _cancel(daemon: Target, batch: dict[str, Any]) -> dict[str, Any]:
    try:
        cancelled: dict[str, Any] = daemon.post(f"/v1/batches/{batch['id']}/cancel", {})
        return cancelled
    except ClientError as error:
        if error.http_status != 409:  # it has ended meanwhile
            raise
        return batch


def _progress(batch: dict[str, Any]) -> str:
    counts = batch["request_counts"]
    done, total = counts["completed"] + counts["failed"], counts["total"]
    if not total:
        return f"{batch['status']} {batch['id']}"
    failed = f", {counts['failed']} failed" if counts["failed"] else ""
    return f"{bar(done / total)} {done} of {total}{failed}   {batch['status']}"


def _show_errors(file: Path, errors: list[dict[str, Any]]) -> None:
    for error in errors[:_SHOWN_ERRORS]:
        where = f"{file}:{error['line']}" if error["line"] else str(file)
        print(f"quantd: {where}: {error['message']}", file=sys.stderr)
    if len(errors) > _SHOWN_ERRORS:
        print(f"quantd: {len(errors) - _SHOWN_ERRORS} more errors", file=sys.stderr)

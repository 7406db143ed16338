"""`quantd check`: what this machine has, what is broken or slow, and what to do about it."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from quantd.daemon.cli import child
from quantd.daemon.cli.check.facts import as_json, gather
from quantd.daemon.cli.check.findings import Finding, find
from quantd.daemon.cli.check.view import show
from quantd.daemon.cli.checkpoint import read_model
from quantd.daemon.cli.screen import Spinner
from quantd.daemon.config import load
from quantd.daemon.errors import ConfigError


def run(arguments: argparse.Namespace) -> int:
    """1 if something is broken; what is slow is not."""
    flags = {key: (f"--{key}", getattr(arguments, key)) for key in ("device", "threads")}
    model = read_model("demo", flags)
    request = {"device": model.device, "threads": model.threads, "quick": arguments.quick}
    state, wrong = _state()
    facts = gather(model.device, state, lambda: _ask(request))
    findings = [*wrong, *find(facts)]
    if arguments.json:
        found = [dataclasses.asdict(finding) for finding in findings]
        worst = findings[0].severity if findings else "note"
        status = "ok" if worst == "note" else worst
        print(json.dumps({"status": status, "findings": found} | as_json(facts), indent=2))
    else:
        print("\n".join(show(facts, findings)))
    return 1 if any(finding.severity == "broken" for finding in findings) else 0


def _state() -> tuple[Path | None, list[Finding]]:
    """The state directory; a configuration that cannot be read is a finding like others."""
    try:
        return load().store.path, []
    except ConfigError as error:
        todo = "`quantd check-config` shows the configuration once it can be read"
        return None, [Finding("broken", "configuration", str(error), todo)]


def _ask(request: dict[str, Any]) -> dict[str, Any]:
    """Raises ToolError, with what was being done."""
    stage = "start"

    def follow(progress: dict[str, Any]) -> None:
        nonlocal stage
        stage = progress["stage"]
        spinner.text = f"checking {stage}"

    with Spinner("checking") as spinner:
        try:
            return child.run("check", request, follow)
        except child.ToolError as error:
            raise child.ToolError(f"{error} (while checking {stage})") from None

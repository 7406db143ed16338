"""`quantd load`, `unload` and `reload`: administration, over the Unix socket."""

from __future__ import annotations

import argparse

from quantd.daemon.cli import client
from quantd.daemon.cli.screen import Spinner


def run(arguments: argparse.Namespace) -> int:
    daemon = client.find(arguments)
    if daemon.path is None:
        raise client.ClientError(
            f"the daemon at {daemon} can be administered over its Unix socket only: name it with "
            "--socket, and have the right to write to it (`quantd serve` says where it is)"
        )
    if arguments.action == "reload":
        changes = daemon.post("/admin/reload", {})["changes"]
        print("\n".join(changes) or "nothing has changed")
        return 0
    with Spinner(f"{arguments.action}ing {arguments.model}"):
        done = daemon.post(f"/admin/models/{arguments.action}", {"model": arguments.model})
    print(f"{done['model']}: {done['state']}")
    return 0

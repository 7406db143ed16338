"""Tools that need torch run in a process of their own; the protocol is in `worker/child.py`."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

from quantd.daemon.errors import QuantdError

OnProgress = Callable[[dict[str, Any]], None]


class ToolError(QuantdError):
    """The tool has refused, or it broke."""


def run(module: str, request: Mapping[str, Any], on_progress: OnProgress) -> dict[str, Any]:
    """The result of `python -m quantd.daemon.worker.MODULE`. It ends with this call, whatever
    ends the call. Raises ToolError."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", f"quantd.daemon.worker.{module}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        # A group of its own: Ctrl-C is for the command, which ends the tool without a traceback.
        process_group=0,
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(json.dumps(request).encode())
        process.stdin.close()
        for line in process.stdout:
            message = json.loads(line)
            if "progress" in message:
                on_progress(message["progress"])
            elif "error" in message:
                raise ToolError(message["error"])
            else:
                result: dict[str, Any] = message["result"]
                return result
        raise ToolError(_ended(module, process.wait()))
    except BrokenPipeError:
        raise ToolError(_ended(module, process.wait())) from None
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def _ended(module: str, status: int) -> str:
    if status >= 0:
        return f"{module} failed (status {status}); its last words are above"
    name = signal.Signals(-status).name
    hint = ", perhaps for want of memory" if name == "SIGKILL" else ""
    return f"{module} was ended by {name}{hint}"

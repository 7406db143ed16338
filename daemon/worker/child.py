"""A tool of the command line that needs torch: one JSON request in, lines of JSON out.

stdin is the request, an object. Every line of stdout is an object with one key: `progress`, any
number of times, then `result`, or `error` (a sentence for the user). A crash has no last line.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

Send = Callable[[dict[str, Any]], None]
Work = Callable[[dict[str, Any], Send], dict[str, Any]]


def main(work: Work) -> NoReturn:
    """Runs `work(request, send)`, where send passes on progress. Never returns."""
    # What a plug-in prints must not come between the lines of JSON.
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def write(key: str, value: object) -> None:
        out.write(json.dumps({key: value}, allow_nan=False) + "\n")
        out.flush()

    try:
        request = json.load(sys.stdin)
    except ValueError:
        os._exit(1)  # who asked has left before the request was whole
    try:
        result = work(request, lambda progress: write("progress", progress))
        write("result", result)
    except BrokenPipeError:
        os._exit(1)  # who asked has left
    except MemoryError as error:
        write("error", str(error) or "out of memory")
    except Exception as error:
        # Imported here: torch comes with it, and `check` has to say why it does not.
        from quantd.plugins.api import Refused

        if not isinstance(error, Refused):
            raise
        write("error", str(error))
    sys.stderr.flush()
    # Taking down an interpreter with a model in it takes seconds, and the kernel frees all as well.
    os._exit(0)

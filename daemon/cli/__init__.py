"""The command line. Each command is a module that is imported when it is called.

Commands that talk to a daemon use only the standard library, so that they start at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from quantd.daemon.cli.parser import new_parser
from quantd.daemon.errors import ConfigError, QuantdError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0, 1 failed, 2 wrong configuration or usage."""
    parsed = new_parser().parse_args(arguments)
    try:
        command = import_module(f"quantd.daemon.cli.{parsed.module}")
        status: int = command.run(parsed)
        sys.stdout.flush()
        return status
    except QuantdError as error:
        print(f"quantd: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Who read our output has left; the interpreter's own flush at exit must not complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141

"""`quantd` and `python -m quantd.daemon`."""

from quantd.daemon.cli import main

__all__ = ["main"]

if __name__ == "__main__":
    raise SystemExit(main())

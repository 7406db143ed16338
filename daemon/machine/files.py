"""Files of one line or of "name: value" lines."""

from __future__ import annotations

from pathlib import Path

ROOT = Path("/")


def text(path: Path) -> str | None:
    """Without the white space around it; None where it cannot be read or is empty."""
    try:
        return path.read_text(errors="replace").strip() or None
    except OSError:
        return None


def lines(path: Path) -> list[str]:
    return (text(path) or "").splitlines()


def number(path: Path) -> int | None:
    """None also where the file holds a word, as "max"."""
    try:
        return int(text(path) or "")
    except ValueError:
        return None


def target(link: Path) -> str | None:
    """The last part of what a link points to."""
    try:
        return link.readlink().name
    except OSError:
        return None


def children(folder: Path, pattern: str) -> list[Path]:
    """Sorted; none where there is no such folder."""
    return sorted(folder.glob(pattern))

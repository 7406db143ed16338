"""The models that come with quantd: one folder each, in transformers' layout."""

from pathlib import Path


def path(name: str) -> Path:
    """The folder of an embedded model; FileNotFoundError, naming those there are, for any other."""
    room = Path(__file__).parent
    folder = room / name
    if folder.parent != room or not (folder / "config.json").is_file():
        names = ", ".join(sorted(p.parent.name for p in room.glob("*/config.json")))
        raise FileNotFoundError(f"no embedded model {name!r}; there are: {names}")
    return folder

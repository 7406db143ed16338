"""`quantd install-service`: the systemd units, with the interpreter that runs this command."""

from __future__ import annotations

import argparse
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from quantd.daemon.config import Environment
from quantd.daemon.errors import ConfigError

_HOMES = ("/home", "/root", "/run/user")
"""What ProtectHome= hides from a service."""
_SYSTEM_FILES = {
    "quantd.service": "etc/systemd/system/quantd.service",
    "quantd.socket": "etc/systemd/system/quantd.socket",
    "sysusers.d/quantd.conf": "etc/sysusers.d/quantd.conf",
    "tmpfiles.d/quantd.conf": "etc/tmpfiles.d/quantd.conf",
}
_SYSTEM_STEPS = """\
Next, as root:
  systemd-sysusers
  systemd-tmpfiles --create
  systemctl daemon-reload
  systemctl enable --now quantd.socket quantd.service
With GPUs, before that:
  install -D {gpu} /etc/systemd/system/quantd.service.d/gpu.conf"""
_USER_STEPS = """\
Next:
  systemctl --user daemon-reload
  systemctl --user enable --now quantd
  loginctl enable-linger  # to have it run while you are logged out"""


def run(arguments: argparse.Namespace) -> int:
    source = templates()
    files = user_files(source) if arguments.user else system_files(source)
    for path, text in files:
        target = Path(arguments.prefix) / path.relative_to("/")
        if arguments.dry_run:
            print(f"# {target}\n{text}")
            continue
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text)
        except OSError as error:
            raise ConfigError(f"cannot write {target}: {error.strerror}") from None
        print(f"wrote {target}")
    steps = _USER_STEPS if arguments.user else _SYSTEM_STEPS.format(gpu=source / "quantd-gpu.conf")
    print(steps, file=sys.stderr if arguments.dry_run else sys.stdout)
    if not arguments.user and is_hidden(sys.executable):
        print(
            f"quantd: warning: {sys.executable} is in a home folder; the unit was given "
            "ProtectHome=read-only, and the user quantd must be able to read it",
            file=sys.stderr,
        )
    return 0


def templates() -> Path:
    """The folder of the units: beside the sources, or where the package put them."""
    beside = Path(__file__).parents[2] / "systemd"
    installed = Path(sysconfig.get_path("data")) / "share/quantd/systemd"
    for folder in (beside, installed):
        if (folder / "quantd.service").is_file():
            return folder
    raise ConfigError(f"the unit files are missing; looked in {beside} and {installed}")


def system_files(source: Path) -> Iterator[tuple[Path, str]]:
    """(where, what) for the system's service manager."""
    for name, path in _SYSTEM_FILES.items():
        text = (source / name).read_text()
        if name == "quantd.service":
            text = with_interpreter(text)
            if is_hidden(sys.executable):
                text = text.replace("ProtectHome=yes", "ProtectHome=read-only")
        yield Path("/", path), text


def user_files(source: Path) -> Iterator[tuple[Path, str]]:
    """The same for a user's own."""
    home = Environment.read().config_home
    if home is None:
        raise ConfigError("neither $XDG_CONFIG_HOME nor $HOME says where the unit belongs")
    text = with_interpreter((source / "user/quantd.service").read_text())
    yield home.absolute() / "systemd/user/quantd.service", text


def with_interpreter(unit: str) -> str:
    """The unit with this interpreter in ExecStart=."""
    command = f"{escape(sys.executable)} -m quantd.daemon serve"
    lines = unit.splitlines(keepends=True)
    return "".join(
        f"ExecStart={command}\n" if line.startswith("ExecStart=") else line for line in lines
    )


def escape(path: str) -> str:
    """A path as systemd.service(5) wants it in a command line."""
    path = path.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{path}"' if any(character.isspace() for character in path) else path


def is_hidden(path: str) -> bool:
    """Whether ProtectHome=yes would hide it, links followed: an interpreter is often one."""
    return any(str(place).startswith(_HOMES) for place in (Path(path), Path(path).resolve()))

"""What the process's environment says. Nobody else in quantd reads `os.environ`."""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path

SYSTEM_STATE = Path("/var/lib/quantd")
SYSTEM_SOCKET = Path("/run/quantd.sock")
"""Where the daemon of the whole machine listens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """A snapshot. Variables that are set but empty count as not set, as systemd and XDG have it."""

    config: Path | None = None
    """$QUANTD_CONFIG: the configuration file."""
    log_level: str | None = None
    """$QUANTD_LOG: overrides log.level."""
    config_home: Path | None = None
    """$XDG_CONFIG_HOME, else ~/.config."""
    state_directory: Path | None = None
    """$STATE_DIRECTORY, from the unit's StateDirectory=: the first, if there are several."""
    state_home: Path | None = None
    """$XDG_STATE_HOME, else ~/.local/state."""
    session_runtime: Path | None = None
    """$XDG_RUNTIME_DIR: the login session's folder for sockets."""
    credentials: Path | None = None
    """$CREDENTIALS_DIRECTORY, from the unit's LoadCredential=."""
    notify_socket: str | None = None
    watchdog_usec: int | None = None
    """None also when $WATCHDOG_PID names another process."""
    journal_stream: tuple[int, int] | None = None
    """Device and inode of the journal's stream, if stdout or stderr was connected to it."""
    api_key: str | None = None
    """$QUANTD_API_KEY: what the command line client shows over TCP."""
    no_color: bool = False
    user_id: int = 0

    @classmethod
    def read(cls, variables: Mapping[str, str] | None = None) -> Environment:
        """A snapshot of `variables` (default: the process's own)."""
        get = (os.environ if variables is None else variables).get
        mine = str(os.getpid())
        watched = get("WATCHDOG_PID", mine) == mine
        return cls(
            config=_path(get("QUANTD_CONFIG")),
            log_level=get("QUANTD_LOG") or None,
            config_home=_path(get("XDG_CONFIG_HOME")) or _home(get("HOME"), ".config"),
            state_directory=_path((get("STATE_DIRECTORY") or "").partition(":")[0]),
            state_home=_path(get("XDG_STATE_HOME")) or _home(get("HOME"), ".local/state"),
            session_runtime=_path(get("XDG_RUNTIME_DIR")),
            credentials=_path(get("CREDENTIALS_DIRECTORY")),
            notify_socket=get("NOTIFY_SOCKET") or None,
            watchdog_usec=_number(get("WATCHDOG_USEC")) or None if watched else None,
            journal_stream=_stream(get("JOURNAL_STREAM")),
            api_key=get("QUANTD_API_KEY") or None,
            no_color=bool(get("NO_COLOR")),
            user_id=os.getuid(),
        )

    def default_socket(self) -> Path | None:
        """Where this user's daemon listens when nothing says otherwise; None: nowhere safe."""
        if self.user_id == 0:
            return SYSTEM_SOCKET
        return self.session_runtime / "quantd.sock" if self.session_runtime else None

    def default_state(self) -> Path | None:
        """Where what clients store is kept when nothing says otherwise; None: nowhere."""
        if self.state_directory is not None:
            return self.state_directory
        if self.user_id == 0:
            return SYSTEM_STATE
        return self.state_home / "quantd" if self.state_home else None

    def config_files(self) -> tuple[Path, ...]:
        """Where a configuration file is looked for when none is named; the first one counts."""
        files = (Path("/etc/quantd/config.toml"),)
        return (*files, self.config_home / "quantd/config.toml") if self.config_home else files


def process_variables() -> MutableMapping[str, str]:
    """The process's own, for the one who must remove some: sd_listen_fds(3)."""
    return os.environ


def _path(text: str | None) -> Path | None:
    return Path(text) if text else None


def _home(home: str | None, folder: str) -> Path | None:
    return Path(home) / folder if home else None


def _number(text: str | None) -> int:
    """The service manager's numbers; anything else is as good as absent."""
    return int(text) if text and text.isascii() and text.isdigit() else 0


def _stream(text: str | None) -> tuple[int, int] | None:
    device, _, inode = (text or "").partition(":")
    return (int(device), int(inode)) if device.isdigit() and inode.isdigit() else None

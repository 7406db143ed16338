"""The service manager's notification protocol, sd_notify(3): one datagram per message."""

from __future__ import annotations

import socket
import time
from contextlib import suppress


class Notifier:
    """Tells systemd what the daemon does. Without a socket (None) every call does nothing."""

    def __init__(self, address: str | None) -> None:
        """`address` is $NOTIFY_SOCKET: a path, or "@name" in the abstract namespace."""
        self._socket: socket.socket | None = None
        if address:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            with suppress(OSError):
                self._socket.connect("\0" + address[1:] if address[0] == "@" else address)

    def ready(self) -> None:
        self._send("READY=1")

    def status(self, text: str) -> None:
        """One line for `systemctl status`."""
        self._send("STATUS=" + text.replace("\n", " "))

    def reloading(self) -> None:
        """`ready` must follow."""
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self, seconds: float) -> None:
        """The stop has begun and may take this long, whatever TimeoutStopSec= says."""
        self._send(f"STOPPING=1\nEXTEND_TIMEOUT_USEC={int(seconds * 1e6)}")

    def watchdog(self) -> None:
        self._send("WATCHDOG=1")

    def _send(self, message: str) -> None:
        """Never blocks for long and never fails: a service manager that is gone is no reason."""
        if self._socket is not None:
            with suppress(OSError):
                self._socket.send(message.encode())

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None
